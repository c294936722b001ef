"""``fastfilm report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.reports.page import write_report
from fastfilm.segmentation.support.console import say


def command(
    out: Annotated[Path, typer.Argument(help="folder to write report.html and its pictures to")],
    model: Annotated[Path | None, typer.Option(help="model folder: curves, γ and β")] = None,
    evaluated: Annotated[
        Path | None, typer.Option(help="folder that was evaluated: tables, overlays")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="another evaluated folder of the same cases")
    ] = None,
    swapped: Annotated[Path | None, typer.Option(help="evaluated folder of predict --swap")] = None,
) -> None:
    """Makes one self-contained HTML file of what is given, and its pictures as PNG files."""
    path = write_report(out, model=model, evaluated=evaluated, compared=compare, swapped=swapped)
    say(f"written: {path}")
