"""What the commands print: progress bars on a terminal, plain lines in a log."""

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

out = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line on stdout, as it is."""
    out.print(text, markup=False)


@contextlib.contextmanager
def bar(title: str, show: bool = True) -> Iterator[Callable[[int], Callable[[], None]]]:
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
    with Progress(
        *columns, console=out, transient=True, disable=not (show and out.is_terminal)
    ) as p:

        def start(total: int) -> Callable[[], None]:
            task = p.add_task(title, total=total)
            return lambda: p.advance(task)

        yield start
