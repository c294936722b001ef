"""Small BIDS data sets of phantoms, for the tests of the segmentation system."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastfilm.phantom import LESIONS, make_phantom

TYPES = tuple(LESIONS)


def write_bids(
    root: Path,
    count: int = 6,
    shape: Sequence[int] = (16, 16, 12),
    labels: Callable[[Any, Any], Any] | None = None,
) -> Path:
    """``count`` subjects with a FLAIR image, a label file and a row (tumour type, age) each.

    Args:
        labels: (image, mask) arrays -> label values; none: the mask, at least one voxel of it.
    """
    import nibabel as nib

    rows = ["participant_id\ttumor_type\tage"]
    for i in range(count):
        kind = TYPES[i % len(TYPES)]
        image, mask = make_phantom(shape=shape, tumour_type=kind, seed=i)
        name = f"sub-{i:02d}"
        target = np.asarray(mask.dataobj).copy()
        target[tuple(n // 2 for n in shape)] = 1
        if labels is not None:
            target = labels(np.asarray(image.dataobj), target)
        file = root / name / "anat" / f"{name}_FLAIR.nii.gz"
        label = root / "derivatives" / "labels" / name / "anat" / f"{name}_FLAIR_dseg.nii.gz"
        for path, nifti in (
            (file, image),
            (label, nib.Nifti1Image(target.astype(np.uint8), image.affine)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nifti, path)
        rows.append(f"{name}\t{kind}\t{30 + i}")
    (root / "participants.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return root


def settings(root: Path, **sections: Any) -> dict[str, Any]:
    """A configuration for ``write_bids``: a tiny 2D network on tumour type, a few steps."""
    base: dict[str, Any] = {
        "data": {"root": str(root), "contrasts": ["FLAIR"], "labels": {"lesion": 1}},
        "metadata": {"tumor_type": {"unseen": "unknown"}},
        "preprocessing": {"dimensions": "2d", "patch_size": [16, 16]},
        "network": {"base_filters": 2, "depth": 1},
        "splits": {"folds": 2},
        "training": {
            "epochs": 2,
            "steps_per_epoch": 3,
            "batch_size": 4,
            "warmup_steps": 2,
            "workers": 0,
        },
    }
    for name, section in sections.items():
        base[name] = {**base.get(name, {}), **section} if isinstance(section, dict) else section
    return base
