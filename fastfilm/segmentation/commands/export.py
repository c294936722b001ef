"""``fastfilm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.models.exchange import export_onnx
from fastfilm.segmentation.models.folder import load_model
from fastfilm.segmentation.support.console import say
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.records import check_writable

SUFFIXES = (".onnx",)


def command(
    model: Annotated[Path, typer.Argument(help="model folder")],
    out: Annotated[Path, typer.Argument(help="file to write, .onnx")],
    weights: Annotated[str, typer.Option(help="best or final")] = "best",
) -> None:
    """Writes the network as ONNX, with the metadata row as second input, and checks it with ONNX Runtime."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{out}: must end in {' or '.join(SUFFIXES)}, got {out.suffix or 'no ending'}"
        )
    if out.is_dir():
        raise UserError(f"{out}: is a folder")
    check_writable(out.parent)
    difference = export_onnx(load_model(model, weights=weights), out)
    checked = (
        "onnxruntime is not installed, not checked"
        if difference is None
        else (f"ONNX Runtime agrees to {difference:.1e}")
    )
    say(f"written: {out}; {checked}")
