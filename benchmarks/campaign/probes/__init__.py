"""A CUDA program that asks an H100 or H200 what a convolution by `wgmma` needs to know.

Nothing here imports fastfilm or torch: the program is compiled and run before either is installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-cudart=static", "-Xptxas=-v")
STATUSES = ("PASS", "FAIL", "SKIPPED")
COMPILE_SECONDS = 300.0


def fingerprint(arch: str = "90a") -> str:
    """Hash of the sources and the compiler's flags: equal hashes are the same program."""
    digest = hashlib.sha256(" ".join(flags(arch)).encode())
    for path in sorted(p for p in SOURCES.iterdir() if p.suffix in (".cu", ".cuh", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def flags(arch: str) -> tuple[str, ...]:
    return (f"-gencode=arch=compute_{arch},code=sm_{arch}", *FLAGS)


def nvcc() -> str | None:
    """The CUDA compiler in the path, in CUDA_HOME or in /usr/local/cuda."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return shutil.which("nvcc") or (str(home) if home.is_file() else None)


def executable(folder: Path, arch: str = "90a") -> Path:
    """Where `compile` puts the program of the present sources; it may have been compiled elsewhere."""
    return folder / f"probes-{arch}-{fingerprint(arch)[:16]}"


def compile(folder: Path, arch: str = "90a") -> Path:
    """Compiles the program into `folder`, unless it is there, and returns it.

    The compiler's output lies beside it, with the suffix `.log`.

    Raises:
        RuntimeError: no nvcc, or it failed; the message ends with what it printed last.
    """
    target = executable(folder, arch)
    if os.access(target, os.X_OK):
        return target
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("probes: no nvcc in the path, in CUDA_HOME or in /usr/local/cuda")
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    sources = sorted(str(p) for p in SOURCES.glob("*.cu"))
    command = [compiler, *flags(arch), "--threads=0", "-o", str(part), *sources]
    log = target.with_name(f"{target.name}.log")
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            end(process)
            raise RuntimeError(f"probes: nvcc took more than {COMPILE_SECONDS:.0f} s") from None
    if code:
        raise RuntimeError(f"probes: nvcc failed:\n{log.read_text(errors='replace')[-3000:]}")
    part.replace(target)
    return target


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a process with its children; one that the driver holds is left behind after two seconds."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(2)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def run(executable: Path, seconds: float = 15.0, total: float = 120.0) -> list[dict[str, Any]]:
    """Rows of all probes, each run in a process of its own.

    Args:
        executable: the program that `compile` returns.
        seconds: the limit of one probe; one that does not end has FAILED.
        total: the limit of all; probes that have no time left are SKIPPED.

    Returns:
        Dictionaries with `probe`, `status` (PASS, FAIL, SKIPPED), `figure` (a number or None),
        `unit`, `note` and `seconds` (of the process).
    """
    return list(rows(executable, seconds, total))


def rows(executable: Path, seconds: float = 15.0, total: float = 120.0) -> Iterator[dict[str, Any]]:
    """Like `run`, but gives each row as soon as its probe has ended."""
    begin = time.monotonic()
    names, why = talk([str(executable), "--list"], seconds)
    if why or not names.split():
        yield row("probes", "FAIL", f"--list {why or 'printed no names'}")
        return
    for name in names.split():
        left = total - (time.monotonic() - begin)
        if left <= 0:
            yield row(name, "SKIPPED", f"no time left of {total:.0f} s")
            continue
        start = time.monotonic()
        text, why = talk([str(executable), name], min(seconds, left))
        answer = parse(name, text) or row(name, "FAIL", why or f"printed no answer: {text[:200]!r}")
        yield {**answer, "seconds": round(time.monotonic() - start, 3)}


def row(probe: str, status: str, note: str) -> dict[str, Any]:
    return {"probe": probe, "status": status, "figure": None, "unit": None, "note": note}


def parse(probe: str, text: str) -> dict[str, Any] | None:
    """The probe's answer in what it printed; None if there is no such line."""
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("probe") == probe:
            answer = row(probe, "", "") | {k: found[k] for k in row("", "", "") if k in found}
            if answer["status"] in STATUSES:
                return answer
    return None


def talk(command: list[str], seconds: float) -> tuple[str, str]:
    """What a command printed, and what went wrong in words (empty if nothing did)."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        return "", f"did not start: {error}"
    try:
        text = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired as late:
        end(process)
        return (late.stdout or b"").decode(errors="replace"), f"did not end within {seconds:.0f} s"
    why = f"ended by signal {-process.returncode}" if process.returncode < 0 else ""
    return text.decode(errors="replace"), why
