"""Images as training reads them: NIfTI -> array and affine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from .errors import UserError
from .preprocessing import Volume


@dataclass(frozen=True)
class NiftiVolume:
    """``array`` [X, Y, Z] in the file's order, ``affine`` [4, 4] (voxel -> mm)."""

    array: Volume
    affine: Volume


def read_volume(path: Path) -> NiftiVolume:
    """A 3D image from a NIfTI file; integers stay integers if the file does not scale them.

    Raises:
        UserError: missing, empty, truncated or not NIfTI, not 3D, with the file's name.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        image: Any = nib.load(path)
        array = np.asanyarray(image.dataobj)
    except Exception as error:  # nibabel, gzip and zlib each have their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as NIfTI: {reason}") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise UserError(f"{path}: must be one 3D volume, its shape is {array.shape}")
    return NiftiVolume(np.asarray(array), np.asarray(image.affine))


GRID_TOLERANCE = 0.1
"""Voxels by which positions on one grid may differ, where nothing else is configured."""


def same_grid(a: NiftiVolume, b: NiftiVolume, tolerance: float = GRID_TOLERANCE) -> str | None:
    """None if both have one grid, else what differs (positions by more than ``tolerance`` voxels)."""
    if a.array.shape != b.array.shape:
        return f"shapes {a.array.shape} and {b.array.shape}"
    size = np.sqrt((a.affine[:3, :3] ** 2).sum(0)).min()
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners[:, :3] *= np.array(a.array.shape) - 1
    far = np.abs(corners @ (a.affine - b.affine).T).max()
    if far <= tolerance * size:
        return None
    return f"affines that place voxels up to {far:.3g} mm apart (data.grid_tolerance)"
