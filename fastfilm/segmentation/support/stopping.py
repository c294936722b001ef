"""Ctrl-C, a cluster's SIGTERM, and a time that was agreed on: what is under way ends in order.

The second signal ends it at once.
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
        number: of the signal.
        text: what is there to be said about it.
        status: for the shell: 130 for SIGINT, 143 for SIGTERM, 142 (SIGALRM) for a time that has passed.
    """

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or signal.Signals(number).name)
        self.number, self.text, self.status = number, text, 128 + number


class Stop:
    """Whether a signal has come.

    Attributes:
        asked: number of the first one that came while ``patient``; None: none.
        patient: a first signal is only noted here; whoever sets this looks at ``asked`` often. Otherwise, and from
            the second one on, a signal raises ``Stopped`` where it comes.
        deadline: in ``time.monotonic()``'s seconds; None: there is none.
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
        # a cluster signals the whole group: loading processes end, and PyTorch would raise in the middle of a step
        self.replace(signal.SIGCHLD, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    def replace(self, number: int, handler: Any) -> None:
        """Sets a handler until ``restore``."""
        self.replaced[number] = signal.signal(number, handler)

    def restore(self) -> None:
        """The handlers that were there before."""
        for number, handler in self.replaced.items():
            # None: not set from Python, which has no way to set it again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self.replaced.clear()


@contextlib.contextmanager
def signals(handle: bool = True) -> Iterator[Stop]:
    """Handles SIGINT and SIGTERM inside, if ``handle`` and in the main thread; elsewhere nothing is ever asked."""
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
