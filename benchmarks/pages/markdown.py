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


def between(page: str, name: str, text: str) -> str:
    """``page`` with ``text`` between its marks ``<!-- name: begin -->`` and ``<!-- name: end -->``.

    Raises:
        ValueError: the page does not have each mark once.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page must have one place for {name}")
    before, rest = page.split(begin)
    return f"{before}{begin}\n{text.rstrip()}\n{end}{rest.split(end)[1]}"
