"""Builds fastfilm. The C++ extension is optional: without a compiler the rest still installs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

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
CUDA_KERNELS = [  # those that take longest to compile first
    f"csrc/cuda/{name}.cu"
    for name in (
        "dgrad",
        "fprop",
        "wgrad",
        "sm90/weight",
        "sm90/forward",
        "sm90/backward",
        "pointwise",
        "merge_partials",
        "pack",
    )
]
CUDA_SOURCES = [
    f"csrc/cuda/{name}.cpp" for name in ("bindings", "plan", "sm90/layout", "sm90/weight_layout")
]
CUDA_FLAGS = ["-std=c++17", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden"]
CUDA_ARCHS = "80;90a"
"""Targets where FASTFILM_CUDA_ARCHS is not set and no GPU is there."""
CPU, CUDA = "fastfilm.ops.launchers.cpu._C", "fastfilm.ops.launchers.cuda._CUDA"
PARTS = {CPU: "CPU", CUDA: "CUDA"}
RECORD = "fastfilm/ops/launchers/build.json"
"""What the last build made, in how long, and why something is missing."""
EVERY = 60.0
"""Seconds between two lines on a build's progress."""
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


def find_nvcc() -> tuple[str, str]:
    """nvcc and where it was found: CUDA_HOME or CUDA_PATH, the path, or NVIDIA's packages for pip.

    Raises:
        RuntimeError: there is none.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(name)
        if home and (nvcc := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return nvcc, name
    if nvcc := shutil.which("nvcc"):
        return nvcc, "PATH"
    # under pip's build isolation sys.path lacks the environment that is installed into, sysconfig does not
    for site in dict.fromkeys((sysconfig.get_path("purelib"), *sys.path)):
        for found in sorted(Path(site or ".").glob("nvidia/cu*/bin/nvcc"), reverse=True):
            return str(found), "the package nvidia-cuda-nvcc"
    raise RuntimeError("nvcc not found in CUDA_HOME, PATH or the package nvidia-cuda-nvcc")


def output(*command: str) -> str:
    """What a program prints, standard output first; nothing if it cannot be started."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def architectures(nvcc: str) -> tuple[list[str], str]:
    """Targets of the CUDA kernels, such as 80 or 90a, and by what they were chosen.

    FASTFILM_CUDA_ARCHS decides, else the GPUs of this machine, else CUDA_ARCHS.
    """
    text = os.environ.get("FASTFILM_CUDA_ARCHS")
    if text:
        archs = [a.strip() for a in text.split(";") if a.strip()]
        for arch in archs:
            if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
                raise ValueError(
                    "FASTFILM_CUDA_ARCHS must list targets from 80 on with semicolons, such as"
                    f" {CUDA_ARCHS}, got {text!r}"
                )
        return archs, "FASTFILM_CUDA_ARCHS"
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    found = sorted({int(a + b) for a, b in re.findall(r"(?m)^(\d+)\.(\d)$", output(*query))})
    if not found:
        return CUDA_ARCHS.split(";"), "the default without a GPU"
    names = ", ".join(f"sm_{c}" for c in found)
    if found[-1] < 80:
        raise RuntimeError(f"the kernels need a GPU from sm_80 on, this machine has {names}")
    known = {int(c) for c in re.findall(r"sm_(\d+)", output(nvcc, "--list-gpu-code"))}
    served = [c for c in found if c >= 80]
    if not known.issuperset(served):  # PTX of the default serves them
        return CUDA_ARCHS.split(";"), f"the default, as this nvcc does not know all of {names}"
    return ["90a" if c == 90 else str(c) for c in served], f"this machine's GPUs ({names})"


def extensions() -> list[Extension]:
    """The C++ extension and the CUDA extension; BuildExt leaves out what is not wanted or cannot be built."""
    switch("FASTFILM_CPU", ("0", "1"), "1")
    cuda = switch("FASTFILM_CUDA", ("0", "1", "auto"), "auto")
    return [
        Extension(CPU, SOURCES, language="c++", optional=True),
        Extension(CUDA, CUDA_SOURCES, language="c++", optional=cuda != "1"),
    ]


def jobs() -> int:
    """Compilers that may run at once: MAX_JOBS, else the cores that this process may use."""
    text = os.environ.get("MAX_JOBS")
    if not text:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity else os.cpu_count() or 1
    if not re.fullmatch(r"[1-9]\d*", text):
        raise ValueError(f"MAX_JOBS must be a positive number, got {text!r}")
    return int(text)


def code_flags(archs: list[str]) -> list[str]:
    """nvcc's flags: machine code for each target, and PTX of the newest that later GPUs can compile."""
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    plain = [a for a in archs if a.isdigit()]
    if plain:
        newest = max(plain, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def included(source: Path) -> dict[Path, bytes]:
    """The source and all files of ours that it includes, directly or through others, with their contents."""
    found: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop().resolve()
        if path not in found and path.exists():
            found[path] = path.read_bytes()
            names = re.findall(rb'^\s*#\s*include\s+"([^"]+)"', found[path], re.MULTILINE)
            waiting += [path.parent / name.decode() for name in names]
    return found


def object_key(source: str, *others: object) -> str:
    """A hash of all that an object depends on: its source, what that includes, and ``others`` such as flags."""
    digest = hashlib.sha256(repr(others).encode())
    for _, content in sorted(included(ROOT / source).items()):
        digest.update(content)
    return digest.hexdigest()[:16]


def say(line: str) -> None:
    """A line for the person who waits.

    pip keeps what a build prints to itself unless the build fails or pip has -v, so the line also goes to the
    terminal, where this process is in its foreground.
    """
    print(f"fastfilm: {line}", file=sys.stderr, flush=True)
    if sys.stderr.isatty() or not hasattr(os, "tcgetpgrp"):
        return
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        if os.tcgetpgrp(terminal.fileno()) == os.getpgrp():
            terminal.write(f"\nfastfilm: {line}\n")


@dataclass
class Part:
    """One extension on its way: the commands that make its objects, and what the record says of it."""

    ext: Extension
    commands: dict[Path, list[str]] = field(default_factory=dict)
    """Compiler and flags for each object, without ``-o``."""
    extra: list[str] = field(default_factory=list)
    """Libraries to link behind the objects."""
    record: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None
    started: float = 0.0
    ended: float = 0.0

    @property
    def name(self) -> str:
        return PARTS[self.ext.name]

    def compile(self, out: Path) -> None:
        """Makes one object; after a failure the others are not begun."""
        if self.failure is not None:
            return
        self.started = self.started or time.monotonic()
        partial = out.with_suffix(
            f".{os.getpid()}.part"
        )  # an interrupted compiler leaves no object
        command = [*self.commands[out], "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.ended = time.monotonic()
        if done.returncode != 0:
            print(done.stdout, done.stderr, file=sys.stderr)
            reason = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
            compiler, source = Path(command[0]).name, command[-3]
            self.failure = f"{compiler} failed on {source}: {reason[0]}"
            partial.unlink(missing_ok=True)
            return
        for old in out.parent.glob(f"{out.name.rpartition('-')[0]}-*.o"):
            old.unlink(missing_ok=True)
        partial.replace(out)


class BuildExt(build_ext):
    """Compiles what this machine can compile, on all cores, and records what was left out and why.

    An object is compiled again only if its key has changed, so a build after no change only links.
    """

    def finalize_options(self) -> None:
        super().finalize_options()
        self._editable = bool(self.inplace)  # run() changes it

    def run(self) -> None:
        started = time.monotonic()
        self._record: dict[str, Any] = {}
        super().run()
        left_out = {p: r["reason"] for p, r in self._record.items() if not r["built"]}
        told = {p: why for p, why in left_out.items() if why != f"FASTFILM_{p}=0"}
        if told:
            built = [part for part in PARTS.values() if part not in left_out] or ["Python"]
            say(f"only the {built[0]} part is built: {'; '.join(dict.fromkeys(told.values()))}")
        self._write_record(time.monotonic() - started)

    def build_extensions(self) -> None:
        self.check_extensions_list(self.extensions)
        self._jobs = self.parallel or jobs()
        parts = [Part(ext) for ext in self.extensions]
        for part in parts:
            try:
                self._plan(part)
            except ImportError:
                part.failure = "pybind11 is not installed"
            except Exception as error:  # whatever the compiler does, the rest must install
                part.failure = " ".join(str(error).split())
            self._stop_if_needed(part)
        self._compile_all(parts)
        self.force = (
            True  # links: the objects may be older than an extension that was built from other ones
        )
        for part in parts:
            self._stop_if_needed(part)
            if part.failure is None:
                self._link(part)
            reason = {} if part.failure is None else {"reason": part.failure}
            self._record[part.name] = {"built": part.failure is None, **reason, **part.record}

    def _plan(self, part: Part) -> None:
        """Which objects the part has, and how each that is not there yet is compiled."""
        if os.environ.get(f"FASTFILM_{part.name}") == "0":
            part.failure = f"FASTFILM_{part.name}=0"
            return
        import pybind11

        compiler, flags = self._host(part)
        if part.name == "CUDA":
            flags = [*flags, *self._plan_kernels(part)]
        identity = output(*compiler, "--version").partition("\n")[0]
        part.record["compiler"] = identity or Path(compiler[0]).name
        include = [
            f"-I{folder}" for folder in (pybind11.get_include(), *self.compiler.include_dirs)
        ]
        # the folder of an isolated build's pybind11 has another name each time
        known = (identity, compiler, flags, sysconfig.get_config_var("SOABI"), pybind11.__version__)
        for source in part.ext.sources:
            out = self._object(self._folder(), source, object_key(source, *known))
            part.commands[out] = [*compiler, *include, *flags, "-c", source]

    def _host(self, part: Part) -> tuple[list[str], list[str]]:
        """The C++ compiler as setuptools calls it, and the flags of a part's C++ files."""
        if self.compiler.compiler_type == "msvc":
            raise RuntimeError("it needs GCC or Clang")
        compiler = getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so
        reason = self._probe(compiler, ["-std=c++17"], "int main() { return 0; }")
        if reason is not None:
            raise RuntimeError(f"no working C++17 compiler: {reason}")
        if part.name == "CUDA":
            return compiler, FLAGS
        part.ext.extra_link_args = ["-pthread"]
        # not for its threads: it knows to which processors it has bound PyTorch's
        openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() == 0; }"
        part.record["OpenMP"] = self._probe(compiler, ["-fopenmp"], openmp) is None
        if not part.record["OpenMP"]:
            return compiler, [*FLAGS, "-pthread"]
        part.ext.extra_link_args.append("-fopenmp")
        return compiler, [*FLAGS, "-pthread", "-fopenmp"]

    def _plan_kernels(self, part: Part) -> list[str]:
        """nvcc's objects; returns flags that the part's C++ files need too."""
        nvcc, where = find_nvcc()
        archs, chosen = architectures(nvcc)
        # nvcc may be a link or a script: the toolkit is where it says its libraries are
        dry = output(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
        folders = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
        libraries = [Path(top[1], folder, "libcudart_static.a") for folder in folders if top]
        library = next((path for path in libraries if path.exists()), None)
        if library is None:
            raise RuntimeError(
                f"the CUDA toolkit of {nvcc} has no libcudart_static.a (of pip's packages:"
                " nvidia-cuda-runtime)"
            )
        found = re.search(r"release ([\d.]+)", output(nvcc, "--version"))
        release = found[1] if found else ""
        kept = os.environ.get("FASTFILM_CUDA_OBJECTS")
        folder = Path(kept) if kept else self._folder()
        flags = [*CUDA_FLAGS, *code_flags(archs)]
        # where there are more cores than files, the targets of one file are compiled side by side
        threads = f"--threads={max(1, self._jobs // len(CUDA_KERNELS))}"
        for source in CUDA_KERNELS:
            out = self._object(folder, source, object_key(source, flags, release))
            part.commands[out] = [nvcc, threads, *flags, "-c", source]
        part.extra = [str(library)]
        part.ext.libraries = ["dl", "rt", "pthread"]
        part.record |= {"archs": archs, "archs by": chosen, "nvcc": release, "nvcc by": where}
        return [f'-DFASTFILM_CUDA_ARCHS="{";".join(archs)}"']

    def _folder(self) -> Path:
        """Where objects stay from one build to the next; pip gives an editable build a new folder each time."""
        return (ROOT / "build" if self._editable else Path(self.build_temp)) / "objects"

    @staticmethod
    def _object(folder: Path, source: str, key: str) -> Path:
        part, name = Path(source).parts[-2:]
        return folder / f"{part}-{name.replace('.', '-')}-{key}.o"

    def _compile_all(self, parts: list[Part]) -> None:
        """Compiles on all cores what is not there yet, slowest first, and says once a minute how far it is."""
        todo: list[tuple[Part, Path]] = []
        for part in sorted(parts, key=lambda part: part.name != "CUDA"):
            missing = [out for out in part.commands if not out.exists()] if not part.failure else []
            part.record |= {"compiled": len(missing), "reused": len(part.commands) - len(missing)}
            todo += [(part, out) for out in missing]
        for folder in {out.parent for _, out in todo}:
            folder.mkdir(parents=True, exist_ok=True)
        kernels = sum(out.name.rpartition("-")[0].endswith("-cu") for _, out in todo)
        if kernels:
            names = next(part.record for part in parts if part.name == "CUDA")["archs"]
            say(
                f"compiling {kernels} CUDA files for {', '.join(f'sm_{a}' for a in names)} on"
                f" {self._jobs} cores, which takes minutes (FASTFILM_CUDA=0 leaves them out)"
            )
        started = time.monotonic()
        with ThreadPoolExecutor(self._jobs) as pool:
            waiting = {pool.submit(part.compile, out) for part, out in todo}
            while waiting := wait(waiting, timeout=EVERY).not_done:
                minutes = (time.monotonic() - started) / 60
                done = len(todo) - len(waiting)
                say(f"{done} of {len(todo)} files compiled after {minutes:.0f} min")
        for part in parts:
            part.record["seconds"] = round(part.ended - part.started, 1)

    def _link(self, part: Part) -> None:
        part.ext.extra_objects = [*map(str, part.commands), *part.extra]
        part.ext.sources = []
        try:
            self.build_extension(part.ext)
        except Exception as error:
            part.failure = " ".join(str(error).split())

    @staticmethod
    def _probe(compiler: list[str], flags: list[str], source: str) -> str | None:
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

    def _stop_if_needed(self, part: Part) -> None:
        if part.failure is not None and not part.ext.optional:
            raise RuntimeError(
                f"FASTFILM_{part.name}=1, but the {part.name} part was not built: {part.failure}"
            )

    def _write_record(self, seconds: float) -> None:
        """Leaves what was built beside the extensions, for ``fastfilm info``; removes what earlier builds left."""
        for ext in self.extensions:
            if not self._record[PARTS[ext.name]]["built"]:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        path = self._record_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"when": when, "seconds": round(seconds, 1), "cores": self._jobs, **self._record}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _record_path(self) -> Path:
        return (ROOT if self._editable else Path(self.build_lib)) / RECORD

    def copy_extensions_to_source(self) -> None:
        every = self.extensions
        self.extensions = [e for e in every if self._record[PARTS[e.name]]["built"]]
        super().copy_extensions_to_source()
        self.extensions = every

    def get_outputs(self) -> list[str]:
        outputs = [*super().get_outputs(), *([] if self._editable else [str(self._record_path())])]
        return [path for path in outputs if Path(path).exists()]


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
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
