"""Which module imports which, read from the sources: for tests of a package's layers."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

Parts = tuple[str, ...]


@cache
def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
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
    found = tree(path)
    for node in found.body if at_import else ast.walk(found):
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


def rows(page: Path, heading: str) -> dict[str, list[str]]:
    """First cell, a name of a folder or file without its marks -> all cells: the first table below a heading."""
    text = page.read_text(encoding="utf-8").split(f"\n{heading}\n", 1)[1]
    lines = text[text.index("|") : text.index("\n\n", text.index("|"))].splitlines()
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {cells[0].strip("`").removesuffix("/").removesuffix(".py"): cells for cells in found}


def words(cell: str) -> list[str]:
    """What stands in a cell, with commas between, without marks."""
    return [word.strip().strip("`") for word in cell.split(",") if word.strip()]


def table(page: Path, heading: str, column: int = 2) -> dict[str, list[str]]:
    """Room -> the rooms that it may import, as the first table below a heading says.

    The first column names the room (`` `spec/` ``), ``column`` those that it may import. "all above" are the
    rooms of the rows before; words that are no rooms of rows before (``torch``) are left out.
    """
    found: dict[str, list[str]] = {}
    for name, cells in rows(page, heading).items():
        said = words(cells[column])
        found[name] = [*found] if "all above" in said else [r for r in found if r in said]
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
