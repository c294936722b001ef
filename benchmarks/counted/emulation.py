"""The CUDA kernels on the host: built from csrc with a C++ compiler, ``csrc/emulation`` standing in for the GPU.

For counts (which kernels run, what they move) and for tests; nothing here says anything about time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import itertools
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from fastfilm.ops import choice, launchers
from fastfilm.ops.block import recipe

ROOT = Path(__file__).resolve().parents[2]
KERNELS = tuple(
    sorted(p.relative_to(ROOT / "csrc/cuda").as_posix() for p in (ROOT / "csrc/cuda").rglob("*.cu"))
)
"""Of ``csrc/cuda`` and its folders; no two have the same stem."""
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
    sources += sorted((csrc / "cuda").rglob("*.cpp"))
    sources += sorted((csrc / "emulation").glob("*.cpp"))
    sources = [s for s in sources if s.exists()]

    def compiled(source: Path) -> Path:
        if source.stem in have:
            return have[source.stem]
        out = folder / f"{source.stem}.o"
        # products are most of the time of the emulation
        fast = ("-O3",) if source.parent.name == "emulation" else ()
        kept = [*FLAGS, *flags, *fast, *_includes()]
        command = [str(compiler()), *kept, "-x", "c++", "-c", str(source)]
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


ROOM = "fastfilm.ops.launchers.cuda"
MODULES = (
    f"{ROOM}._CUDA",
    f"{ROOM}.arguments",
    f"{ROOM}.convolution",
    f"{ROOM}.kernels",
    f"{ROOM}.passes",
    f"{ROOM}.plans",
)
"""The CUDA extension, and the modules that hold something of it."""


def _taken(name: str) -> ModuleType | None:
    """A module, taken out of the loaded ones; its package holds it too, and an import looks there first."""
    package, _, own = name.rpartition(".")
    vars(importlib.import_module(package)).pop(own, None)
    return sys.modules.pop(name, None)


def _put(name: str, module: ModuleType) -> None:
    package, _, own = name.rpartition(".")
    sys.modules[name] = module
    setattr(importlib.import_module(package), own, module)


@contextlib.contextmanager
def installed(module: ModuleType) -> Iterator[ModuleType]:
    """The backend ``cuda`` on top of an emulated extension."""
    before = {name: _taken(name) for name in MODULES}
    _put(MODULES[0], module)
    try:
        yield importlib.import_module(f"{ROOM}.kernels")
    finally:
        for name, own in before.items():
            _taken(name)
            if own is not None:
                _put(name, own)


@contextlib.contextmanager
def serving(module: ModuleType) -> Iterator[ModuleType]:
    """The backend ``cuda`` on CPU tensors, by an emulated extension."""
    own = choice.BACKENDS["cuda"]
    here = replace(own, devices=("cpu", "cuda"), unavailable=lambda: None)
    with installed(module) as kernels, launchers.replaced({"cuda": kernels}):
        choice.BACKENDS["cuda"] = here
        choice.forget()
        recipe.forget()
        try:
            yield kernels
        finally:
            choice.BACKENDS["cuda"] = own
            choice.forget()
            recipe.forget()


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
