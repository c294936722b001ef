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


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Adds the pages that are made here."""
    for name, text in pages.generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the repository lead to their pages."""
    return pages.relinked(markdown, page.file.src_uri)
