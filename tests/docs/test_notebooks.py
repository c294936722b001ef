"""Every notebook runs from top to bottom, in a process of its own; those that take long are slow tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
RUNNER = ROOT / "docs" / "tools" / "notebooks.py"
NEEDS = {
    "monai": ("monai",),
    "nnunet": ("dynamic_network_architectures",),
    "trial": ("typer", "monai", "nibabel"),
}


def run(notebook: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUNNER), str(notebook)],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**_environment(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def _environment() -> dict[str, str]:
    import os

    # the tests' own settings are for interpreted kernels
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(notebook: Path) -> None:
    for package in NEEDS[notebook.stem]:
        pytest.importorskip(package)
    done = run(notebook)
    assert done.returncode == 0, done.stderr


def test_a_cell_that_fails_is_told_with_what_the_notebook_had_printed(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# A"]},
        {"cell_type": "code", "source": ["a = 1\n", "print('seen')\n", "!echo $((a + 1)) | cat\n"]},
        {"cell_type": "code", "source": ["print('again')\n", "1 / 0"]},
    ]
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps({"cells": cells}), encoding="utf-8")
    done = run(file)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "in cell 2" in done.stderr
    assert "again" in done.stderr


def test_a_command_that_fails_fails_the_cell(tmp_path: Path) -> None:
    file = tmp_path / "a.ipynb"
    cell = {"cell_type": "code", "source": ["!false | cat"]}
    file.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    assert "status 1" in run(file).stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_output_is_small_and_of_no_particular_machine(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert len(json.dumps(content)) < 30_000
    for cell in content["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert all(o["output_type"] == "stream" for o in cell["outputs"])
        text = "".join("".join(o["text"]) for o in cell["outputs"])
        assert "/tmp" not in text and "Error" not in text and "Warning" not in text
        if "own-machine" in cell["metadata"].get("tags", ()):
            assert not cell["outputs"]


def test_the_notebooks_are_those_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert len(NOTEBOOKS) == 3
    for notebook in NOTEBOOKS:
        assert f"notebooks/{notebook.stem}.md" in navigation
