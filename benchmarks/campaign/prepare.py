"""``gpu.sh --prepare``: compiles beforehand what a GPU machine would spend its time on, into one folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import bundle, probes, runner
from .steps import PREPARED, ROOT

MOST = 30 << 20
"""Bytes that the folder may have."""


def main(arch: str) -> int:
    """0 if everything was compiled; what was not is named, and the GPU machine compiles it itself."""
    PREPARED.mkdir(parents=True, exist_ok=True)
    bundle.write_json(
        PREPARED / "commit.json", {"commit": runner.commit(), "sources": runner.fingerprint()}
    )
    with tempfile.TemporaryDirectory(prefix="fastfilm-prepare-") as name:
        folder = Path(name)
        found = {
            "CUDA kernels": _kernels(folder, arch),
            "probes": _probes(arch),
            "Triton's kernels": _run(
                ("-m", "benchmarks.campaign.binaries", "make", str(PREPARED / "triton")), folder
            ),
        }
    size = sum(p.stat().st_size for p in PREPARED.rglob("*") if p.is_file())
    failed = [name for name, ok in found.items() if not ok]
    print(f"{PREPARED.relative_to(ROOT)}: {size / 2**20:.1f} MiB for sm_{arch}")
    if size > MOST:
        failed.append(f"the folder, which may have {MOST >> 20} MiB")
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _kernels(folder: Path, arch: str) -> bool:
    """The objects of the CUDA kernels, and the Python part with them as the steps after this one import it."""
    if shutil.which("nvcc") is None:
        print("CUDA kernels: nvcc not found", file=sys.stderr)
        return False
    variables = {
        "FASTFILM_CPU": "0",
        "FASTFILM_CUDA": "1",
        "FASTFILM_CUDA_ARCHS": arch,
        "FASTFILM_CUDA_OBJECTS": str(PREPARED / "objects"),
    }
    command = ("setup.py", "-q", "build", "--build-lib", str(folder / "site"))
    return _run((*command, "--build-temp", str(folder / "temp")), folder, variables)


def _probes(arch: str) -> bool:
    try:
        print(f"probes: {probes.compile(PREPARED, arch).name}", flush=True)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return False
    return True


def _run(command: tuple[str, ...], folder: Path, variables: dict[str, str] | None = None) -> bool:
    begun = time.monotonic()
    paths = os.pathsep.join(map(str, (folder / "site", ROOT)))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", **(variables or {})}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    said = f"{time.monotonic() - begun:.0f} s, exit status {done.returncode}"
    print(f"{' '.join(command[:3])}: {said}", flush=True)
    if done.returncode:
        print((done.stdout + done.stderr)[-3000:], file=sys.stderr)
    return done.returncode == 0
