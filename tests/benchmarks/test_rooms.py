"""The rooms of the benchmarks: what each may import, of each other and of fastfilm."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.imports import ROOT, circle, imports, modules, rows, table, tree, upward, words

BENCHMARKS = ROOT / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"

MAY_IMPORT = table(PAGE, "## Rooms")
"""Room -> those that it may import."""

PUBLIC = ("fastfilm.machine", "fastfilm.phantom")
"""Modules that every room may import beside the names of fastfilm itself."""

FURTHER = {room: words(cells[3]) for room, cells in rows(PAGE, "## Rooms").items()}
"""Room -> what else it may import of fastfilm."""

CLOCKS = {
    "perf_counter",
    "perf_counter_ns",
    "process_time",
    "process_time_ns",
    "thread_time",
    "time",
}
"""Functions of the module ``time`` that measure; ``monotonic`` is for bounds of processes."""


def where(path: Path) -> str:
    return str(path.relative_to(BENCHMARKS))


def test_the_benchmarks_are_rooms_a_command_and_results() -> None:
    found = {p.name for p in BENCHMARKS.iterdir() if p.name != "__pycache__"}
    assert found == {*MAY_IMPORT, "results", "__init__.py", "run.py", "cli.py", "gpu.sh"}


def test_a_room_imports_rooms_below_it_alone() -> None:
    assert upward(modules(BENCHMARKS), ("benchmarks",), MAY_IMPORT) == []


def test_no_two_modules_import_each_other() -> None:
    assert circle(modules(BENCHMARKS)) == []


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _of_fastfilm(path: Path) -> set[str]:
    """Modules and names of fastfilm that a file imports, also by name: ``import_module("fastfilm.ops")``."""
    found = {".".join(n) for n in imports(path) if n[0] == "fastfilm"}
    for node in ast.walk(tree(path)):
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
    for path in modules(BENCHMARKS / room):
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
    for path in modules(BENCHMARKS / "counted"):
        names = {".".join(n) for n in imports(path)}
        wrong += [f"{where(path)}: {n}" for n in names if n.startswith("fastfilm.tuning.clock")]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "time":
                wrong += [f"{where(path)}: time.{node.attr}"] * (node.attr in CLOCKS)
    assert not wrong
