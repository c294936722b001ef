"""Triton binaries made without a GPU, and the check that they fit the machine on which they are to serve.

    python -m benchmarks.campaign.binaries make FOLDER [--minutes M] [--only proof,networks,layers,check]
    python -m benchmarks.campaign.binaries check FOLDER
    python -m benchmarks.campaign.binaries install FOLDER CACHE [--minutes M] [--only networks,layers]

Triton compiles a kernel at its first launch, once for every specialisation: types, constants, and which numbers
are 1 or multiples of 16. ``make`` calls networks and layers with every launch noted and none carried out, and has
Triton compile for sm_90 what was noted. FOLDER then holds ``entries.tar.xz``, entries of Triton's cache (machine
code, its description, launchers in C), and ``manifest.json``, all that the entries' keys are made of. Under a key
that differs in anything Triton finds nothing and compiles. ``check`` says which value differs, and ``install``
compiles the workloads of ``--only`` into the cache then, on all cores at once.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib
import json
import os
import resource
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from ..counted.unlaunched import kernel_sources, target, unlaunched

MANIFEST, ENTRIES = "manifest.json", "entries.tar.xz"
ROOT = Path(__file__).resolve().parents[2]


class Wanted(NamedTuple):
    """A specialisation of a kernel, as the arguments of Triton's compiler."""

    module: str
    kernel: str
    types: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]

    def source(self) -> Any:
        """What Triton compiles."""
        from triton.compiler import ASTSource

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(kernel, self.types, self.constants, self.attributes)


def _folder_of(key: str) -> str:
    """Name of the folder in which Triton's cache holds the entry of a key (SHA-256 in hexadecimal)."""
    return base64.b32encode(bytes.fromhex(key)).decode().rstrip("=")


def _key(source: Any, target: Any, options: dict[str, Any]) -> str:
    """The entry in which Triton's cache holds what ``triton.compile`` makes of the arguments."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options))
    text = get_cache_key(source, backend, parsed, get_cache_invalidating_env_vars())
    return _folder_of(hashlib.sha256(text.encode()).hexdigest())


@contextlib.contextmanager
def noted() -> Iterator[dict[str, Wanted]]:
    """What Triton would look for in the block, by entry; nothing is compiled."""
    found: dict[str, Wanted] = {}

    def note(source: Any, target: Any, options: dict[str, Any], **rest: Any) -> object:
        fn, given = source.fn, (source.signature, source.constants, source.attrs)
        wanted = Wanted(fn.module, fn.__name__, *given, dict(options))
        found.setdefault(_key(source, target, options), wanted)
        return object()

    with unlaunched(), patch("triton.compiler.compile", note):
        yield found


def _values() -> dict[str, Any]:
    """All that enters the keys of Triton's cache beside a launch's own specialisation, on this machine."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import triton_key

    backend = make_backend(target())
    return {
        "python": sysconfig.get_python_version(),
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas and architecture": backend.hash(),
        "default options": backend.parse_options({}).hash(),
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
        "kernels": {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in kernel_sources()},
    }


def _facts() -> dict[str, Any]:
    """This machine's values, and the entries that the workload "proof" would look for."""
    from .workloads import WORKLOADS

    with noted() as found:
        for call in WORKLOADS["proof"]():
            call()
    return {"values": _values(), "proof": {key: w.kernel for key, w in found.items()}}


def _toolchain(folder: Path) -> dict[str, str]:
    """Environment in which Triton builds its C parts for a machine with a GPU's driver, where none is.

    The libcuda.so.1 to link with is empty. So the linker is to note that it is needed, though no symbol says so.
    """
    stub, cc = folder / "libcuda.so.1", folder / "cc"
    command = ["-shared", f"-Wl,-soname,{stub.name}", "-xc", "/dev/null", "-o", str(stub)]
    subprocess.run(["gcc", *command], check=True)
    cc.write_text('#!/bin/sh\nexec gcc -Wl,--no-as-needed "$@"\n')
    cc.chmod(0o755)
    return {"CC": str(cc), "TRITON_LIBCUDA_PATH": str(folder)}


def _compile(key: str, wanted: Wanted, deadline: float) -> str:
    """Compiles into the folder TRITON_CACHE_DIR; says so where that failed or it is too late."""
    import triton
    from triton.backends.nvidia import driver

    if time.time() > deadline:
        return f"{wanted.kernel}: no time left"
    source = wanted.source()
    try:
        made = triton.compile(source, target=target(), options=wanted.options)
    except Exception as error:  # whatever the compiler raises, the other kernels are made
        return f"{wanted.kernel}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if _folder_of(made.hash) != key:
        return f"{wanted.kernel}: compiled under another key than it was noted with"
    # the C parts are built without a driver to load them; before Triton 3.7 each signature has a launcher
    with patch("triton.runtime.build._load_module_from_path"):
        driver.CudaUtils()
        if hasattr(driver, "make_launcher"):
            driver.CudaLauncher(source, made.metadata)
    return ""


def _wanted(only: Iterable[str], say: Callable[[str], None]) -> dict[str, Wanted]:
    """What the workloads of these names launch, those named first in front."""
    from ..counted.hollow import hollow
    from .workloads import WORKLOADS

    began = time.monotonic()
    with noted() as found, hollow():
        for name in only:
            before = len(found)
            for call in WORKLOADS[name]():
                call()
            say(f"{name}: {len(found) - before} specialisations, {time.monotonic() - began:.0f} s")
    return found


def _compile_all(
    found: dict[str, Wanted], environment: dict[str, str], deadline: float
) -> list[str]:
    """Compiles in processes with ``environment``; what could not be compiled, and why."""
    workers = min(os.cpu_count() or 1, 1 + len(found) // 16)
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    with patch.dict(os.environ, environment), pool:
        jobs = [pool.submit(_compile, *item, deadline) for item in found.items()]
        return [fault for job in jobs if (fault := job.result())]


def make(
    folder: Path,
    minutes: float = 60.0,
    only: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fills ``folder`` and returns its manifest, in a process in which Triton has launched nothing yet.

    Args:
        minutes: no kernel is begun after them; those of the first workloads come first.
        only: of ``workloads.WORKLOADS``; all without it.
    """
    from .workloads import WORKLOADS

    began, deadline = time.monotonic(), time.time() + 60 * minutes
    found = _wanted(dict.fromkeys(["proof", *(only or WORKLOADS)]), say)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        given = {"TRITON_CACHE_DIR": f"{work}/cache", **_toolchain(Path(work))}
        faults = _compile_all(found, given, deadline)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        packed = _pack(Path(work) / "cache", folder / ENTRIES)
    manifest = {
        "values": _values(),
        "entries": {key: w.kernel for key, w in found.items() if key in packed},
        "faults": faults,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    spent = f"{time.monotonic() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} CPU s"
    size = (folder / ENTRIES).stat().st_size / 2**20
    say(f"{len(manifest['entries'])} binaries, {spent}, {size:.1f} MiB, {len(faults)} faults")
    return manifest


def prepare_cache(folder: Path, cache: Path, minutes: float, only: Iterable[str]) -> str:
    """Installs the binaries of ``folder`` if they fit, else compiles workloads on all cores; says which it was."""
    there = (folder / MANIFEST).exists()
    reason = check(folder) if there else "none were made beforehand"
    if reason is None:
        return f"{install(folder, cache)} binaries made beforehand are used"
    deadline = time.time() + 60 * minutes
    found = _wanted(only, print)
    faults = _compile_all(found, {"TRITON_CACHE_DIR": str(cache)}, deadline)
    return f"{len(found) - len(faults)} of {len(found)} kernels compiled here: {reason}"


NEEDED = (".cubin", ".json", ".so")
"""Of an entry's files those that Triton loads; the text of the stages in between stays out."""


def _pack(cache: Path, archive: Path) -> set[str]:
    """Writes the entries of a cache into an archive, and names them."""
    files = sorted(cache.glob("*/*"), key=lambda p: (p.suffix, p.name, p.parent.name))
    files = [p for p in files if p.suffix in NEEDED and not p.name.startswith("__grp__")]
    with tarfile.open(archive, "w:xz") as tar:
        for path in files:
            tar.add(path, str(path.relative_to(cache)))
    return {p.parent.name for p in files}


def install(folder: Path, cache: Path) -> int:
    """Puts the entries of ``folder`` into a cache of Triton's (TRITON_CACHE_DIR), and says how many.

    A group file in each entry names the entry's files by absolute paths: it is written here, last.
    """
    groups: dict[Path, dict[str, str]] = {}
    with tarfile.open(folder / ENTRIES) as tar:
        tar.extractall(cache, filter="data")
        for name in tar.getnames():
            path = cache.resolve() / name
            groups.setdefault(path.parent, {})[path.name] = str(path)
    for entry, files in groups.items():
        for name in files:
            if name.endswith(".json"):
                (entry / f"__grp__{name}").write_text(json.dumps({"child_paths": files}))
    return len(groups)


def check(folder: Path) -> str | None:
    """Why the binaries of ``folder`` do not fit this machine's Triton and kernels; None if they do.

    Compares the values that enter the keys, and looks up the entries that real launches would ask for. That is
    done in a process of its own: no driver is needed, and this process's Triton stays as it is.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.campaign.binaries", "facts"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"this machine's values cannot be had: {last[:200]}"
    return difference(manifest, json.loads(ran.stdout.splitlines()[-1]))


def difference(manifest: dict[str, Any], here: dict[str, Any]) -> str | None:
    """The first value of a manifest that a machine ("values", "proof") has otherwise; None if there is none."""
    for name, made in manifest["values"].items():
        found = here["values"].get(name)
        if isinstance(made, dict) and isinstance(found, dict):
            names = [k for k in {**made, **found} if made.get(k) != found.get(k)]
            if names:
                return f"{name}: {', '.join(names)} differ"
        elif found != made:
            return f"{name} was {made}, here it is {found}"
    missing = [kernel for key, kernel in here["proof"].items() if key not in manifest["entries"]]
    if missing:
        return f"{len(missing)} of {len(here['proof'])} launches of a layer find no binary, {missing[0]} first"
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where ``check`` finds that the binaries do not fit."""
    parser = argparse.ArgumentParser(prog="benchmarks.campaign.binaries", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("make", "check", "install", "facts"):
        command = commands.add_parser(name)
        if name != "facts":
            command.add_argument("folder", type=Path)
    for name in ("make", "install"):
        commands.choices[name].add_argument("--minutes", type=float, default=60.0)
        commands.choices[name].add_argument("--only", type=lambda s: s.split(","), default=())
    commands.choices["install"].add_argument("cache", type=Path)
    given = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
    if given.command == "make":
        make(given.folder, given.minutes, given.only)
    elif given.command == "facts":
        print(json.dumps(_facts()))
    elif given.command == "install":
        print(prepare_cache(given.folder, given.cache, given.minutes, given.only))
    else:
        reason = check(given.folder)
        print(reason or "the binaries fit")
        return reason is not None
    return 0


if __name__ == "__main__":
    sys.exit(main())
