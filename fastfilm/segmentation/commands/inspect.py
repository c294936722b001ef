"""``fastfilm inspect``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.console import say
from fastfilm.segmentation.figures import film_components, film_heat_maps, save
from fastfilm.segmentation.inspection import inspect, save_npz
from fastfilm.segmentation.model_folder import load_model


def command(
    model: Annotated[Path, typer.Argument(help="model folder")],
    out: Annotated[Path | None, typer.Argument(help="none: MODEL/inspect")] = None,
    weights: Annotated[str, typer.Option(help="best or final")] = "best",
) -> None:
    """Shows what the metadata do: γ and β of each layer and value, as film.npz, heat maps and components."""
    out = out or model / "inspect"
    found = inspect(load_model(model, weights=weights))
    save_npz(out / "film.npz", found)
    for i in found:
        name = re.sub(r"[^\w.=+-]", "_", i.key)
        save(film_heat_maps(i), out / f"{name}_heat_map.png")
        save(film_components(i), out / f"{name}_components.png")
        for layer in i.layers:
            spread = max(float(layer.gamma.std(0).max()), float(layer.beta.std(0).max()))
            say(
                f"{i.key}, {layer.name}: γ or β differ by up to {spread:.3g} (deviation over values)"
            )
    say(f"written to {out}: film.npz, heat maps and principal components of {len(found)} key(s)")
