"""The rooms of the package import in one direction: the sources against the tables of docs/design.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.imports import ROOT, circle, imports, modules, table, upward

PACKAGE = ROOT / "fastfilm"
PAGE = ROOT / "docs" / "design.md"
FOLDERS = {
    "### The operators": ("fastfilm", "ops"),
    "### The package": ("fastfilm",),
    "### Segmentation": ("fastfilm", "segmentation"),
}
"""Headings of docs/design.md, and the package whose rooms the table below them lists."""
BELOW_THE_FACE = ("ops", "nn", "convert", "tuning")
"""Rooms that the public interface imports from, or could: they do not import it."""


@pytest.mark.parametrize("heading", FOLDERS)
def test_the_table_lists_every_room(heading: str) -> None:
    folder = ROOT.joinpath(*FOLDERS[heading])
    found = {
        p.name if p.is_dir() else p.stem
        for p in folder.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert set(table(PAGE, heading)) == found - {"__init__", "kernels"}


@pytest.mark.parametrize("heading", FOLDERS)
def test_rooms_import_what_the_table_says(heading: str) -> None:
    top = FOLDERS[heading]
    paths = modules(ROOT.joinpath(*top))
    assert upward(paths, top, table(PAGE, heading)) == []


@pytest.mark.parametrize("heading", FOLDERS)
def test_the_table_allows_nothing_that_is_not_used(heading: str) -> None:
    """Rows that end with "all above" are wider on purpose."""
    text = PAGE.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    top = FOLDERS[heading]
    for name, may in table(PAGE, heading).items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}"))
        if "all above" in row:
            continue
        inside = PACKAGE.joinpath(*top[1:], name)
        paths = modules(inside) if inside.is_dir() else [inside.with_suffix(".py")]
        used = {
            p[len(top)]
            for path in paths
            for p in imports(path)
            if p[: len(top)] == top
            if len(p) > len(top)
        }
        assert may <= used, f"{name} may import {sorted(may - used)}, and does not"


def test_nothing_imports_itself_by_a_circle() -> None:
    assert circle(modules(PACKAGE, ROOT / "kernels")) == []


def test_what_is_below_the_public_interface_does_not_import_it() -> None:
    rooms = {p.stem for p in PACKAGE.iterdir()}
    wrong = [
        f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"
        for path in modules(*(PACKAGE / name for name in BELOW_THE_FACE))
        for parts in imports(path)
        if parts[0] == "fastfilm" and (len(parts) == 1 or parts[1] not in rooms)
    ]
    assert wrong == []


def test_the_package_imports_neither_benchmarks_nor_tests() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {'.'.join(parts)}"
        for path in modules(PACKAGE, ROOT / "kernels")
        for parts in imports(path)
        if parts[0] in ("benchmarks", "tests")
    ]
    assert wrong == []


def test_the_operators_stand_on_few_levels() -> None:
    level: dict[str, int] = {}
    for name, may in table(PAGE, "### The operators").items():
        level[name] = 1 + max((level[b] for b in may), default=0)
    assert len(level) <= 9 and max(level.values()) <= 8


@pytest.mark.parametrize("fault", ["upward", "circle"])
def test_a_wrong_import_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "low/a.py": "def f():\n    from ..high import b\n"
        if fault == "upward"
        else "from . import c\n",
        "low/c.py": "from .a import f\n" if fault == "circle" else "",
        "high/b.py": "",
    }.items():
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text(text)
    monkeypatch.setattr("tests.support.imports.ROOT", tmp_path)
    paths = modules(tmp_path / "p")
    assert bool(upward(paths, ("p",), {"low": (), "high": ("low",)})) == (fault == "upward")
    assert bool(circle(paths)) == (fault == "circle")
