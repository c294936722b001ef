"""Label files as whole numbers: what is written nearly whole is rounded, soft masks are cut at one half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..support.errors import UserError
from .preprocessing import Volume

NEARLY = 1e-3
"""How far a label's value may be from a whole number (255 with a slope of 1/255 is not quite 1)."""

SHOWN = 5
"""Values that a message lists."""


def whole_labels(path: Path, array: Volume) -> tuple[NDArray[np.integer], bool]:
    """The label values of a file as whole numbers, and whether it was a soft mask.

    A file with values between whole numbers that all lie in 0..1 is a soft mask (a probability, a fraction of the
    voxel): its voxels of 1/2 and more are 1, the others 0.

    Raises:
        UserError: NaN or infinity; values that are neither whole nor in 0..1; the file and the values are named.
    """
    if array.dtype.kind == "b":
        return array.astype(np.uint8), False
    if array.dtype.kind in "iu":
        return array, False
    if array.dtype.kind != "f":
        raise UserError(f"{path}: label values must be numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: label values are NaN or infinite")
    whole = np.rint(array)
    between = np.abs(array - whole) > NEARLY
    if not between.any():
        if np.abs(whole).max(initial=0) >= 2**31:
            raise UserError(
                f"{path}: a label value of {np.abs(whole).max():.3g}: the file is damaged"
            )
        return whole.astype(np.int32), False
    if array.min() >= -NEARLY and array.max() <= 1 + NEARLY:
        return (array >= 0.5).astype(np.uint8), True
    found = np.unique(array[between])
    raise UserError(
        f"{path}: label values {listed(found.tolist())} are neither whole numbers nor those of a soft mask (0 to"
        f" 1); {int(between.sum())} voxels have such values"
    )


def mask_of(
    path: Path, labels: NDArray[np.integer], values: Sequence[int] | None
) -> NDArray[np.bool_]:
    """Where the label is: its ``values``, or, in a mask of its own, all that is above 0.

    Raises:
        UserError: a mask of its own with values below 0.
    """
    if values:
        return np.asarray(np.isin(labels, list(values)))
    if labels.size and labels.min() < 0:
        raise UserError(f"{path}: a mask with values below 0 ({int(labels.min())})")
    return np.asarray(labels > 0)


def listed(values: Sequence[float]) -> str:
    """The first few values, with as many digits as tell them apart from whole numbers."""
    text = ", ".join(f"{v:.10g}" for v in list(values)[:SHOWN])
    return text + (" …" if len(values) > SHOWN else "")
