"""Pages of the site that are not files of ``docs/``, and links between these and the others.

A notebook becomes a page; the changes and the list of open targets are shown from where they lie. A link to
a file of the repository that the site does not have becomes its path.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "gaps.md": "benchmarks/results/GAPS.md",
}
"""Page -> the file of the repository that it shows."""

LONGEST_OUTPUT = 40
"""Lines of a cell's output that the page shows."""

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def generated() -> dict[str, str]:
    """Page -> its Markdown, of all pages that are made when the site is built."""
    pages = {page: (ROOT / file).read_text(encoding="utf-8") for page, file in ELSEWHERE.items()}
    for file in sorted((DOCS / "notebooks").glob("*.ipynb")):
        pages[f"notebooks/{file.stem}.md"] = of_notebook(file)
    return pages


def of_notebook(file: Path) -> str:
    """A notebook as Markdown: texts, code, and the text that each cell has printed."""
    parts: list[str] = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            parts += [f'```text title="Output"\n{text}\n```' for text in _texts(cell["outputs"])]
    title, *rest = parts
    download = f"This page is [a notebook]({file.name}){{ download }}: run it, and change it."
    return "\n\n".join([title, download, *rest]) + "\n"


def _texts(outputs: list[dict[str, Any]]) -> list[str]:
    texts = []
    for output in outputs:
        lines = output.get("text") or output.get("data", {}).get("text/plain") or []
        found = "".join(lines).rstrip().splitlines()
        if found:
            more = ["…"] if len(found) > LONGEST_OUTPUT else []
            texts.append("\n".join(found[:LONGEST_OUTPUT] + more))
    return texts


def source_of(page: str) -> str:
    """The file of the repository that a page of the site shows."""
    return ELSEWHERE.get(page, f"docs/{page}")


def relinked(markdown: str, page: str) -> str:
    """``markdown`` of ``page``, in which links to files of the repository lead to their pages or become paths.

    Raises:
        ValueError: a link to a file that the repository does not have.
    """
    base = posixpath.dirname(source_of(page))
    shown = {file: name for name, file in ELSEWHERE.items()}

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(base, target))
        if path in shown:
            found = shown[path]
        elif path.endswith(".ipynb") and page != f"notebooks/{Path(path).stem}.md":
            found = path.removeprefix("docs/").replace(".ipynb", ".md")
        elif path.startswith("docs/"):
            found = path.removeprefix("docs/")
        elif (ROOT / path).exists():
            return text if path in text else f"{text} (`{path}`)"
        else:
            raise ValueError(f"{source_of(page)}: {target} is not in the repository")
        relative = os.path.relpath(found, posixpath.dirname(page) or ".")
        return f"[{text}]({Path(relative).as_posix()}{anchor})"

    return _LINK.sub(led, markdown)
