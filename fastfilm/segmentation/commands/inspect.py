"""``fastfilm inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.models.folder import load_model
from fastfilm.segmentation.reports.figures import (
    film_components,
    film_heat_maps,
    png,
    write_png,
)
from fastfilm.segmentation.reports.inspection import (
    inspect,
    save_npz,
    spread,
)
from fastfilm.segmentation.reports.layout import plain
from fastfilm.segmentation.support.console import say
from fastfilm.segmentation.support.names import file_name
from fastfilm.segmentation.support.records import check_writable

MOST = 3
"""Layers of a key that are named without ``--layers``."""


def command(
    model: Annotated[Path, typer.Argument(help="model folder")],
    out: Annotated[Path | None, typer.Argument(help="none: MODEL/inspect")] = None,
    weights: Annotated[str, typer.Option(help="best or final")] = "best",
    layers: Annotated[bool, typer.Option("--layers", help="print every layer")] = False,
) -> None:
    """Shows what the metadata do: γ and β of each layer and value, as film.npz, heat maps and components."""
    out = out or model / "inspect"
    loaded = load_model(model, weights=weights)
    check_writable(out)
    found = inspect(loaded)
    pictures = {}
    for i in found:
        pictures[f"{file_name(i.key)}_heat_map.png"] = png(film_heat_maps(i))
        pictures[f"{file_name(i.key)}_components.png"] = png(film_components(i))
    save_npz(out / "film.npz", found)
    for name, picture in pictures.items():
        write_png(out / name, picture)
    say("how far γ and β of a layer differ: largest standard deviation over the values of a key")
    for i in found:
        ranked = sorted(i.layers, key=spread, reverse=True)
        shown = i.layers if layers else ranked[:MOST]
        most = f"most in {ranked[0].name}, {spread(ranked[0]):.3g}"
        say(f"{plain(i.key)}: {len(i.values)} values, {len(i.layers)} layers; {most}")
        for layer in shown:
            say(f"  {spread(layer):10.6f}  {layer.name}")
        if len(shown) < len(i.layers):
            say(f"  {len(i.layers) - len(shown)} further layers differ less; --layers prints all")
    say(f"written to {out}: film.npz, heat maps and principal components of {len(found)} key(s)")
