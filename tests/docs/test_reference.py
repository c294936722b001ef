"""The reference pages say what the code has: commands, public names, the words of the glossary."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fastfilm
from fastfilm import tuning

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLI = (DOCS / "cli.md").read_text(encoding="utf-8")
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")
API = "\n".join(p.read_text(encoding="utf-8") for p in sorted((DOCS / "api").glob("*.md")))


def test_the_page_of_the_command_line_is_that_of_the_commands() -> None:
    pytest.importorskip("typer")
    from docs.tools import cli_page

    assert cli_page.markdown() == CLI, "python docs/tools/cli_page.py docs/cli.md"


def test_every_command_has_a_heading() -> None:
    from docs.tools import cli_page

    headings = re.findall(r"^## fastfilm (\w+)$", CLI, re.MULTILINE)
    assert headings == list(cli_page.commands()) and len(headings) >= 14


def test_every_public_name_has_an_entry() -> None:
    names = [f"fastfilm.{n}" for n in fastfilm.__all__ if n != "__version__"]
    names += [f"fastfilm.tuning.{n}" for n in tuning.__all__]
    headings = re.findall(r"heading: (\S+)$", API, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert not set(names) - set(headings)


def test_every_entry_has_a_source_of_that_name() -> None:
    entries = re.findall(r"^::: (\S+)\n    options:\n      heading: (\S+)$", API, re.MULTILINE)
    assert len(entries) == API.count("\n::: ")
    for path, heading in entries:
        assert path.rsplit(".", 1)[1] == heading.rsplit(".", 1)[1]


def test_the_glossary_has_each_word_once_and_the_pages_use_it() -> None:
    words = [w.split(",")[0] for w in re.findall(r"^\| ([^|]+?) \|", GLOSSARY, re.MULTILINE)[1:]]
    assert {"raw map", "pending affine", "deferred", "composed", "fused", "plan"} <= set(words)
    pages = [p for p in DOCS.glob("*.md") if p.name != "glossary.md"]
    text = "\n".join(p.read_text(encoding="utf-8") for p in pages)
    for word in words:
        assert word in text, word
