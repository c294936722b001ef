"""Runs notebooks without Jupyter, each in a process and folder: python docs/tools/notebooks.py [--write] FILE…

Cells are Python; a line that begins with ``!`` is a command. ``--write`` keeps what the cells print in the file.
Cells with the tag ``own-machine`` print figures of the machine, which are not kept.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_COMMAND = re.compile(r"^(\s*)!(.+)$", re.MULTILINE)
_PROGRAM = re.compile(r"^fastfilm\b")
OWN_MACHINE = "own-machine"


def command(line: str) -> None:
    """Runs ``line`` in a shell and prints what it prints; ``fastfilm`` is this interpreter's.

    Raises:
        RuntimeError: its status is not 0.
    """
    line = _PROGRAM.sub(f"{sys.executable} -m fastfilm", line)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, end="")
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {line}")


def run(cells: list[dict[str, Any]]) -> list[str]:
    """What each cell prints, and the value of its last line; all cells share one set of names.

    Raises:
        whatever a cell raises, with the cell's number.
    """
    names: dict[str, Any] = {"__name__": "__main__", "_command": command}
    printed = []
    for number, cell in enumerate(cells):
        out = io.StringIO()
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            code = _COMMAND.sub(lambda m: f"{m[1]}_command({m[2]!r})", source)
            with contextlib.redirect_stdout(out):
                try:
                    _execute(code, f"cell {number}", names)
                except Exception:
                    print(f"in cell {number}, which had printed:", file=sys.stderr)
                    print(out.getvalue(), file=sys.stderr)
                    raise
        printed.append(out.getvalue().replace(f"{Path.cwd()}/", ""))
    return printed


def _execute(code: str, name: str, names: dict[str, Any]) -> None:
    body = ast.parse(code)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    exec(compile(body, name, "exec"), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), name, "eval"), names)
        if value is not None:
            print(repr(value))


def written(notebook: dict[str, Any], printed: list[str]) -> str:
    """The notebook's JSON with these outputs."""
    for number, (cell, text) in enumerate(zip(notebook["cells"], printed, strict=True)):
        cell["id"] = f"cell-{number:02d}"
        cell.setdefault("metadata", {})
        if cell["cell_type"] != "code":
            continue
        cell["execution_count"] = None
        keep = text and OWN_MACHINE not in cell["metadata"].get("tags", ())
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}
        cell["outputs"] = [stream] if keep else []
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _main(file: Path, write: bool) -> None:
    notebook = json.loads(file.read_text(encoding="utf-8"))
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1"}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        printed = run(notebook["cells"])
        os.chdir(home)
    if write:
        file.write_text(written(notebook, printed), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="keep the output in the file")
    given = parser.parse_args()
    for path in given.files:
        if len(given.files) == 1:
            _main(path.resolve(), given.write)
        else:
            words = [sys.executable, __file__, *["--write"] * given.write, str(path)]
            subprocess.run(words, check=True)
