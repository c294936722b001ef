"""Builds the CUDA kernels for the host, where ``csrc/emulation`` stands in for the GPU."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import fastfilm

ROOT = Path(__file__).resolve().parents[1]
KERNELS = tuple(sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu")))
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-DFASTFILM_EMULATED", "-w")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1")


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("c++") or shutil.which("g++")


@functools.cache
def _includes() -> tuple[str, ...]:
    import pybind11

    return f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"


def build(
    folder: Path,
    flags: Iterable[str] = ("-O1",),
    csrc: Path = ROOT / "csrc",
    kernels: Iterable[str] = KERNELS,
    objects: Iterable[Path] = (),
) -> Path:
    """The extension ``_CUDA`` on the emulation, from the sources in ``csrc``, as a file in ``folder``.

    Args:
        objects: compiled files of an earlier build to take instead of compiling the others again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    have = {o.stem: o for o in objects}
    sources = [csrc / "cuda" / k for k in kernels]
    sources += [
        csrc / "cuda/bindings.cpp",
        csrc / "cuda/plan.cpp",
        csrc / "emulation/emulation.cpp",
    ]
    sources = [s for s in sources if s.exists()]

    def compiled(source: Path) -> Path:
        if source.stem in have:
            return have[source.stem]
        out = folder / f"{source.stem}.o"
        command = [str(compiler()), *FLAGS, *flags, *_includes(), "-x", "c++", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
        return out

    with ThreadPoolExecutor(2) as pool:
        made = [str(o) for o in pool.map(compiled, sources)]
    library = folder / "_CUDA.so"
    link = [str(compiler()), "-shared", *flags, *made, "-o", str(library)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return library


def load(library: Path) -> ModuleType:
    """The extension module in a file."""
    loader = importlib.machinery.ExtensionFileLoader("_CUDA", str(library))
    spec = importlib.util.spec_from_loader("_CUDA", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time: the workers of a test run share what is built in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def installed(module: ModuleType) -> Iterator[ModuleType]:
    """``fastfilm.ops.cuda`` on top of an emulated extension."""
    name = "fastfilm._CUDA"
    before = {k: sys.modules.pop(k, None) for k in (name, "fastfilm.ops.cuda")}
    sys.modules[name] = module
    attribute = fastfilm.__dict__.get("_CUDA")
    fastfilm._CUDA = module  # type: ignore[attr-defined]
    try:
        yield importlib.import_module("fastfilm.ops.cuda")
    finally:
        del fastfilm._CUDA  # type: ignore[attr-defined]
        if attribute is not None:
            fastfilm._CUDA = attribute  # type: ignore[attr-defined]
        for k, v in before.items():
            sys.modules.pop(k, None)
            if v is not None:
                sys.modules[k] = v
