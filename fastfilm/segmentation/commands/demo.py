"""``fastfilm demo``."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.commands import cli
from fastfilm.segmentation.data.demo import write_configuration, write_data_set
from fastfilm.segmentation.support.console import bar, say
from fastfilm.segmentation.support.errors import UserError


def command(
    folder: Annotated[Path, typer.Argument(help="folder to work in; must not be there yet")] = Path(
        "fastfilm-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="a few steps only: shows that everything runs")
    ] = False,
    only_data: Annotated[
        bool, typer.Option("--only-data", help="write data and configuration, run no command")
    ] = False,
) -> int:
    """Plans, trains, predicts, evaluates and reports on phantoms whose target depends on the tumour type.

    Takes about three minutes on two CPU cores and prints every command that it runs.
    """
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise UserError(f"{folder}: is there already; give another folder")
    begun = time.monotonic()
    with bar("making phantoms") as progress:
        write_data_set(folder / "data", 9 if quick else 30, progress=progress)
    write_configuration(folder / "config.yaml", quick)
    if only_data:
        say(f"written to {folder}: data, config.yaml")
        return 0
    plan, model, real, swap = (str(folder / n) for n in ("plan", "model", "predicted", "swapped"))
    report = str(folder / "report")
    steps = [
        ["plan", str(folder / "config.yaml"), plan],
        ["train", plan, model, "--fold", "0"],
        ["predict", model, plan, real],
        ["predict", model, plan, swap, "--swap", "tumor_type"],
        ["evaluate", swap],
        ["evaluate", real, "--compare", str(folder / "swapped" / "tumor_type=unknown")],
        ["report", report, "--model", model, "--evaluated", real,
         "--compare", str(folder / "swapped" / "tumor_type=unknown"), "--swapped", swap],
    ]  # fmt: skip
    for name, *arguments in steps:
        say(f"\n$ fastfilm {name} {shlex.join(arguments)}")
        status = cli.run(name, arguments)
        if status:
            return status
    say(
        f"\nDone in {time.monotonic() - begun:.0f} s. The report: {(folder / 'report' / 'report.html').resolve()}"
    )
    return 0
