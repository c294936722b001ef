"""Which module imports which, read from the sources: for tests of a package's layers."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

Parts = tuple[str, ...]


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def modules(*folders: Path) -> list[Path]:
    """All Python files below the folders."""
    found = (p for folder in folders for p in folder.rglob("*.py"))
    return sorted(p for p in found if "__pycache__" not in p.parts)


def imports(path: Path, *, at_import: bool = False) -> Iterator[Parts]:
    """Absolute names that a file imports, in parts: ``from .a import b`` in package p is (p, a, b).

    ``at_import``: only those that run when the module is imported, not those in the body of a function.
    """
    package = path.relative_to(ROOT).parts[:-1]
    tree = _tree(path)
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = (*base, *node.module.split(".")) if node.module else base
            for alias in node.names:
                yield (*base, alias.name)


def circle(paths: Collection[Path]) -> list[str]:
    """Modules that import each other in a circle while they are imported; empty if there is none.

    The face of a package (``__init__``) may import from its modules, which may name it: it counts as no module.
    """
    names = {path.relative_to(ROOT).with_suffix("").parts: path for path in paths}
    graph = {
        own: {
            target
            for parts in imports(path, at_import=True)
            for target in (parts, parts[:-1])
            if target in names and target != own
        }
        for own, path in names.items()
        if path.name != "__init__.py"
    }
    done: set[Parts] = set()

    def walk(own: Parts, way: list[Parts]) -> list[Parts]:
        if own in way:
            return [*way[way.index(own) :], own]
        if own in done:
            return []
        done.add(own)
        for other in sorted(graph[own]):
            if found := walk(other, [*way, own]):
                return found
        return []

    for start in graph:
        if found := walk(start, []):
            return [".".join(parts) for parts in found]
    return []


def table(page: Path, heading: str) -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the first table below a heading of a Markdown page.

    The first column names the room (`` `spec/` ``), the last one those that it may import, with commas between.
    "all above" are the rooms of the rows before; words that are no rooms (``torch``) are left out.
    """
    text = page.read_text(encoding="utf-8").split(f"{heading}\n", 1)[1]
    rows = [
        line
        for line in text[: text.index("\n\n", text.index("|"))].splitlines()
        if line.startswith("|")
    ]
    found: dict[str, set[str]] = {}
    for row in rows[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        words = {word.strip() for word in cells[-1].split(",")}
        may = set(found) if "all above" in words else words & set(found)
        found[cells[0].strip("`").removesuffix("/").removesuffix(".py")] = may
    return found


def upward(
    paths: Collection[Path], top: Parts, allowed: Mapping[str, Collection[str]]
) -> list[str]:
    """Imports of a room of the package ``top`` from another room that the table does not name."""
    wrong = []
    for path in paths:
        own = room(path.relative_to(ROOT).with_suffix("").parts, top, allowed)
        for parts in imports(path):
            other = room(parts, top, allowed)
            if own and other and other != own and other not in allowed[own]:
                wrong.append(f"{path.relative_to(ROOT)} imports {'.'.join(parts)}")
    return wrong


def room(parts: Parts, top: Parts, rooms: Collection[str]) -> str | None:
    """The room of the package ``top`` that a module or a name in it belongs to; None outside."""
    if parts[: len(top)] != top or len(parts) <= len(top):
        return None
    return parts[len(top)] if parts[len(top)] in rooms else None
