"""Which modules of a package import which, read from their sources, and tables of the documentation: for tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Name = tuple[str, ...]
"""An absolute name in parts, such as ("fastfilm", "ops", "spec")."""


def modules(folder: Path) -> list[Path]:
    """Python files in a folder and below."""
    return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


def tree(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _absolute(node: ast.ImportFrom, package: Name) -> Name:
    base = package[: len(package) - node.level + 1] if node.level else ()
    return (*base, *node.module.split(".")) if node.module else base


def imported(path: Path, top: Path) -> list[Name]:
    """Absolute names that a file imports, anywhere in it; ``top``: the folder of its outermost package."""
    package = (top.name, *path.relative_to(top).parts[:-1])
    found: list[Name] = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [tuple(a.name.split(".")) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            found += [(*base, a.name) for a in node.names]
    return found


def upwards(
    rooms: Mapping[str, Sequence[str]], folder: Path, top: Path
) -> Iterator[tuple[str, Name]]:
    """(file, name) of each import by a room of ``folder`` of another one that it may not import.

    Args:
        rooms: room -> the rooms that it may import.
        top: folder of the outermost package, in which ``folder`` lies.
    """
    prefix = (top.name, *folder.relative_to(top).parts)
    for path in modules(folder):
        own = path.relative_to(folder).parts[0]
        for name in imported(path, top) if own in rooms else ():
            other = name[len(prefix)] if len(name) > len(prefix) else None
            inside = name[: len(prefix)] == prefix and other in rooms
            if inside and other != own and other not in rooms[own]:
                yield str(path.relative_to(folder)), name


def levels(rooms: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Room -> 1 + the highest level of those that it may import.

    Raises:
        ValueError: a room may import one that does not come before it.
    """
    level: dict[str, int] = {}
    for name, below in rooms.items():
        late = [b for b in below if b not in level]
        if late:
            raise ValueError(f"{name} imports {late[0]}, which does not come before it")
        level[name] = 1 + max((level[b] for b in below), default=0)
    return level


def circles(folder: Path, top: Path) -> list[str]:
    """Modules that import themselves by way of others when they are imported, packages' faces apart."""
    names = {
        ".".join((top.name, *p.relative_to(top).with_suffix("").parts)) for p in modules(folder)
    }
    graph: dict[str, set[str]] = {}
    for path in modules(folder):
        own = ".".join((top.name, *path.relative_to(top).with_suffix("").parts))
        package = (top.name, *path.relative_to(top).parts[:-1])
        # what is imported when a module is, not in a function's body
        for node in tree(path).body:
            if isinstance(node, ast.ImportFrom):
                base = ".".join(_absolute(node, package))
                targets = [f"{base}.{a.name}" for a in node.names] + [base]
                graph.setdefault(own, set()).update(t for t in targets if t in names and t != own)
    found = []
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), ()):
                if other == start:
                    found.append(start)
                elif other not in seen:
                    seen.add(other)
                    waiting.append(other)
    return sorted(set(found))


def table(page: Path, heading: str) -> dict[str, list[str]]:
    """The first table below a heading of a Markdown page: first cell, without marks -> the other cells."""
    text = page.read_text(encoding="utf-8")
    part = re.split(r"^#+ ", text.split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {cells[0].strip("`/"): cells[1:] for cells in rows}
