"""Post-processing of binary masks: the largest component, and filling of holes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]


def components(mask: Mask) -> tuple[NDArray[np.int32], int]:
    """Connected components (by face, edge or corner), numbered from 1 in the mask's shape, and their count."""
    labelled, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim, int))
    return labelled, int(count)


def keep_largest(mask: Mask) -> Mask:
    """The largest connected component; of several of the same size the first."""
    labelled, count = components(mask)
    if count < 2:
        return mask
    sizes = np.bincount(labelled.ravel())
    sizes[0] = 0
    return np.asarray(labelled == int(sizes.argmax()))


def fill_holes(mask: Mask) -> Mask:
    """The mask with all background that is not connected by faces to the border of the volume."""
    return np.asarray(ndimage.binary_fill_holes(mask))
