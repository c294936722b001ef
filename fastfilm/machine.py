"""What a report says of the machine: versions and devices."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Table = list[tuple[str, str]]


def section(title: str, rows: Iterable[tuple[str, str]], width: int) -> str:
    """A titled block of aligned rows."""
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def versions() -> Table:
    """fastfilm, Python, and the packages it works with."""
    import numpy
    import torch

    import fastfilm
    from fastfilm.ops.settings.environment import installed

    return [
        ("fastfilm", fastfilm.__version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        ("triton", installed("triton")),
        ("numpy", numpy.__version__),
    ]


def devices() -> Table:
    """CPU threads, CUDA devices, driver, CUDA runtime and cuDNN."""
    import torch

    rows = [("CPU threads", str(torch.get_num_threads()))]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "torch is built without CUDA" if built is None else "torch finds no CUDA device"
        return [*rows, ("CUDA device", f"none ({reason})"), ("driver", "none"), ("cuDNN", "none")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = p.total_memory / 2**30
        rows.append((f"CUDA device {i}", f"{p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB"))
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return [
        *rows,
        ("driver", driver() or "unknown"),
        ("CUDA runtime", torch.version.cuda or "none"),
        ("cuDNN", "none" if cudnn is None else str(cudnn)),
    ]


def build(record: Path | None = None) -> Table:
    """The compiled parts of this installation: what each was built for, in how long, or why it is missing.

    Args:
        record: the file that setup.py left, JSON; default the one beside the extensions.
    """
    path = record or Path(__file__).parent / "ops" / "launchers" / "build.json"
    try:
        made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return [("record", "not there: the extensions were not built by this version's setup.py")]
    rows = [(f"{part} part", _built(made[part])) for part in ("CPU", "CUDA")]
    took = f"{made['seconds']:.0f} s in all on {made['cores']} cores, {made['when']}"
    return [*rows, ("build", took)]


def _built(part: dict[str, Any]) -> str:
    if not part["built"]:
        return f"not built: {part['reason']}"
    made = f"{part['compiled']} files compiled in {part['seconds']:.0f} s, {part['reused']} reused"
    text = f"{made}; {part['compiler']}"
    if "archs" in part:
        targets = ", ".join(f"sm_{a}" for a in part["archs"])
        nvcc = f"nvcc {part['nvcc']} by {part['nvcc by']}"
        return f"{targets} (chosen by {part['archs by']}); {nvcc}; {text}"
    return f"{text}, {'with' if part['OpenMP'] else 'without'} OpenMP"


def driver() -> str | None:
    """Version of the NVIDIA driver, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else None


def gpu_is_lost() -> bool:
    """Whether an error has cost this process its GPU: every later call on it fails for the same reason."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
