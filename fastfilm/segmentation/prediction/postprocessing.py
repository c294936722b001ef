"""What is done to a binary mask after the network: the largest component, holes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def components(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Connected components (voxels that share a face, an edge or a corner): numbers from 1, and how many."""
    labelled, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, int))
    return labelled, int(count)


def keep_largest(mask: Mask) -> Mask:
    """The largest connected component; of several equally large ones the first."""
    labelled, count = components(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labelled.ravel())
    sizes[0] = 0
    return np.asarray(labelled == int(sizes.argmax()))


def fill_holes(mask: Mask) -> Mask:
    """With background that no path of face neighbours joins to the border of the volume."""
    return np.asarray(ndimage.binary_fill_holes(mask))
