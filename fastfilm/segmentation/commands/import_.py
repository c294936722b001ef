"""``fastfilm import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastfilm.segmentation.images.preprocessing import AXES
from fastfilm.segmentation.models.exchange import import_ivadomed
from fastfilm.segmentation.support.console import say
from fastfilm.segmentation.support.errors import UserError


def command(
    weights: Annotated[Path, typer.Argument(help="state_dict: .safetensors, or of torch.save")],
    model: Annotated[Path, typer.Argument(help="model folder to write; empty or not there yet")],
    contrast: Annotated[list[str], typer.Option(help="name of an image channel; repeat")],
    label: Annotated[list[str], typer.Option(help="name of an output, without background; repeat")],
    patch: Annotated[str, typer.Option(help="window in voxels: H,W or D,H,W")],
    metadata: Annotated[
        str | None, typer.Option(help="KEY=VALUE,VALUE… in the order of the one-hot columns")
    ] = None,
    slices: Annotated[str, typer.Option(help="2D: sagittal, coronal or axial")] = "axial",
) -> None:
    """Makes a model folder of the weights of an ivadomed FiLMedUnet, Unet or Modified3DUNet."""
    if slices not in AXES:
        raise UserError(f"--slices must be one of {', '.join(AXES)}, got {slices!r}")
    keys: dict[str, list[str]] = {}
    if metadata is not None:
        key, sign, values = metadata.partition("=")
        if not (sign and key.strip() and values.strip()):
            raise UserError(f"--metadata takes KEY=VALUE,VALUE…, got {metadata!r}")
        keys[key.strip()] = [v.strip() for v in values.split(",")]
    try:
        size = [int(n) for n in patch.split(",")]
    except ValueError:
        raise UserError(f"--patch takes whole numbers, got {patch!r}") from None
    if any(n < 1 for n in size):
        raise UserError(f"--patch takes numbers above 0, got {patch!r}")
    info = import_ivadomed(
        weights,
        model,
        metadata=keys,
        contrasts=contrast,
        labels=label,
        patch_size=size,
        slice_axis=AXES.index(slices),  # type: ignore[arg-type]
    )
    say(f"written: {model}: {info.network.name}, {info.spatial_dims}D, z-score normalisation")
