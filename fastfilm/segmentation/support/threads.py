"""How many threads the CPU computes with, and a warning where they would get into each other's way."""

from __future__ import annotations

import os
import sys

import torch

from .errors import UserError


def use(n: int | None = None, device: torch.device | None = None) -> int:
    """Sets PyTorch's threads of this process; their number.

    Where the machine is busy, threads wait for each other at every layer, and several are much slower than one:
    that is said on stderr.

    Args:
        n: threads; None: as they are (``OMP_NUM_THREADS``, else one a core).
        device: nothing is said if it is not the CPU.

    Raises:
        UserError: n below 1, or more than any machine like this could use.
    """
    if n is not None:
        most = max(64, os.cpu_count() or 1)
        if not 1 <= n <= most:
            raise UserError(f"--threads must be 1 to {most}, got {n}")
        torch.set_num_threads(n)
    threads = torch.get_num_threads()
    if (device is None or device.type == "cpu") and (reason := crowded(threads)) is not None:
        print(f"warning: {reason}", file=sys.stderr)
    return threads


def crowded(threads: int) -> str | None:
    """Why so many threads will be slow here; None: they will not."""
    if threads == 1:
        return None
    usable, cores = cores_here(), os.cpu_count() or 1
    if threads > usable:
        return (
            f"{threads} threads on the {usable} cores that this process may use;"
            f" --threads {usable} is faster"
        )
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    if load <= cores:
        return None
    return (
        f"other processes use this machine (load {load:.1f} on {cores} cores), and {threads} threads wait for"
        " each other; --threads 1 may be many times faster"
    )


def cores_here() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not Linux
        return os.cpu_count() or 1
