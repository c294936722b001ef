"""What a result was measured on: the machine, the versions, and the two ceilings."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..counted.roofline import DTYPES, Ceilings
from .harness import Clock


def cpu_model() -> str:
    """Model name of the CPU, as the system states it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(command: list[str], cwd: Path | None = None) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=cwd)
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.strip()
    return text.splitlines()[0] if done.returncode == 0 and text else None


def commit() -> str | None:
    """Commit of the checkout these benchmarks lie in, with ``-dirty`` if it has changes."""
    here = Path(__file__).resolve().parents[1]
    if _output(["git", "rev-parse", "--show-prefix"], here) != "benchmarks/":
        return None
    return _output(["git", "describe", "--always", "--dirty", "--exclude", "*"], here)


def triton_version() -> str | None:
    """Version of triton, without importing it."""
    if importlib.util.find_spec("triton") is None:
        return None
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "unknown"


def load() -> float | None:
    """Load average of the last minute, where the system has one."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def describe(device: str) -> dict[str, Any]:
    """The header of a run, as JSON values."""
    import fastfilm

    info: dict[str, Any] = {
        "device": device,
        "device_name": cpu_model(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load": load(),
        "driver": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": triton_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "fastfilm": fastfilm.__version__,
        "commit": commit(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["run.py", *sys.argv[1:]]),
    }
    if device == "cuda":
        info["device_name"] = torch.cuda.get_device_name()
        info["driver"] = _output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
    return info


def ceilings(device: str, dtypes: list[str], clock: Clock, quick: bool = False) -> Ceilings:
    """Measures a large copy, one that stays in the cache, a launch, and a large matrix product of every dtype.

    A ceiling is the best of several tries: what disturbs a try can only make it slower.
    """
    big = device == "cuda"
    tries = 8 if quick else 15
    bandwidth = _copy_rate(device, (1 << 30) if big else (64 << 20), clock, tries)
    # a few megabytes lie in the L2 of every GPU that there is, a quarter of one in that of a CPU core
    cached = _copy_rate(device, (8 << 20) if big else (256 << 10), clock, tries, calls=20)
    one = torch.zeros(1, device=device)
    # no more launches than the host queues while the clock holds the device back
    launches = 40 if big else 200
    launch = min(clock.time(partial(one.add_, 1), launches, flush=False) for _ in range(tries))
    card = torch.cuda.get_device_properties(0) if big else None
    processors = card.multi_processor_count if card else 1
    arch = 10 * card.major + card.minor if card else Ceilings.arch
    matrix = {}
    for name in dtypes:
        matrix[name] = _matrix_rate(device, name, clock, tries)
    return Ceilings(bandwidth, matrix, max(cached, bandwidth), launch, processors, arch)


def as_json(found: Ceilings) -> dict[str, Any]:
    """Ceilings as they stand in a run's header."""
    return {
        "copy_gbps": found.bandwidth / 1e9,
        "l2_gbps": (found.l2 or 0.0) / 1e9,
        "launch_us": found.launch * 1e6,
        "processors": found.processors,
        "arch": found.arch,
        "matrix_tflops": {k: v / 1e12 for k, v in found.matrix.items()},
    }


def from_json(then: Mapping[str, Any]) -> Ceilings:
    """Ceilings from a run's header, as ``as_json`` writes them."""
    return Ceilings(
        then["copy_gbps"] * 1e9,
        {k: v * 1e12 for k, v in then["matrix_tflops"].items()},
        then["l2_gbps"] * 1e9,
        then["launch_us"] / 1e6,
        then["processors"],
        then.get("arch", Ceilings.arch),
    )


def known_ceilings(path: str | None, about: dict[str, Any], dtypes: list[str]) -> Ceilings | None:
    """Those of an earlier run; None if there is none on this device with all ``dtypes``."""
    if path is None or not Path(path).exists():
        return None
    then = json.loads(Path(path).read_text(encoding="utf-8"))["machine"]
    same = all(then.get(k) == about[k] for k in ("device", "device_name", "threads", "torch"))
    if not same or not set(dtypes) <= set(then.get("matrix_tflops", {})):
        return None
    return from_json(then)


def _copy_rate(device: str, size: int, clock: Clock, tries: int, calls: int = 1) -> float:
    """Bytes/s, read plus written, of a copy of ``size`` bytes; several ``calls`` find it in the cache."""
    source = torch.empty(size, dtype=torch.int8, device=device)
    source.random_(0, 100)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * size / min(clock.time(copy, calls, flush=calls == 1) for _ in range(tries))


def _matrix_rate(device: str, dtype: str, clock: Clock, tries: int) -> float:
    from ..counted.inside import float32_products

    rate = 0.0
    with float32_products(dtype == "tf32"):
        for size in (8192,) if device == "cuda" else (256, 1024):
            if rate and 2 * size**3 / rate > 1.0:
                break  # a dtype that this processor only emulates
            a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
            fastest = min(clock.time(partial(torch.matmul, a, b), 1) for _ in range(2 * tries))
            rate = max(rate, 2 * size**3 / fastest)
    return rate
