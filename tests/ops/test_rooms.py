"""The rooms of the package: what each may import, and how far a call travels through them."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

import fastfilm
from benchmarks import python_calls

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


def modules() -> list[Path]:
    return sorted(p for p in OPS.rglob("*.py") if "__pycache__" not in p.parts)


def imported(path: Path) -> list[tuple[str, ...]]:
    """Absolute names of the modules that a file imports, anywhere in it, in parts."""
    package = ("fastfilm", *path.relative_to(PACKAGE).parts[:-1])
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [tuple(a.name.split(".")) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            found += [(*base, a.name) for a in node.names]
    return found


def room(parts: tuple[str, ...]) -> str | None:
    """The room of ``fastfilm.ops`` that a name is in; None outside."""
    return parts[2] if len(parts) > 2 and parts[:2] == ("fastfilm", "ops") else None


def test_ops_has_at_most_nine_rooms() -> None:
    found = {p.name for p in OPS.iterdir() if p.name != "__pycache__"}
    assert found == {*ROOMS, "__init__.py"}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_rooms_below_it_alone(name: str) -> None:
    wrong = []
    for path in modules():
        if path.relative_to(OPS).parts[0] != name:
            continue
        for parts in imported(path):
            other = room(parts)
            if other in ROOMS and other != name and other not in MAY_IMPORT[name]:
                wrong.append(f"{path.relative_to(OPS)} imports {'.'.join(parts)}")
    assert not wrong


def test_the_rooms_are_in_order_and_on_few_levels() -> None:
    level: dict[str, int] = {}
    for name in ROOMS:
        assert all(b in level for b in MAY_IMPORT[name]), f"{name} imports a room behind it"
        level[name] = 1 + max((level[b] for b in MAY_IMPORT[name]), default=0)
    assert max(level.values()) <= 8


def test_nothing_below_imports_the_package_or_the_rooms_above_ops() -> None:
    wrong = []
    for path in modules():
        for parts in imported(path):
            inside = parts[:2] == ("fastfilm", "ops") or parts[:2] == ("fastfilm", "kernels")
            if parts[0] in ("fastfilm", "benchmarks", "tests") and not inside:
                wrong.append(f"{path.relative_to(OPS)} imports {'.'.join(parts)}")
    assert not wrong


def test_no_two_modules_of_a_room_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    names = {
        ".".join(("fastfilm", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in modules()
    }
    for path in modules():
        own = ".".join(("fastfilm", *path.relative_to(PACKAGE).with_suffix("").parts))
        # what is imported when a module is, not in a function's body
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {id(n) for n in tree.body}
        package = ("fastfilm", *path.relative_to(PACKAGE).parts[:-1])
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) not in top or not node.level:
                continue
            base = ".".join(
                (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            )
            base = base.rstrip(".")
            targets = [f"{base}.{a.name}" for a in node.names] + [base, f"{base}.__init__"]
            graph.setdefault(own, set()).update(t for t in targets if t in names and t != own)
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                assert other != start or other.endswith("__init__"), (
                    f"{start} imports itself by a circle"
                )
                if other not in seen and not other.endswith("__init__"):
                    seen.add(other)
                    waiting.append(other)


def test_few_functions_have_many_parameters() -> None:
    many = []
    for path in itertools.chain(modules(), (PACKAGE.parent / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
