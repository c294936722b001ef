"""``fastfilm audit``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.audit import audit
from fastfilm.segmentation.audit.page import lines, page
from fastfilm.segmentation.config.schema import read_config
from fastfilm.segmentation.data.plan import make_plan, read_plan
from fastfilm.segmentation.support.console import bar, say
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.files import write_json, write_text
from fastfilm.segmentation.support.records import check_writable


def command(
    source: Annotated[
        Path, typer.Argument(metavar="PLAN", help="plan folder, or configuration (.yaml)")
    ],
    out: Annotated[
        Path | None, typer.Option(help="folder to write to; none: audit, in or beside PLAN")
    ] = None,
    seed: Annotated[int, typer.Option(help="of cross-validation, bootstrap, permutations")] = 0,
) -> None:
    """Looks for shortcuts in the metadata before any training: leaks, confounding, rare values.

    A configuration is planned first, with all of plan's checks, in a folder that is not kept.
    """
    if seed < 0:
        raise UserError(f"--seed must not be negative, got {seed}")
    configured = source.suffix in (".yaml", ".yml")
    out = out or (source.parent if configured else source) / "audit"
    check_writable(out)
    with tempfile.TemporaryDirectory() as folder:
        if configured:
            with bar("checking") as task:
                plan, notes = make_plan(read_config(source), Path(folder) / "plan", task)
            for note in notes:
                say(f"note: {note}")
        else:
            plan = read_plan(source)
        with bar("auditing") as task:
            result = audit(plan, seed, task)
    write_json(out / "audit.json", result)
    write_text(out / "audit.html", page(result))
    for line in lines(result):
        say(line)
    say(f"written to {out}: audit.json, audit.html")
