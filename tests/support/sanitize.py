"""Tests on the C++ extension built for AddressSanitizer and UBSan: ``python -m tests.support.sanitize``.

Arguments go to pytest; without any, ``TESTS`` run. ``FASTFILM_FUZZ_EXAMPLES`` and ``--hypothesis-seed`` choose the
draws of the fuzz test. The sanitizers give every tensor memory of its own with red zones around it, keep it aside
for a while when it is freed, and fill it with bytes 0xff, a NaN in each type, until it is written. The kernels run
on three threads, and split small maps.

As a pytest plugin (``-p tests.support.sanitize``) this file puts that build in the place of
``fastfilm.ops.launchers.cpu._C``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "FASTFILM_SANITIZED_LIBRARY"
"""Path of the sanitized extension: set for the process that runs the tests; if set before, nothing is built."""
COMPILER = os.environ.get("CXX") or "g++"
FLAGS = (
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-pthread", "-fopenmp", "-Wno-psabi"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
)
TESTS = (
    *("ops/test_fuzz", "cpu/test_kernels", "cpu/test_convolution", "cpu/test_winograd"),
    *("cpu/test_threads", "ops/test_maps", "ops/test_residual", "ops/test_coefficients"),
)


def build(folder: Path) -> Path:
    """The extension ``_C`` with sanitizers, as a file in ``folder``."""
    import pybind11

    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        command = [COMPILER, *FLAGS, *include, "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [ROOT / "csrc/bindings.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")]
        objects = list(pool.map(compiled, sources))
    library = folder / "_C.so"
    subprocess.run([COMPILER, "-shared", *FLAGS, *objects, "-o", str(library)], check=True)
    return library


def environment(library: Path) -> dict[str, str]:
    """Variables for a process whose ``fastfilm.ops.launchers.cpu._C`` is ``library``."""
    runtimes = [
        subprocess.check_output([COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return os.environ | {
        LIBRARY: str(library),
        "LD_PRELOAD": " ".join(runtimes),
        "PYTHONMALLOC": "malloc",
        # Python frees little before it ends; an allocation that fails returns null, as it does without sanitizers
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:malloc_fill_byte=255"
        ":max_malloc_fill_size=1073741824:free_fill_byte=255:max_free_fill_size=1073741824",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class _Finder(importlib.machinery.PathFinder):
    """Finds ``fastfilm.ops.launchers.cpu._C`` in the file of the sanitized build."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != "fastfilm.ops.launchers.cpu._C":
            return None
        loader = importlib.machinery.ExtensionFileLoader(name, os.environ[LIBRARY])
        return importlib.util.spec_from_loader(name, loader)


if os.environ.get(LIBRARY):
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


def pytest_collection_modifyitems() -> None:
    """Three threads for the kernels, and memory of its own for every map of the workspace."""
    import torch
    from torch import Tensor

    from fastfilm.ops import spec
    from fastfilm.ops.launchers.cpu import _C
    from fastfilm.ops.launchers.cpu import kernels as cpu

    assert _C.__file__ == os.environ[LIBRARY]

    def fresh(like: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, memory_format=spec.FORMATS[len(shape)])

    cpu.workspace = fresh
    torch.get_num_threads = lambda: 3
    _C.split_finely(True)


OVERREAD = """
import tests.support.sanitize, torch
from fastfilm.ops.launchers.cpu import _C
y, coef, v = torch.ones(8, 3), torch.ones(7, 3), torch.ones(9, 3)
_C.apply(y.data_ptr(), coef.data_ptr(), v.data_ptr(), 0, 0, 1, 8, 3, 1)
print("right")
_C.apply(y.data_ptr(), coef.data_ptr(), v.data_ptr(), 0, 0, 1, 9, 3, 1)
print("wrong")
"""


def main() -> int:
    library = os.environ.get(LIBRARY) or build(ROOT / "build/sanitized")
    # a kernel that reads one position more than the map has must be found
    probe = subprocess.run(
        [sys.executable, "-c", OVERREAD],
        env=environment(Path(library)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if probe.stdout != "right\n" or "heap-buffer-overflow" not in probe.stderr:
        print(probe.stdout, probe.stderr, "the sanitizers do not see an overread", file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    command += ["-p", "tests.support.sanitize"]
    command += sys.argv[1:] or [f"tests/{name}.py" for name in TESTS]
    return subprocess.run(command, env=environment(Path(library)), cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
