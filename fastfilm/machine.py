"""What a report says of the machine: versions and devices."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable

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
