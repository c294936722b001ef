"""The site builds strictly, without a network, and its search finds each command; needs the extra ``docs``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tools import cli_page, pages

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_the_search_finds_each_command_under_its_name(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    titles = {e["location"]: e["title"] for e in index["docs"]}
    weights = {e["location"]: e.get("boost", 1) for e in index["docs"]}
    for name in cli_page.commands():
        assert titles.get(f"cli/#fastfilm-{name}") == f"fastfilm {name}"
        assert weights[f"cli/#fastfilm-{name}"] > max(
            w for location, w in weights.items() if not location.startswith("cli/")
        )
    assert any(t.startswith("fastfilm.conv_norm_film") for t in titles.values())


def test_pages_ask_no_other_machine_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:link|script|img|iframe)\b[^>]*>", text):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"


def test_examples_of_docstrings_are_code_and_notebooks_are_pages(site: Path) -> None:
    api = (site / "api" / "networks" / "index.html").read_text(encoding="utf-8")
    assert "<blockquote>" not in api and '<span class="gp">&gt;&gt;&gt; </span>' in api
    for name in pages.generated():
        assert (site / name.removesuffix(".md") / "index.html").is_file()


def test_a_link_out_of_the_folder_leads_to_its_page_or_becomes_a_path() -> None:
    text = "[gaps](../benchmarks/results/GAPS.md#gaps) [licence](../LICENSE) [a](https://a.b/c)"
    found = pages.relinked(text, "benchmarks.md")
    assert found == "[gaps](gaps.md#gaps) licence (`LICENSE`) [a](https://a.b/c)"
    assert pages.relinked("[b](docs/design.md#rooms)", "changelog.md") == "[b](design.md#rooms)"
    assert pages.relinked("[n](trial.ipynb)", "notebooks/monai.md") == "[n](trial.md)"
    assert pages.relinked("[n](notebooks/trial.ipynb)", "index.md") == "[n](notebooks/trial.md)"
    with pytest.raises(ValueError, match=r"docs/design.md: ../nothing is not in the repository"):
        pages.relinked("[x](../nothing)", "design.md")
