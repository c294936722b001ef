"""Builds fastfilm. The C++ extension is optional: without a compiler the rest still installs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = [
    "csrc/bindings.cpp",
    *(
        f"csrc/cpu/{name}.cpp"
        for name in (
            "coefficients",
            "convolution",
            "driver",
            "gather",
            "residual",
            "threads",
            "winograd",
            "baseline",
            "avx2",
            "avx512",
        )
    ),
]
DEPENDS = [
    "csrc/activations.h",
    "csrc/cpu/coefficients.h",
    "csrc/cpu/convolution.h",
    "csrc/cpu/driver.h",
    "csrc/cpu/gather.h",
    "csrc/cpu/kernels.h",
    "csrc/cpu/pages.h",
    "csrc/cpu/residual.h",
    "csrc/cpu/threads.h",
    "csrc/cpu/walk.h",
    "csrc/cpu/winograd.h",
    *(
        f"csrc/cpu/{name}.inc"
        for name in (
            "activation",
            "convolution",
            "gather",
            "kernels",
            "residual",
            "vector",
            "winograd",
        )
    ),
]
CUDA_KERNELS = [  # those that take longest to compile first
    f"csrc/cuda/{name}.cu"
    for name in (
        "dgrad",
        "fprop",
        "wgrad",
        "pointwise",
        "merge_partials",
        "pack",
    )
]
CUDA_SOURCES = ["csrc/cuda/bindings.cpp", "csrc/cuda/plan.cpp"]
CUDA_DEPENDS = [
    f"csrc/cuda/{name}.h"
    for name in (
        "../activations",
        "affine",
        "backward_epilogue",
        "calls",
        "coefficients",
        "convolve",
        "merge",
        "merge_partials",
        "multiply",
        "operands",
        "pack",
        "plan",
        "pointwise",
        "primitives",
        "slab",
        "types",
    )
]
CUDA_FLAGS = ["-std=c++17", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90a"
CPU, CUDA = "fastfilm.ops.launchers.cpu._C", "fastfilm.ops.launchers.cuda._CUDA"
PARTS = {CPU: "CPU", CUDA: "CUDA"}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
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


def switch(name: str, values: tuple[str, ...], default: str) -> str:
    """An environment variable; ValueError for a value that it cannot have."""
    value = os.environ.get(name) or default
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}")
    return value


def architectures() -> list[str]:
    """Targets of the CUDA kernels, such as 80 or 90a."""
    text = os.environ.get("FASTFILM_CUDA_ARCHS") or CUDA_ARCHS
    archs = [a.strip() for a in text.split(";") if a.strip()]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            raise ValueError(
                "FASTFILM_CUDA_ARCHS must list targets from 80 on with semicolons, such as"
                f" {CUDA_ARCHS}, got {text!r}"
            )
    return archs


def extensions() -> list[Extension]:
    """The C++ extension and the CUDA extension, unless FASTFILM_CPU=0 and FASTFILM_CUDA=0 leave them out."""
    found = []
    if switch("FASTFILM_CPU", ("0", "1"), "1") == "1":
        found.append(Extension(CPU, SOURCES, depends=DEPENDS, language="c++", optional=True))
    if switch("FASTFILM_CUDA", ("0", "1", "auto"), "auto") != "0":
        found.append(
            Extension(
                CUDA,
                CUDA_SOURCES,
                depends=[*CUDA_DEPENDS, *CUDA_KERNELS],
                language="c++",
                optional=os.environ.get("FASTFILM_CUDA") != "1",
            )
        )
    return found


def code_flags(archs: list[str]) -> list[str]:
    """nvcc's flags: machine code for each target, and PTX of the newest that later GPUs can compile."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    plain = [a for a in archs if a.isdigit()]
    if plain:
        newest = max(plain, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def object_key(source: str, archs: list[str], release: str) -> str:
    """What the object of a .cu file depends on: sources, headers, flags, targets and the compiler's release."""
    digest = hashlib.sha256(repr((CUDA_FLAGS, code_flags(archs), release)).encode())
    for path in (source, *CUDA_DEPENDS):
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


class BuildExt(build_ext):
    """Compiles what this machine can compile, and says in one line what was left out and why."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.parallel is None and (os.cpu_count() or 1) > 1:
            self.parallel = len(PARTS)  # at once, as their compilers run one file after another

    def run(self) -> None:
        self._left_out: dict[str, str] = {}
        asked = [PARTS[ext.name] for ext in self.extensions]
        super().run()
        if self._left_out:
            built = [part for part in asked if part not in self._left_out] or ["Python"]
            reasons = "; ".join(dict.fromkeys(self._left_out.values()))
            print(f"fastfilm: only the {built[0]} part is built: {reasons}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            ext.include_dirs = [pybind11.get_include()]
            self._set_flags(ext)
            if ext.name == CUDA:
                self._compile_kernels(ext)
            super().build_extension(ext)
        except ImportError:
            self._leave_out(ext, "pybind11 is not installed")
        except Exception as error:  # whatever the compiler does, the rest must install
            self._leave_out(ext, " ".join(str(error).split()))

    def _compile_kernels(self, ext: Extension) -> None:
        """Compiles each .cu file whose object is not there yet, with nvcc."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise RuntimeError("nvcc not found")
        archs = architectures()
        # nvcc may be a link or a script: the toolkit is where it says its libraries are
        asked = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
        dry = subprocess.run(asked, capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        library = next(
            (
                str(path)
                for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
                if top and (path := Path(top[1], folder, "libcudart_static.a")).exists()
            ),
            None,
        )
        if library is None:
            raise RuntimeError("the CUDA toolkit has no libcudart_static.a")
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
        release = re.search(r"release ([\d.]+)", said.stdout)
        folder = Path(os.environ.get("FASTFILM_CUDA_OBJECTS") or Path(self.build_temp, "cuda"))
        folder.mkdir(parents=True, exist_ok=True)

        def compiled(source: str) -> str:
            key = object_key(source, archs, release[1] if release else "")
            out = folder / f"{Path(source).stem}-{key}.o"
            if not out.exists():
                for old in folder.glob(f"{Path(source).stem}-*"):
                    old.unlink()
                partial = out.with_suffix(".part")  # an interrupted compiler leaves no object
                command = [nvcc, *CUDA_FLAGS, *code_flags(archs), "-c", source, "-o", str(partial)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    print(done.stdout, done.stderr, file=sys.stderr)
                    reason = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
                    raise RuntimeError(f"nvcc failed on {source}: {reason[0]}")
                partial.replace(out)
            return str(out)

        with ThreadPoolExecutor(min(len(CUDA_KERNELS), os.cpu_count() or 1)) as pool:
            ext.extra_objects = [*pool.map(compiled, CUDA_KERNELS), library]
        ext.libraries = ["dl", "rt", "pthread"]
        ext.define_macros = [("FASTFILM_CUDA_ARCHS", '"' + ";".join(archs) + '"')]

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
        if ext.name == CUDA:
            return
        ext.extra_compile_args.append("-pthread")
        ext.extra_link_args = ["-pthread"]
        # not for its threads: it knows to which processors it has bound PyTorch's
        openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"
        if self._compile(compiler, ["-fopenmp"], openmp) is None:
            ext.extra_compile_args.append("-fopenmp")
            ext.extra_link_args.append("-fopenmp")

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

    def _leave_out(self, ext: Extension, reason: str) -> None:
        part = PARTS[ext.name]
        if not ext.optional:
            raise RuntimeError(f"FASTFILM_{part}=1, but the {part} part was not built: {reason}")
        self._left_out[part] = reason


setup(
    version=version(),
    # kernels/ is installed as fastfilm.kernels and must never be importable by its own name
    packages=[*find_packages(include=["fastfilm", "fastfilm.*"]), "fastfilm.kernels"],
    package_dir={"fastfilm": "fastfilm", "fastfilm.kernels": "kernels"},
    package_data={
        "fastfilm": ["py.typed"],
        "fastfilm.ops.launchers": ["*/*.pyi"],
        "fastfilm.ops.settings": ["tuned/*.json"],
        "fastfilm.tuning": ["*.json"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
