"""Label files as whole numbers: nearly whole values are rounded, soft masks are cut at one half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..support.errors import UserError
from .preprocessing import Volume

NEARLY = 1e-3
"""Distance from a whole number up to which a label value is rounded (255 with a slope of 1/255 is not quite 1)."""

SHOWN = 5
"""Values that a message lists at most."""


def whole_labels(path: Path, array: Volume) -> tuple[NDArray[np.integer], bool]:
    """The label values of a file as whole numbers, and whether it was a soft mask.

    A file with fractional values is a soft mask (a probability, a fraction of the voxel) if all values lie in
    0..1: voxels of 1/2 and more become 1, the others 0.

    Args:
        path: file of the array, for messages.
        array: [X, Y, Z], any type.

    Raises:
        UserError: values are NaN or infinite, or fractional outside 0..1; the message names file and values.
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
    """The mask of a label, in the shape of ``labels``: its ``values``, or without these all values above 0.

    Raises:
        UserError: there are no ``values``, and the file has some below 0.
    """
    if values:
        return np.asarray(np.isin(labels, list(values)))
    if labels.size and labels.min() < 0:
        raise UserError(f"{path}: a mask with values below 0 ({int(labels.min())})")
    return np.asarray(labels > 0)


def listed(values: Sequence[float]) -> str:
    """The first ``SHOWN`` values as text, and an ellipsis if there are more."""
    text = ", ".join(f"{v:.10g}" for v in list(values)[:SHOWN])
    return text + (" …" if len(values) > SHOWN else "")
