"""A process that ends with the one that started it. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import signal


def follow_parent() -> None:
    """The calling process is killed when the one that started it ends, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
