"""Output of the commands: progress bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

out = Console(highlight=False, soft_wrap=True, emoji=False)

Tick = Callable[..., None]
"""Moves a bar on by one step; an argument replaces its text."""

_silent = False


def say(text: str) -> None:
    """Prints a line on stdout; square brackets in it are not read as markup."""
    if not _silent:
        out.print(text, markup=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """``say`` prints nothing inside; bars, warnings and errors stay."""
    global _silent
    before, _silent = _silent, True
    try:
        yield
    finally:
        _silent = before


@contextlib.contextmanager
def bar(title: str, show: bool = True) -> Iterator[Callable[[int], Tick]]:
    """A progress bar with the time left, on a terminal only.

    Yields a function that takes the number of steps and returns a ``Tick``, to be called after each step.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    hidden = not (show and out.is_terminal)
    with Progress(*columns, console=out, transient=True, disable=hidden) as progress:

        def start(total: int) -> Tick:
            task = progress.add_task(title, total=total)
            return lambda text=None: progress.update(task, advance=1, description=text)

        yield start
