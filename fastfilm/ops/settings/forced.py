"""The backend and the route that are forced in this thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from . import environment

environment.check()
_DEFAULTS = (environment.read("FASTFILM_BACKEND"), environment.read("FASTFILM_ROUTE"))


class _Forced(threading.local):
    def __init__(self) -> None:
        self.backend, self.route = _DEFAULTS


thread = _Forced()
"""The backend and route that are forced, for each thread by itself."""


@contextlib.contextmanager
def force(backend: str | None, route: str | None) -> Iterator[None]:
    """Forces a backend and a route inside the block; None leaves one free."""
    before = forced()
    thread.backend, thread.route = backend, route
    try:
        yield
    finally:
        thread.backend, thread.route = before


def forced() -> tuple[str | None, str | None]:
    """The backend and the route that are forced in this thread; None where one is free."""
    return thread.backend, thread.route
