"""Orderly ends of a command: after Ctrl-C, after a cluster's SIGTERM, or when a time limit has passed.

The first signal lets the current step finish; the second one ends the command at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal has ended a command; like KeyboardInterrupt, not an Exception.

    Attributes:
        number: number of the signal.
        text: message for the user.
        status: exit status: 130 for SIGINT, 143 for SIGTERM, 142 (SIGALRM) for a time limit.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or signal.Signals(number).name)
        self.number, self.text, self.status = number, text, 128 + number


class Stop:
    """The state of stopping: whether a signal has come, or a deadline has passed.

    Attributes:
        asked: number of the first signal that came while ``patient``; None: no signal came.
        patient: a first signal is only noted, for a loop that calls ``due`` after each step. Otherwise, and from
            the second signal on, a signal raises ``Stopped`` at once.
        deadline: seconds of ``time.monotonic()``; None: no time limit.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.deadline: float | None = None
        self.patient = False
        self.replaced: dict[int, Any] = {}

    def due(self) -> int | None:
        """The signal that has come, SIGALRM for a deadline that has passed; None: neither."""
        if self.asked is None and self.deadline is not None and time.monotonic() >= self.deadline:
            return signal.SIGALRM
        return self.asked

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.patient or self.asked is not None:
            raise Stopped(number)
        self.asked = number
        # a cluster signals the whole group: loading processes end too, for which PyTorch would raise in mid-step
        self.replace(signal.SIGCHLD, signal.SIG_DFL)
        # not print: the signal may have interrupted another print
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def replace(self, number: int, handler: Any) -> None:
        """Sets a handler until ``restore``."""
        self.replaced[number] = signal.signal(number, handler)

    def restore(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self.replaced.items():
            # None: the handler was not set from Python, which cannot set it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.replaced.clear()


@contextlib.contextmanager
def signals(handle: bool = True) -> Iterator[Stop]:
    """Handles SIGINT and SIGTERM inside the block, if ``handle`` is true and this is the main thread."""
    stop = Stop()
    if not handle or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    try:
        for number in SIGNALS:
            stop.replace(number, stop._handle)
        yield stop
    finally:
        stop.restore()
