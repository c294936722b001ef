"""What the commands print: progress bars on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

out = Console(highlight=False, soft_wrap=True, emoji=False)


_silent = False


def say(text: str) -> None:
    """One line on stdout, as it is."""
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


class Tick:
    """Moves a bar on by one step; its text may change."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def __call__(self, text: str | None = None) -> None:
        self.progress.update(self.task, advance=1, description=text)


@contextlib.contextmanager
def bar(title: str, show: bool = True) -> Iterator[Callable[[int], Tick]]:
    """A progress bar with the time left, on a terminal only.

    Yields a function that gets the number of steps and returns what is called after each.
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
    with Progress(*columns, console=out, transient=True, disable=hidden) as p:
        yield lambda total: Tick(p, p.add_task(title, total=total))
