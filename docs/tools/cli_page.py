"""Writes the reference of the command line from the commands: python docs/tools/cli_page.py docs/cli.md"""

from __future__ import annotations

import argparse
import importlib
import inspect
import keyword
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import typer

from fastfilm.__main__ import COMMANDS, Command, cli

HEAD = """\
# Command line

This page is made from the commands themselves; `fastfilm COMMAND --help` prints the same. `python -m fastfilm`
stands for `fastfilm` where the program is not on the path. A command ends with status 0 if all went well, 1 after
an error that its message explains, 2 for a wrong command line, and 130 (143 by SIGTERM) when it was interrupted.

"""
KINDS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True)
class Argument:
    """An argument or an option: how it is written, whether it must be given, its default and its help."""

    names: tuple[str, ...]
    value: str
    positional: bool
    needed: bool
    default: str
    meaning: str

    @property
    def shown(self) -> str:
        """As the page writes it."""
        return ", ".join(self.names) + (f" {self.value}" if self.names and self.value else "")


def commands() -> dict[str, str]:
    """Every command and its line of help, in the order of ``fastfilm --help``."""
    return {c.name: c.summary for c in COMMANDS} | dict(cli.SUMMARIES)


def arguments(name: str) -> list[Argument]:
    """The arguments and options of ``fastfilm NAME``, without ``--help``."""
    own = {c.name: c for c in COMMANDS}
    return list(_of_parser(own[name]) if name in own else _of_function(_function(name)))


def markdown() -> str:
    """The page."""
    rows = [["command", "does"]]
    rows += [[f"[`fastfilm {n}`](#fastfilm-{n})", summary] for n, summary in commands().items()]
    return HEAD + _table(rows) + "\n" + "\n".join(_section(n) for n in commands())


def _function(name: str) -> Any:
    file = f"{name}_" if keyword.iskeyword(name) else name
    return importlib.import_module(f"fastfilm.segmentation.commands.{file}").command


def _of_function(function: Any) -> Iterator[Argument]:
    hints = get_type_hints(function, include_extras=True)
    app = typer.Typer(add_completion=False)
    app.command()(function)
    for p in typer.main.get_command(app).params:
        if p.name == "help":
            continue
        positional = p.param_type_name == "argument"
        names = () if positional else (*p.opts, *p.secondary_opts)
        value = p.metavar or (p.name.upper() if positional else _kind(hints[p.name]))
        yield Argument(names, value, positional, p.required, _default(p.default), p.help or "")


def _kind(hint: Any) -> str:
    """The value of an option as the page writes it: ``Annotated[list[str] | None, …]`` is TEXT."""
    if hint in KINDS:
        return KINDS[hint]
    inner = [h for h in get_args(hint) if h is not NoneType]
    return _kind(inner[0]) if inner else ""


def _default(value: Any) -> str:
    return (
        ""
        if value is None or value is False
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _of_parser(own: Command) -> Iterator[Argument]:
    parser = argparse.ArgumentParser(add_help=False)
    own.arguments(parser)
    for a in parser._actions:
        value = "" if a.nargs == 0 else (a.metavar or a.dest).upper()
        if a.choices:
            value = "{" + ",".join(str(c) for c in a.choices) + "}"
        names, default = tuple(a.option_strings), _default(a.default)
        # argparse's own help has no column for it
        meaning = (a.help or "").removesuffix(f"({default})").rstrip()
        yield Argument(names, value, not names, a.required, default, meaning)


def _section(name: str) -> str:
    own = {c.name: c for c in COMMANDS}
    text = own[name].summary + "." if name in own else inspect.getdoc(_function(name)) or ""
    found = arguments(name)
    words = [f"fastfilm {name}"]
    if not all(a.positional for a in found):
        words.append("[OPTIONS]")
    words += [a.value if a.needed else f"[{a.value}]" for a in found if a.positional]
    parts = [f"## fastfilm {name}", *_paragraphs(text), f"```text\n{' '.join(words)}\n```"]
    rows = [
        [
            f"`{a.shown or a.value}`",
            "needed" if a.needed else f"`{a.default}`" * bool(a.default),
            a.meaning,
        ]
        for a in found
    ]
    if rows:
        parts.append(_table([["argument or option", "default", "meaning"], *rows]))
    return "\n\n".join(parts).rstrip("\n") + "\n"


def _paragraphs(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        line = " ".join(paragraph.split())
        yield line[0].upper() + line[1:]


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", type=Path)
    parser.parse_args().page.write_text(markdown(), encoding="utf-8")
