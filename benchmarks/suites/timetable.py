"""The run without ``--suite``: which part of it ends when, and what is named when time is over."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..measure.providers import one_line
from ..measure.record import FAILED, NO_TIME
from ..measure.session import Case, Session

ROWS_END = {"cuda": 150.0, "cpu": 100.0}
"""Seconds from the start of the process after which no row is started or goes on; the static suite excepted."""

QUICK_END = {"cuda": 150.0, "cpu": 45.0}
"""The same for ``--quick``: on a GPU its first calls take as long, because kernels are compiled."""

END = {"cuda": 150.0, "cpu": 170.0}
"""The same for the static suite, which has time of its own where no kernel of a GPU can be measured."""

STATIC_LEAST = 60.0
"""Seconds that the static suite needs."""

GRACE = 20.0
"""Seconds after the end when a call that cannot be interrupted ends the process."""


@dataclass(frozen=True)
class Part:
    """A part of the run.

    Attributes:
        suite, what: the function ``what`` of the module ``suite`` is called.
        until: share of the time at which it ends; what is not used up is the next one's.
        dtypes: "first", "rest", or "all" of those asked for.
    """

    suite: str
    what: str
    until: float
    dtypes: str = "all"

    def chosen(self, dtypes: Sequence[str]) -> list[str]:
        """Its dtypes."""
        return list({"first": dtypes[:1], "rest": dtypes[1:], "all": dtypes}[self.dtypes])


PARTS = (
    Part("model", "plain", 0.45, "first"),
    Part("model", "graphs", 0.50, "first"),
    Part("model", "compiled", 0.65, "first"),
    Part("memory", "run", 0.82),
    Part("ops", "plain", 0.94, "first"),
    Part("model", "plain", 0.97, "rest"),
    Part("ops", "plain", 1.0, "rest"),
    Part("model", "compiled", 1.0, "rest"),
    Part("ops", "compiled", 1.0),
)
"""In the order in which they tell most."""


class Watchdog:
    """Ends the process when a call that no signal reaches, such as a kernel that hangs, outlasts the run.

    Args:
        seconds: when; None: never.
        finish: called in front of the end, from another thread.
    """

    def __init__(
        self,
        seconds: float | None,
        finish: Callable[[], object],
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._finish, self._leave = finish, leave
        self.timer = None if seconds is None else threading.Timer(seconds, self._ring)
        if self.timer is not None:
            self.timer.daemon = True
            self.timer.start()

    def _ring(self) -> None:
        try:
            self._finish()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            self._leave(1)

    def cancel(self) -> None:
        """Nothing happens any more."""
        if self.timer is not None:
            self.timer.cancel()


def run(
    session: Session, total: float | None, waiting: list[Part], parts: Sequence[Part] = PARTS
) -> None:
    """Runs every part within its share of the session's budget.

    Args:
        total: the whole length of the run, seconds; None: without end.
        waiting: filled with the parts that are not begun, for the watchdog.
    """
    whole, dtypes = session.budget, session.dtypes
    session.end = whole
    waiting[:] = [p for p in parts if p.chosen(dtypes) and (p.what != "graphs" or session.graphs)]
    while waiting:
        part = waiting.pop(0)
        session.dtypes = part.chosen(dtypes)
        session.budget = whole.earlier((1 - part.until) * (total or 0.0))
        suite = importlib.import_module(f"benchmarks.suites.{part.suite}")
        try:
            getattr(suite, part.what)(session)
        except Exception as error:  # the other parts are of use without this one
            traceback.print_exc()
            case = Case(part.suite, "all", part.what, ",".join(session.dtypes))
            session.record.add(session.row(case, "all", status=FAILED, note=one_line(error)))
            session.record.failed = True
    session.budget, session.dtypes = whole, dtypes


def cut(session: Session, waiting: Sequence[Part]) -> None:
    """Names what is running and what is waiting when the watchdog ends the run."""
    if session.running is not None:
        case, provider = session.running
        session.say(f"ended while at work: {case.suite}: {case.case}, {case.mode}, {provider}")
        session.skip(case, provider, f"{NO_TIME}: it did not end")
    for part in waiting:
        for dtype in part.chosen(session.dtypes):
            session.skip(Case(part.suite, "all", part.what, dtype), "all", NO_TIME)
