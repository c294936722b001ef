"""Markdown as the pages and reports write it. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; nothing without cells."""
    body = [f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in cells]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body, ""] if body else []


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}g}"
