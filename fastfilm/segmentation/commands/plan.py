"""``fastfilm plan``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastfilm.segmentation.config.schema import (
    Config,
    override,
    parse,
    read_config,
)
from fastfilm.segmentation.config.settings import setting, settings
from fastfilm.segmentation.data.datasets import contrasts_in
from fastfilm.segmentation.data.plan import make_plan
from fastfilm.segmentation.support.console import bar, say
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.hints import contents
from fastfilm.segmentation.support.tables import read_table


def command(
    data: Annotated[
        Path, typer.Argument(help="configuration (.yaml), BIDS folder, or CSV/TSV table")
    ],
    plan: Annotated[Path, typer.Argument(help="folder to write the plan to")],
    contrast: Annotated[
        list[str] | None, typer.Option(help="image contrast (CSV: column); repeat for several")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE[,VALUE…] in the label files; repeat")
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY or KEY=KIND (category, continuous, …); repeat")
    ] = None,
    output: Annotated[str | None, typer.Option(help="channels, classes or task")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the configuration, e.g. training.epochs=20"),
    ] = None,
) -> None:
    """Checks a data set and decides how it is preprocessed and trained on.

    Every file is read; whatever is wrong is listed at once and nothing is written.
    """
    given = settings(set_ or [])

    def put(key: str, value: Any, option: str) -> None:
        if key in given:
            raise UserError(f"{option}: {key} is given twice")
        given[key] = value

    if output is not None:
        put("output.mode", output, "--output")
    for name in metadata or []:
        key, _, kind = name.partition("=")
        put(f"metadata.{key}", {"kind": kind} if kind else {}, "--metadata")
    if contrast:
        put("data.contrasts", contrast, "--contrast")
    for text in label or []:
        name, values = setting(text, "--label")
        put(f"data.labels.{name}", _values(text, values), "--label")
    if os.path.exists(data) and os.path.abspath(data) == os.path.abspath(plan / "config.yaml"):
        raise UserError(f"{data}: would be written over: write the plan to another folder")
    config = _config(data, given)
    with bar("checking") as task:
        made, notes = make_plan(config, plan, task)
    for note in notes:
        say(f"note: {note}")
    p = made.plan
    n = p.preprocessing
    say(
        f"{len(made.cases)} cases of {len({c.subject for c in made.cases})} subjects, {len(made.folds)}"
        f" fold(s); {p.spatial_dims}D, patch {'x'.join(map(str, p.patch_size))}, batch {p.batch_size},"
        f" {p.network.name}"
        + (f" of depth {p.network.depth}" if p.network.depth else "")
        + f", {n.channels[0].kind} normalisation, {_spacing(n.spacing)}"
    )
    say(f"written to {plan}; next: fastfilm train {plan} MODEL --fold 0")


def _spacing(spacing: Sequence[float | None]) -> str:
    axes = ("left-right", "back-front", "down-up")
    known = [f"{s:.3g} mm {axis}" for s, axis in zip(spacing, axes, strict=True) if s is not None]
    return f"resampled to {', '.join(known)}" if known else "voxels of the size that they have"


def _config(data: Path, given: dict[str, Any]) -> Config:
    if data.suffix in (".yaml", ".yml"):
        return read_config(data, given)
    source = "bids" if data.is_dir() else "csv"
    if source == "csv" and data.suffix not in (".csv", ".tsv"):
        raise UserError(
            f"{data}: expected a .yaml configuration, a BIDS folder, a .csv or .tsv table"
        )
    if "data.contrasts" not in given:
        there = contrasts_in(data) if source == "bids" else read_table(data).columns
        if not there:
            raise UserError(f"{data}: no images in sub-* folders: {contents(data)}")
        what = "the images are of" if source == "bids" else "the table has the columns"
        raise UserError(f"{data}: --contrast is needed: {what} {', '.join(there)}")
    value: dict[str, Any] = {"data": {"source": source, "root": str(data.resolve())}}
    for key, new in given.items():
        override(value, key, new)
    return parse(value, str(data))


def _values(text: str, value: Any) -> Any:
    """``1`` or ``1,2`` -> integers."""
    parts = value if isinstance(value, list) else str(value).split(",")
    try:
        return [int(p) for p in parts]
    except ValueError:
        raise UserError(f"--label takes NAME=VALUE with whole numbers, got {text!r}") from None
