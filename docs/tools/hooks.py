"""Functions that MkDocs calls while it builds the site: they add the pages and mend the links of ``pages.py``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parent))
import pages

COMMANDS_FIRST = 8
"""Weight of the page of the command line in the search; that of other pages is 1."""


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pages that are made here."""
    for name, text in pages.generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the repository lead to their pages; a command is found before the text about it."""
    if page.file.src_uri == "cli.md":
        page.meta["search"] = {"boost": COMMANDS_FIRST}
    return pages.relinked(markdown, page.file.src_uri)
