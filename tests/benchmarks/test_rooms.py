"""The rooms of the benchmarks: what each may import, of each other and of fastfilm."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support import rooms

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "counted": (),
    "measure": ("counted",),
    "subjects": ("counted", "measure"),
    "paper": ("measure",),
    "suites": ("counted", "measure", "subjects"),
    "pages": ("paper",),
    "campaign": ("counted", "measure", "subjects", "suites", "pages"),
}
"""Room -> those that it may import; the table of docs/benchmarks.md."""

PUBLIC = ("fastfilm.machine", "fastfilm.phantom")
"""Modules that every room may import beside the names of fastfilm itself."""

FURTHER: dict[str, tuple[str, ...]] = {
    "counted": ("fastfilm",),
    "measure": ("fastfilm.tuning.clock",),
    "subjects": ("fastfilm.tuning.cost",),
    "paper": ("fastfilm.segmentation",),
    "suites": (),
    "pages": (),
    "campaign": ("fastfilm.tuning.cost",),
}
"""Room -> what else it may import of fastfilm; the same table."""

CLOCKS = {
    "perf_counter",
    "perf_counter_ns",
    "process_time",
    "process_time_ns",
    "thread_time",
    "time",
}
"""Functions of the module ``time`` that measure; ``monotonic`` is for bounds of processes."""


def files(room: str) -> list[Path]:
    return rooms.modules(BENCHMARKS / room)


def where(path: Path) -> str:
    return str(path.relative_to(BENCHMARKS))


def test_the_benchmarks_are_rooms_a_command_and_results() -> None:
    found = {p.name for p in BENCHMARKS.iterdir() if p.name != "__pycache__"}
    assert found == {*MAY_IMPORT, "results", "__init__.py", "run.py", "cli.py", "gpu.sh"}


def test_a_room_imports_rooms_below_it_alone() -> None:
    assert not list(rooms.upwards(MAY_IMPORT, BENCHMARKS, BENCHMARKS))
    assert max(rooms.levels(MAY_IMPORT).values()) <= 5


def test_no_two_modules_import_each_other() -> None:
    assert not rooms.circles(BENCHMARKS, BENCHMARKS)


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _of_fastfilm(path: Path) -> set[str]:
    """Modules and names of fastfilm that a file imports, also by name: ``import_module("fastfilm.ops")``."""
    found = {".".join(n) for n in rooms.imported(path, BENCHMARKS) if n[0] == "fastfilm"}
    for node in ast.walk(rooms.tree(path)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0].value
            if called == "import_module" and str(name).startswith("fastfilm."):
                found.add(name)
        # fastfilm.ops.spec…, by way of the package's name
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("fastfilm."):
            found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize("room", [name for name in MAY_IMPORT if name != "counted"])
def test_only_counted_looks_inside_the_package(room: str) -> None:
    import fastfilm

    wrong = []
    public = {f"fastfilm.{name}" for name in fastfilm.__all__}
    for path in files(room):
        for name in _of_fastfilm(path):
            allowed = name == "fastfilm" or any(f"{name}.".startswith(f"{p}.") for p in public)
            allowed |= any(f"{name}.".startswith(f"{m}.") for m in (*PUBLIC, *FURTHER[room]))
            if not allowed or any(map(_private, name.split("."))):
                wrong.append(f"{where(path)}: {name}")
    assert not wrong


def test_the_commands_look_inside_nothing() -> None:
    for name in ("run.py", "cli.py"):
        assert not _of_fastfilm(BENCHMARKS / name)


def test_what_is_counted_reads_no_clock() -> None:
    wrong = []
    for path in files("counted"):
        names = {".".join(n) for n in rooms.imported(path, BENCHMARKS)}
        wrong += [f"{where(path)}: {n}" for n in names if n.startswith("fastfilm.tuning.clock")]
        for node in ast.walk(rooms.tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time":
                wrong += [f"{where(path)}: time.{node.attr}"] * (node.attr in CLOCKS)
    assert not wrong


def test_the_page_has_the_table() -> None:
    found = rooms.table(PAGE, "## Rooms")
    assert list(found) == list(MAY_IMPORT)
    for room, (_, below, further) in found.items():
        said = [] if below == "none" else below.split(", ")
        assert said == [f"`{name}`" for name in MAY_IMPORT[room]], room
        said = {"": [], "its inside": ["fastfilm"]}.get(
            further, [m.strip("`") for m in further.split(", ")]
        )
        assert said == list(FURTHER[room]), room
