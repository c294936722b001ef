"""The files around the code: the citation, the forms of the repository, the hooks and the format of csrc."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import fastfilm

yaml = pytest.importorskip("yaml", reason="needs the extra [segmentation]")
ROOT = Path(__file__).resolve().parents[2]
CLANG_FORMAT = 23
"""Other versions break some lines elsewhere."""
FORMS = sorted(p for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if p.stem != "config")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = read(ROOT / "CITATION.cff")
    required = {"cff-version", "message", "title", "authors"}
    assert required <= citation.keys() and citation["cff-version"] == "1.2.0"
    assert citation["version"] == fastfilm.__version__
    assert (ROOT / "LICENSE").read_text("utf-8").startswith(f"{citation['license']} License")
    (paper,) = citation["references"]
    assert paper["authors"][0]["family-names"] == "Lemay" and paper["year"] == 2021


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_a_form_has_what_the_repository_s_host_asks_for(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys()
    fields = [f for f in form["body"] if f["type"] != "markdown"]
    assert len({f["id"] for f in fields}) == len(fields) >= 1
    for field in fields:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes")
        assert field["attributes"]["label"]
        assert field["type"] != "dropdown" or len(field["attributes"]["options"]) > 1


def test_there_are_forms_for_faults_and_for_wishes() -> None:
    assert [p.stem for p in FORMS] == ["fault", "wish"]


def test_the_hooks_are_programs_of_the_environment() -> None:
    repos = read(ROOT / ".pre-commit-config.yaml")["repos"]
    hooks = [h for r in repos for h in r["hooks"]]
    assert [r["repo"] for r in repos] == ["local"]
    assert {h["language"] for h in hooks} == {"system"}
    assert {h["id"] for h in hooks} == {"ruff", "ruff-format", "mypy", "clang-format"}


def test_csrc_has_its_format() -> None:
    program = shutil.which("clang-format")
    asked = [program, "--version"] if program else ["false"]
    version = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout
    if f"version {CLANG_FORMAT}." not in version:
        pytest.skip(f"clang-format {CLANG_FORMAT} is not installed")
    assert program is not None
    suffixes = (".h", ".cu", ".cpp", ".inc")
    files = [str(p) for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in suffixes]
    command = [program, "--dry-run", "-Werror", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:2000]
