"""A copy of the sources with a build of its own, in which faults are planted and taken back."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.planted.fault import Fault

FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-w"]
CPU_FLAGS = [*FLAGS, "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-pthread"]
CUDA_FLAGS = [*FLAGS, "-DFASTFILM_EMULATED"]
SETS = {"avx512", "avx2", "baseline"}
"""Objects of which each has the kernels of one instruction set."""


class Stale(Exception):
    """A fault that cannot be planted: its text is gone or not alone, or what it makes does not compile."""


@dataclass(frozen=True)
class Outcome:
    """What pytest ended with: its exit code (None: the time was over), its output, and seconds."""

    code: int | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Extension:
    """A C++ extension: its sources, the folder of its objects, and the library that they make."""

    sources: tuple[str, ...]
    flags: tuple[str, ...]
    objects: Path
    library: Path


class Workshop:
    """A copy of ``root`` in ``folder``; its extensions are built once, and of a fault only what it changes.

    Args:
        like: a built workshop to take everything from.
        emulated: the CUDA kernels are built too, on the emulation.
    """

    def __init__(
        self, root: Path, folder: Path, like: Workshop | None = None, emulated: bool = True
    ) -> None:
        self.tree = folder / "tree"
        if like is None:
            copy_tree(root, self.tree)
        else:
            shutil.copytree(like.tree, self.tree, symlinks=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        cpu = sorted(p.name for p in (root / "csrc/cpu").glob("*.cpp"))
        cuda = sorted(p.relative_to(root).as_posix() for p in (root / "csrc/cuda").rglob("*.c*"))
        emulation = sorted(f"csrc/emulation/{p.name}" for p in root.glob("csrc/emulation/*.cpp"))
        self.cpu = Extension(
            ("csrc/bindings.cpp", *(f"csrc/cpu/{name}" for name in cpu)),
            tuple(CPU_FLAGS),
            self.tree / "build/planted/cpu",
            self.tree / f"fastfilm/ops/launchers/cpu/_C{suffix}",
        )
        self.cuda = Extension(
            (*cuda, *emulation),
            tuple(CUDA_FLAGS),
            self.tree / "build/planted/cuda",
            self.tree / "build/planted/_CUDA.so",
        )
        self.environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            # two texts of one length within one second would share their compiled form
            "PYTHONDONTWRITEBYTECODE": "1",
            "FASTFILM_EMULATED_LIBRARY": str(self.cuda.library),
        }
        self._server: subprocess.Popen[str] | None = None
        self.in_use = "" if like is None else like.in_use
        if like is None:
            for extension in (self.cpu, self.cuda) if emulated else (self.cpu,):
                self._build(extension, extension.sources, extension.objects)
            imported = "from fastfilm.ops.launchers.cpu import _C"
            self.in_use = self._python(f"{imported}; print(_C.instruction_set())")
            self._check_imports()

    def _python(self, code: str) -> str:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=self.tree, env=self.environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    def _check_imports(self) -> None:
        """The tests of this copy must import the package, the kernels and the extension of this copy."""
        code = "import fastfilm, fastfilm.kernels, fastfilm.ops.launchers.cpu._C as c"
        printed = "; ".join(f"print({m}.__file__)" for m in ("fastfilm", "fastfilm.kernels", "c"))
        found = self._python(f"{code}; {printed}")
        assert all(Path(f).is_relative_to(self.tree) for f in found.splitlines()), found

    def _build(self, extension: Extension, sources: tuple[str, ...], folder: Path) -> None:
        """Compiles ``sources`` into ``folder`` and links them with the other objects that are there."""
        import pybind11

        folder.mkdir(parents=True, exist_ok=True)
        compiler = shutil.which("c++") or "g++"
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

        def compiled(source: str) -> None:
            out = folder / f"{Path(source).stem}.o"
            command = [compiler, *extension.flags, *includes, "-MMD", "-x", "c++", "-c", source]
            self._compile([*command, "-o", str(out)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compiled, sources))
        objects = []
        for source in extension.sources:
            own = folder / f"{Path(source).stem}.o"
            objects.append(str(own if own.exists() else extension.objects / own.name))
        made = extension.library.with_suffix(".new")
        self._compile([compiler, "-shared", *extension.flags, *objects, "-o", str(made)])
        made.replace(extension.library)

    def _compile(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.tree, capture_output=True, text=True)
        if done.returncode != 0:
            raise Stale(f"does not compile: {done.stderr.strip()[:500]}")

    def _depending(self, extension: Extension, file: str) -> tuple[str, ...]:
        """The sources whose objects change with ``file``; of the instruction sets' the one in use."""
        found = []
        for source in extension.sources:
            stem = Path(source).stem
            read = (extension.objects / f"{stem}.d").read_text(encoding="utf-8").split()
            depends = any(os.path.normpath(r) == file for r in read)
            if depends and (stem not in SETS or stem == self.in_use):
                found.append(source)
        return tuple(found)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        """The copy with the fault inside the block."""
        path = self.tree / fault.file
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if text.count(fault.old) != 1:
            raise Stale(f"its text is there {text.count(fault.old)} times in {fault.file}")
        extension = None
        if fault.file.startswith("csrc/"):
            extension = self.cpu if "cuda" not in Path(fault.file).parts else self.cuda
        kept = folder = None
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        try:
            if extension is not None:
                kept, folder = extension.library.with_suffix(".kept"), self.tree / "build/changed"
                shutil.copy2(extension.library, kept)
                self._build(extension, self._depending(extension, fault.file), folder)
            yield
        finally:
            path.write_text(text, encoding="utf-8")
            if extension is not None and kept is not None and folder is not None:
                kept.replace(extension.library)
                shutil.rmtree(folder, ignore_errors=True)

    def test(self, tests: str, limit: float) -> Outcome:
        """Runs pytest in the copy, one process, up to the first failure."""
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.planted.server"],
                cwd=self.tree,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        server, log = self._server, self.tree.parent / "log"
        assert server.stdin is not None and server.stdout is not None
        arguments = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=short"]
        server.stdin.write(json.dumps([[*arguments, *shlex.split(tests)], str(log)]) + "\n")
        server.stdin.flush()
        fork, start = int(server.stdout.readline()), time.monotonic()
        timer = threading.Timer(limit, os.killpg, (fork, signal.SIGKILL))
        timer.start()
        code: int | None = int(server.stdout.readline())
        timer.cancel()
        seconds = time.monotonic() - start
        if code == -signal.SIGKILL and seconds >= limit:
            code = None
        return Outcome(code, log.read_text(encoding="utf-8", errors="replace"), seconds)

    def close(self) -> None:
        """Ends the process that runs the tests."""
        if self._server is not None:
            self._server.kill()
            self._server.communicate()


def copy_tree(root: Path, to: Path) -> None:
    """The files of a working tree that git tracks or does not ignore, as they are now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        source = root / name
        if source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / name)
    # installed, the kernels are a part of the package
    (to / "fastfilm/kernels").symlink_to("../kernels", target_is_directory=True)
