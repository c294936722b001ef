"""Builds fastfilm. The C++ extension is optional: without a compiler the rest still installs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/bindings.cpp",
    *(
        f"csrc/cpu/{name}.cpp"
        for name in ("coefficients", "driver", "gather", "residual", "baseline", "avx2", "avx512")
    ),
]
DEPENDS = [
    "csrc/cpu/coefficients.h",
    "csrc/cpu/driver.h",
    "csrc/cpu/gather.h",
    "csrc/cpu/kernels.h",
    "csrc/cpu/residual.h",
    "csrc/cpu/walk.h",
    *(f"csrc/cpu/{name}.inc" for name in ("activation", "gather", "kernels", "residual", "vector")),
]
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]


def version() -> str:
    """``__version__`` of the package, without importing it."""
    text = (ROOT / "fastfilm" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise RuntimeError("fastfilm/__init__.py has no __version__")
    return found.group(1)


def extensions() -> list[Extension]:
    """The C++ extension, unless FASTFILM_CPU=0 leaves it out."""
    wanted = os.environ.get("FASTFILM_CPU") or "1"
    if wanted not in ("0", "1"):
        raise ValueError(f"FASTFILM_CPU must be one of 0, 1, got {wanted!r}")
    if wanted == "0":
        return []
    return [Extension("fastfilm._C", SOURCES, depends=DEPENDS, language="c++", optional=True)]


class BuildExt(build_ext):
    """Compiles what this machine can compile, and says in one line what was left out and why."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            ext.include_dirs = [pybind11.get_include()]
            self._set_flags(ext)
            super().build_extension(ext)
        except ImportError:
            self._left_out("pybind11 is not installed")
        except Exception as error:  # whatever the compiler does, the rest must install
            self._left_out(" ".join(str(error).split()))

    def copy_extensions_to_source(self) -> None:
        self.extensions = [e for e in self.extensions if Path(self._built(e)).exists()]
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def _built(self, ext: Extension) -> str:
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def _set_flags(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("it needs GCC or Clang")
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        reason = self._compile(compiler, ["-std=c++17"], "int main() { return 0; }")
        if reason is not None:
            raise RuntimeError(f"no working C++17 compiler: {reason}")
        ext.extra_compile_args = [*FLAGS]
        openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"
        if self._compile(compiler, ["-fopenmp"], openmp) is None:
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args = ["-fopenmp"]

    @staticmethod
    def _compile(compiler: list[str], flags: list[str], source: str) -> str | None:
        """None if ``source`` compiles, else why not."""
        if shutil.which(compiler[0]) is None:
            return f"{compiler[0]} not found"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "probe.cpp"
            file.write_text(source, encoding="utf-8")
            command = [*compiler, *flags, "-c", str(file), "-o", str(file.with_suffix(".o"))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]

    @staticmethod
    def _left_out(reason: str) -> None:
        print(f"fastfilm: the CPU extension was not built: {reason}", file=sys.stderr)


setup(
    version=version(),
    # kernels/ is installed as fastfilm.kernels and must never be importable by its own name
    packages=[*find_packages(include=["fastfilm", "fastfilm.*"]), "fastfilm.kernels"],
    package_dir={"fastfilm": "fastfilm", "fastfilm.kernels": "kernels"},
    package_data={"fastfilm": ["py.typed", "*.pyi"], "fastfilm.ops": ["tuned/*.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
