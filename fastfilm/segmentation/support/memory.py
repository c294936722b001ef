"""How much memory the machine has, and what is said where something would not fit."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

ASSUMED = 8 * 2**30
"""Bytes of memory where the system does not say."""

CONTROL_GROUP = Path("/sys/fs/cgroup")


def physical() -> int:
    """Bytes of memory that this process may use: of the machine, or of its control group (a container, a job)."""
    try:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not Linux
        return ASSUMED
    return min([most, *_limits()])


def available() -> int:
    """Bytes that can be had now without pushing anything out; at most ``physical``."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, physical())
    return physical()


def gib(size: float) -> str:
    """Bytes as text: ``3.2 GiB``."""
    return f"{size / 2**30:.1f} GiB"


def _limits() -> list[int]:
    found = []
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int((CONTROL_GROUP / name).read_text(encoding="ascii")))
    return found
