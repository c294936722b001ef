"""Builds the CUDA kernels for the host, where ``csrc/emulation`` stands in for the GPU."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import importlib.machinery
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.ops import spec
from tests.yardstick import relative_error

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
    # what was compiled now comes first: of a function that several files have, the linker takes the first
    made.sort(key=lambda o: Path(o).parent != folder)
    library = folder / "_CUDA.so"
    link = [str(compiler()), "-shared", *flags, *made, "-o", str(library)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    return library


_numbers = itertools.count()


@functools.cache
def load(library: Path) -> ModuleType:
    """The extension module in a file."""
    # pybind11 hands out one module a name
    name = f"emulated_{next(_numbers)}._CUDA"
    loader = importlib.machinery.ExtensionFileLoader(name, str(library))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    assert module.__file__ == str(library)
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


LIBRARY = "FASTFILM_EMULATED_LIBRARY"
"""Set in the process that runs these tests under the sanitizers."""

ORDERS = [pytest.param(0, id="in_order"), pytest.param(7, id="shuffled")]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "emulated"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain build, made by the first worker that needs it."""
    if os.environ.get(LIBRARY):
        return Path(os.environ[LIBRARY])
    folder = build_folder(tmp_path_factory) / "plain"
    with alone(folder):
        done = folder / "_CUDA.so"
        return done if done.exists() else build(folder)


@pytest.fixture(scope="module")
def extension(library: Path) -> ModuleType:
    return load(library)


@pytest.fixture(params=ORDERS)
def cuda(extension: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The launchers, on the emulation."""
    extension.set_seed(request.param)
    with installed(extension) as launchers:
        yield launchers
    extension.set_seed(0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; a feature map is channels-last."""
    t = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return spec.channels_last(t) if len(shape) > 3 else t


def gradients(
    f: Callable[..., Tensor], arguments: tuple[Tensor, ...], outer: Tensor
) -> list[Tensor]:
    """Float64 gradients of ``f`` at its arguments."""
    wide = [t.double().requires_grad_() for t in arguments]
    grads = torch.autograd.grad(
        f(*wide), wide, outer.double(), allow_unused=True, materialize_grads=True
    )
    return list(grads)


def close(value: Tensor, exact: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    assert torch.isfinite(value).all(), "an element that nothing wrote"
    error = relative_error(value, exact)
    assert error <= times * TOLERANCE[dtype], f"relative error {error:.2e}"
