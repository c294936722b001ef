"""An audit as text for a terminal and as an HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fastfilm

from ..reports.html_page import STYLE, table
from ..reports.layout import (
    NONE,
    Column,
    fold,
    number,
    p_value,
    page_width,
)
from ..reports.layout import table as text_table

TITLES = {
    "warning": "Warnings",
    "look": "Worth a look",
    "fine": "Nothing found",
}

MARKS = """
div.finding { border-left: 4px solid #999; padding: .1em .8em; margin: 1em 0; overflow-wrap: anywhere }
div.warning { border-color: #c0392b } div.look { border-color: #d99a00 }
div.finding p { margin: .3em 0 } li { overflow-wrap: anywhere }
td.name:first-child { min-width: 11em } td.name + td.name { min-width: 8em }
"""

HEAD = ("value", "95 % interval", "chance", "subjects", "p", "p corrected")


def lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The audit for a terminal: a table of what is worth attention, then each in a sentence, the worst first."""
    width = page_width()
    shown = [f for f in result["findings"] if f["level"] != "fine"]
    if shown:
        names = [f"{f['level']}: {f['about']}" for f in shown]
        cells = [_cells(f) for f in shown]
        columns = [Column(h, [c[i] for c in cells]) for i, h in enumerate(HEAD)]
        yield from text_table(summary(result), "finding", names, columns, width)
    else:
        yield from fold(summary(result), width)
        yield ""
    for f in shown:
        yield from fold(f"{f['level']}: {f['text']} {f['advice']}", width)
        yield ""
    for note in result["notes"]:
        yield from fold(f"note: {note}", width)


def page(result: Mapping[str, Any]) -> str:
    """The audit as HTML."""
    body = [f"<p>{html.escape(summary(result))}</p>"]
    for level, title in TITLES.items():
        found = [f for f in result["findings"] if f["level"] == level]
        if not found:
            continue
        body.append(f"<h2>{title} ({len(found)})</h2>")
        if level != "fine":
            body += [_card(f) for f in found]
        body.append(
            f"<details><summary>{len(found)} rows of numbers</summary>{_numbers(found)}</details>"
        )
    body.append("<h2>Notes</h2><ul>")
    body += [f"<li>{html.escape(note)}</li>" for note in result["notes"]]
    body.append("</ul>")
    joined = "\n".join(body)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>fastfilm audit</title><style>{STYLE}{MARKS}</style></head><body><h1>fastfilm audit</h1>"
        f'<p class="note">fastfilm {fastfilm.__version__}</p>\n{joined}</body></html>\n'
    )


def summary(result: Mapping[str, Any]) -> str:
    """One line on all findings."""
    levels = [f["level"] for f in result["findings"]]
    counts = ", ".join(f"{title.lower()} {levels.count(k)}" for k, title in TITLES.items())
    return f"cases {result['cases']}, subjects {result['subjects']}: {counts}"


def _card(f: Mapping[str, Any]) -> str:
    return (
        f'<div class="finding {f["level"]}"><p><b>{html.escape(f["about"])}</b></p>'
        f"<p>{html.escape(f['text'])}</p><p>{html.escape(f['advice'])}</p></div>"
    )


def _numbers(found: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f["about"], f"{f['kind']}: {f['measure']}", *_cells(f)] for f in found]
    return table(["finding", "measure", *HEAD], rows, names=2)


def _cells(f: Mapping[str, Any]) -> list[str]:
    """In the order of ``HEAD``; counts have no digits behind the point."""
    digits = 0 if f["measure"] in ("subjects", "values") else 2
    bounds = NONE
    if f["low"] is not None and f["high"] is not None:
        bounds = f"[{number(f['low'], digits)}, {number(f['high'], digits)}]"
    return [
        number(f["value"], digits),
        bounds,
        number(f["chance"], digits),
        str(f["n"]),
        p_value(f["p"]),
        p_value(f["p_corrected"]),
    ]
