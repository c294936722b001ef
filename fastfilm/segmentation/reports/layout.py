"""Tables of numbers as text: in blocks of columns that fit the page, numbers whole, long names folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from ..evaluation.metrics import METRICS
from ..support.console import out, say

WIDTH = 80
"""Cells of a line where nobody says how wide the page is."""

NAMES = 16
"""Cells that the column of names has at least."""

NONE = "–"
"""Stands for what is not defined."""

DIGITS = {metric: 2 if unit else 3 for metric, unit in METRICS.items()}
"""Digits behind the point: two of mm and mL, three of what has no unit."""


@dataclass(frozen=True)
class Column:
    """A column of numbers; head and cells may have several lines."""

    head: str
    cells: list[str]

    def width(self) -> int:
        """Cells of its longest line."""
        return max(cell_len(line) for text in (self.head, *self.cells) for line in text.split("\n"))


def page_width() -> int:
    """Of the terminal, or ``WIDTH`` in a log."""
    return max(out.width, 40) if out.is_terminal else WIDTH


def show(title: str, head: str, names: Sequence[str], columns: Sequence[Column]) -> None:
    """Prints a table.

    Args:
        title: a line above it.
        head: of the column of names.
        names: one a row; blanks at the start stay where the name is folded.
    """
    for line in table(title, head, names, columns, page_width()):
        say(line)


def table(
    title: str, head: str, names: Sequence[str], columns: Sequence[Column], width: int = WIDTH
) -> Iterator[str]:
    """The lines of a table; columns that do not fit into ``width`` follow in further blocks under each other."""
    yield from fold(title, width)
    headings = [n for i, n in enumerate(names) if not any(c.cells[i] for c in columns)]
    longest = max(cell_len(plain(n)) for n in (head, *names) if n not in headings)
    least = min(NAMES, longest)
    left = list(columns)
    while left:
        room = width - least
        block: list[Column] = []
        while left and (not block or left[0].width() + 2 <= room):
            room -= left[0].width() + 2
            block.append(left.pop(0))
        first = min(longest, max(least, least + room))
        yield from _row(head, [c.head for c in block], block, first, bottom=True)
        yield "─" * (first + sum(c.width() + 2 for c in block))
        for i, name in enumerate(names):
            yield from _row(name, [c.cells[i] for c in block], block, first)
        yield ""


def _row(
    name: str, cells: Sequence[str], columns: Sequence[Column], first: int, bottom: bool = False
) -> Iterator[str]:
    if not any(cells):
        # a heading may run on over the columns
        yield from fold(name, first + sum(c.width() + 2 for c in columns))
        return
    parts = [fold(name, first), *(c.split("\n") for c in cells)]
    height = max(len(p) for p in parts)
    for part in parts:
        blank = [""] * (height - len(part))
        part[:] = blank + part if bottom else part + blank
    widths = [c.width() for c in columns]
    for line in zip(*parts, strict=True):
        text = line[0] + " " * (first - cell_len(line[0]))
        for cell, w in zip(line[1:], widths, strict=True):
            text += "  " + " " * (w - cell_len(cell)) + cell
        yield text.rstrip()


def fold(text: str, width: int) -> list[str]:
    """``text`` in lines of ``width`` cells at most, broken between words where that is possible."""
    text = plain(text)
    indent = " " * min(len(text) - len(text.lstrip(" ")), width // 2)
    lines = Text(text.strip()).wrap(out, max(width - len(indent), 2), overflow="fold")
    return [indent + line.plain.rstrip() for line in lines] or [""]


def plain(text: str) -> str:
    """``text`` on one line: control characters and the like become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def number(value: float | None, digits: int, sign: bool = False) -> str:
    """With ``digits`` behind the point; ``NONE`` for None."""
    return NONE if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(mean: Mapping[str, Any], digits: int, sign: bool = False) -> str:
    """``[low, high]``, or ``NONE`` where there is none (fewer than two subjects)."""
    if mean["low"] is None:
        return NONE
    return f"[{number(mean['low'], digits, sign)}, {number(mean['high'], digits, sign)}]"


def p_value(p: float | None) -> str:
    """With four digits behind the point; smaller ones as a bound."""
    return NONE if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def means(head: str, values: Sequence[Mapping[str, Any]], digits: int) -> Column:
    """A column of means, each with its interval in the line below."""
    cells = [f"{number(v['mean'], digits)}\n{interval(v, digits)}" for v in values]
    return Column(head, aligned(cells))


def aligned(cells: Iterable[str]) -> list[str]:
    """Cells with intervals ``[low, high]``, both ends padded so that their points are under each other."""
    lines = [cell.split("\n") for cell in cells]
    pairs = [line[1:-1].split(", ") for cell in lines for line in cell if line.startswith("[")]
    low, high = (max((len(p[i]) for p in pairs), default=0) for i in (0, 1))

    def line(text: str) -> str:
        if not text.startswith("["):
            return text
        a, b = text[1:-1].split(", ")
        return f"[{a:>{low}}, {b:>{high}}]"

    return ["\n".join(line(x) for x in cell) for cell in lines]
