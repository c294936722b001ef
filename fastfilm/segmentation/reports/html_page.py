"""The parts of HTML reports: one file that needs nothing else, with tables and pictures inside."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from .figures import png

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
div.wide { overflow-x: auto; font-size: .87em }
th, td { padding: .25em .6em; text-align: right; vertical-align: top; white-space: pre }
th { border-bottom: 1px solid #888 } td.name, th { white-space: pre-line }
td.name, th.name { text-align: left; overflow-wrap: anywhere; min-width: 5em }
td.name + td.name, th.name + th.name { min-width: 11em }
tr:nth-child(even) { background: #f5f5f5 } img { max-width: 100% } p.note { color: #555; font-size: .9em }
"""


class Page:
    """What a report will hold; nothing is written before all of it is there."""

    def __init__(self) -> None:
        self.sections: list[str] = []
        self.pictures: dict[str, bytes] = {}

    def title(self, text: str) -> None:
        """Begins a section."""
        self.sections.append(f"<h2>{html.escape(text)}</h2>")

    def note(self, text: str) -> None:
        """A sentence in small print."""
        self.sections.append(f'<p class="note">{html.escape(text)}</p>')

    def picture(self, name: str, figure: Figure, about: str) -> None:
        """A picture, NAME.png, with a sentence on it."""
        picture = png(figure)
        self.pictures[f"{name}.png"] = picture
        self.note(about)
        data = base64.b64encode(picture).decode()
        self.sections.append(f'<img alt="{html.escape(about)}" src="data:image/png;base64,{data}">')


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], names: int = 1) -> str:
    """An HTML table; every cell is escaped.

    Args:
        names: columns at the left that are words, not numbers.
    """

    def row(cells: Sequence[Any], tag: str) -> str:
        text = ""
        for i, cell in enumerate(cells):
            kind = ' class="name"' if i < names else ""
            text += f"<{tag}{kind}>{html.escape(str(cell))}</{tag}>"
        return f"<tr>{text}</tr>"

    body = "".join(row(r, "td") for r in rows)
    return f'<div class="wide"><table>{row(head, "th")}{body}</table></div>'
