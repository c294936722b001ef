"""The rooms of the package: what each may import, and how far a call travels through them."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import fastfilm
from benchmarks.counted import python_calls
from tests.support import rooms

PACKAGE = Path(fastfilm.__file__).parent
OPS = PACKAGE / "ops"

ROOMS = (
    *("spec", "settings", "vendor", "reference", "launchers"),
    *("choice", "operators", "maps", "block"),
)
"""The rooms of ``fastfilm.ops``, each of which may import those before it; the table of docs/design.md."""

MAY_IMPORT = {
    "spec": (),
    "settings": ("spec",),
    "vendor": ("spec",),
    "reference": ("spec", "vendor"),
    "launchers": ("spec", "settings", "vendor", "reference"),
    "choice": ("spec", "settings", "launchers"),
    "operators": ("spec", "settings", "reference", "launchers"),
    "maps": ("spec", "settings", "reference", "launchers", "choice", "operators"),
    "block": ROOMS[:-1],
}


def test_ops_has_at_most_nine_rooms() -> None:
    found = {p.name for p in OPS.iterdir() if p.name != "__pycache__"}
    assert found == {*ROOMS, "__init__.py"}


def test_a_room_imports_rooms_below_it_alone() -> None:
    assert not list(rooms.upwards(MAY_IMPORT, OPS, PACKAGE))


def test_the_rooms_are_in_order_and_on_few_levels() -> None:
    assert tuple(MAY_IMPORT) == ROOMS
    assert max(rooms.levels(MAY_IMPORT).values()) <= 8


def test_nothing_below_imports_the_package_or_the_rooms_above_ops() -> None:
    wrong = []
    for path in rooms.modules(OPS):
        for parts in rooms.imported(path, PACKAGE):
            inside = parts[:2] == ("fastfilm", "ops") or parts[:2] == ("fastfilm", "kernels")
            if parts[0] in ("fastfilm", "benchmarks", "tests") and not inside:
                wrong.append(f"{path.relative_to(OPS)} imports {'.'.join(parts)}")
    assert not wrong


def test_no_two_modules_of_a_room_import_each_other() -> None:
    assert not rooms.circles(OPS, PACKAGE)


def test_few_functions_have_many_parameters() -> None:
    many = []
    for path in itertools.chain(rooms.modules(OPS), (PACKAGE.parent / "kernels").glob("*.py")):
        for node in ast.walk(rooms.tree(path)):
            if not isinstance(node, ast.FunctionDef) or node.name == "__init__":
                continue
            if any("jit" in ast.unparse(d) for d in node.decorator_list):
                continue
            args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if len([a for a in args if a.arg not in ("self", "cls", "ctx")]) >= 8:
                many.append(f"{path.name}: {node.name}")
    assert len(many) <= 25, many


def test_one_block_takes_few_python_calls() -> None:
    pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
    found = python_calls.of_block()
    assert found["forward"].calls <= 50 and found["forward"].moves <= 20, found
    assert found["inference"].calls <= 50 and found["inference"].moves <= 20, found
