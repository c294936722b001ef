"""What a suite is at work on, in a file: where a kernel ends the process, another one goes on without it.

A line says which provider of which case is begun or ended, or that a case is finished. What was begun and never
ended has ended the process: it is left out from then on, and after the second time its provider is altogether.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HUNG = 45.0
"""Seconds after which a call that does not come back ends the process, unless it says otherwise."""


class DeviceLost(RuntimeError):
    """An error after which no later call of this process can use the GPU."""


class Journal:
    """The lines of earlier processes, to which this one adds its own; without a file nothing is noted."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._finished: set[str] = set()
        self._culprits: set[tuple[str, str]] = set()
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.continued = bool(lines)
        for line in map(json.loads, lines):
            if "finished" in line:
                self._finished.add(line["finished"])
            elif "begin" in line:
                self._culprits.add(tuple(line["begin"]))
            else:
                self._culprits.discard(tuple(line["end"]))

    def _add(self, **line: object) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def finished(self, case: str) -> bool:
        """Whether an earlier process has measured a case."""
        return case in self._finished

    def finish(self, case: str) -> None:
        """The rows of a case are written."""
        self._add(finished=case)

    def why_not(self, case: str, provider: str) -> str | None:
        """Why a provider is left out of a case; None if it is not."""
        if (case, provider) in self._culprits:
            return "it ended the process, or did not come back"
        if Counter(name for _, name in self._culprits)[provider] > 1:
            return "left out after it ended two processes"
        return None

    @contextlib.contextmanager
    def doing(self, case: str, provider: str, seconds: float | None = None) -> Iterator[None]:
        """Notes what the block does; a DeviceLost that comes out of it leaves it without an end.

        Args:
            seconds: a block that takes longer ends the process; None: ``HUNG``.
        """
        self._add(begin=(case, provider))
        if self._path is not None:
            faulthandler.dump_traceback_later(seconds or HUNG, exit=True)
        try:
            yield
        except DeviceLost:
            raise
        except BaseException:
            self._add(end=(case, provider))
            raise
        else:
            self._add(end=(case, provider))
        finally:
            if self._path is not None:
                faulthandler.cancel_dump_traceback_later()
