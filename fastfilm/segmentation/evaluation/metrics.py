"""How well one mask agrees with the truth.

Where a label is empty in the truth, in the prediction, or in both:

| | both empty | one of them empty |
|---|---|---|
| Dice, IoU | not defined | 0 |
| HD95 | not defined | diagonal of the image in mm: the worst there is |
| NSD | not defined | 0 (on a sheared grid it is never defined) |
| volume error | 0 mL; relative: not defined | as computed; relative to an empty truth: not defined |
| lesion F1 | not defined | 0 |

What is not defined is null in files and does not enter means, which say over how many cases they were taken.
"""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from ..images.nifti import ORTHOGONAL, shear
from ..images.preprocessing import bounding_box
from ..prediction.postprocessing import Mask, components

# MONAI about calls of its own
warnings.filterwarnings(
    "ignore", message="monai.metrics.utils get_mask_edges", category=FutureWarning
)

Values = dict[str, float | None]

METRICS = {
    "Dice": "",
    "IoU": "",
    "HD95": "mm",
    "NSD": "",
    "volume_error": "mL",
    "relative_volume_error": "",
    "lesion_sensitivity": "",
    "lesion_precision": "",
    "lesion_F1": "",
}
"""Name -> unit of what is averaged."""


def case_metrics(prediction: Mask, truth: Mask, grid: ArrayLike, tolerance: float = 1.0) -> Values:
    """All metrics of one label of one case.

    Args:
        prediction, truth: bool, [X, Y, Z].
        grid: mm along the three axes, [3]; or an affine's matrix, voxels -> mm, [3, 3]. Where its axes are not at
            right angles, NSD is None and HD95 is measured between the voxels' positions.
        tolerance: of the normalised surface distance (NSD), in mm.

    Returns:
        ``METRICS``, and counts: TP, FP, FN, TN, n_pred, n_ref (voxels), lesions_ref, lesions_pred, lesions_found,
        lesions_false. Volume errors are prediction minus truth. A lesion is a connected component (26 neighbours);
        one in the truth is found if the prediction has a voxel of it, one in the prediction is false if the
        truth has none.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction has shape {prediction.shape}, truth {truth.shape}")
    n_pred, n_ref = int(prediction.sum()), int(truth.sum())
    tp = int((prediction & truth).sum())
    fp, fn = n_pred - tp, n_ref - tp
    some = n_pred + n_ref > 0
    axes = np.asarray(grid, np.float64)
    axes = np.diag(axes) if axes.ndim == 1 else axes
    ml = abs(float(np.linalg.det(axes))) / 1000
    values: Values = {
        "Dice": 2 * tp / (n_pred + n_ref) if some else None,
        "IoU": tp / (tp + fp + fn) if some else None,
        **_surface(prediction, truth, axes, tolerance),
        "volume_error": (n_pred - n_ref) * ml,
        "relative_volume_error": (n_pred - n_ref) / n_ref if n_ref else None,
        **_lesions(prediction, truth),
    }
    values |= {"TP": tp, "FP": fp, "FN": fn, "TN": truth.size - tp - fp - fn}
    return values | {"n_pred": n_pred, "n_ref": n_ref}


def is_sheared(grid: ArrayLike) -> bool:
    """Whether the axes of an affine's matrix [3, 3] are not at right angles."""
    return shear(np.asarray(grid)) > ORTHOGONAL


def _surface(prediction: Mask, truth: Mask, axes: NDArray[np.float64], tolerance: float) -> Values:
    sheared = is_sheared(axes)
    if not (prediction.any() or truth.any()):
        return {"HD95": None, "NSD": None}
    if not (prediction.any() and truth.any()):
        ends = np.array(list(itertools.product((-1, 1), repeat=3))) * truth.shape
        diagonal = float(np.linalg.norm(ends @ axes.T, axis=1).max())
        return {"HD95": diagonal, "NSD": None if sheared else 0.0}
    # nothing outside matters; the border of background keeps a mask's surface where it touches the image's
    box = tuple(slice(*b) for b in bounding_box(prediction | truth))
    masks = [np.pad(m[box], 2) for m in (prediction, truth)]
    if sheared:
        return {"HD95": _hd95(masks[0], masks[1], axes), "NSD": None}
    a, b = (torch.from_numpy(m)[None, None] for m in masks)
    scale = np.linalg.norm(axes, axis=0).tolist()
    hd = compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=scale)
    nsd = compute_surface_dice(
        a, b, [tolerance], include_background=True, spacing=scale, use_subvoxels=True
    )
    return {"HD95": float(hd), "NSD": float(nsd)}


def _hd95(a: Mask, b: Mask, axes: NDArray[np.float64]) -> float:
    """HD95 in mm between the surface voxels (those with a face neighbour outside) on any grid."""
    p, q = (np.argwhere(m & ~ndimage.binary_erosion(m)) @ axes.T for m in (a, b))
    there, back = cKDTree(q).query(p)[0], cKDTree(p).query(q)[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _lesions(prediction: Mask, truth: Mask) -> Values:
    true, n_true = components(truth)
    pred, n_pred = components(prediction)
    found = len(np.unique(true[prediction & truth]))
    real = len(np.unique(pred[prediction & truth]))
    sensitivity = found / n_true if n_true else None
    precision = real / n_pred if n_pred else None
    # found lesions and real detections are counted apart: one blob may cover two lesions
    f1 = None
    if n_true or n_pred:
        s, p = sensitivity or 0.0, precision or 0.0
        f1 = 2 * s * p / (s + p) if s + p else 0.0
    return {
        "lesion_sensitivity": sensitivity,
        "lesion_precision": precision,
        "lesion_F1": f1,
        "lesions_ref": n_true,
        "lesions_pred": n_pred,
        "lesions_found": found,
        "lesions_false": n_pred - real,
    }
