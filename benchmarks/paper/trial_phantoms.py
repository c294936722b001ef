"""Small data sets on which the answer of ``fastfilm trial`` is known, for its calibration.

Each image has a bright disc, which is always the target, and a darker one at half its area, which is the target in
one half of the cases. What the key ``protocol`` says of that makes the kind of the data set:

| kind | the darker disc is the target |
|---|---|
| null | by a coin that nobody is told; ``protocol`` is another coin |
| help | where ``protocol`` is "wide" |
| mislead | where ``protocol`` is "wide" in half of the sites, and where it is "narrow" in the others |

With ``splits.leave_out: site`` the held-out site of "mislead" follows the rule that most of the other sites break.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from fastfilm.segmentation.support.files import write_text

KINDS = ("null", "help", "mislead")

CASES, SITES = 36, 4

SHAPE = (32, 32, 4)


def write_phantoms(root: Path, kind: str, seed: int) -> None:
    """A BIDS folder of ``CASES`` subjects from ``SITES`` sites."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    lines = ["participant_id\tprotocol\tsite"]
    for i in range(CASES):
        site = i % SITES
        wide, other = (bool(rng.integers(2)) for _ in range(2))
        told = {"null": other, "help": wide, "mislead": wide ^ (site % 2 == 1)}[kind]
        image, label = _case(rng, wide)
        name = f"sub-{i + 1:02d}"
        for folder, end, array in (
            (root / name / "anat", "T1w", image),
            (root / "derivatives" / "labels" / name / "anat", "T1w_dseg", label),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            nib.save(
                nib.Nifti1Image(array, np.diag([2.0, 2, 4, 1])), folder / f"{name}_{end}.nii.gz"
            )
        lines.append(f"{name}\t{'wide' if told else 'narrow'}\tsite-{site}")
    write_text(root / "participants.tsv", "\n".join(lines) + "\n")


def _case(rng: np.random.Generator, wide: bool) -> tuple[Any, Any]:
    """Image and label of one subject: two discs through all slices, apart from each other, on noise."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE[:2]), indexing="ij"), -1)
    radius = rng.uniform(5.0, 6.0)
    while True:
        bright, dark = rng.uniform(8, 24, (2, 2))
        if np.linalg.norm(bright - dark) > 2 * radius + 1:
            break
    inside = [np.linalg.norm(grid - bright, axis=-1) < radius]
    inside.append(np.linalg.norm(grid - dark, axis=-1) < radius / np.sqrt(2))
    flat = 100 + 60.0 * inside[0] + 40.0 * inside[1]
    image = flat[..., None] + rng.normal(0, 20, SHAPE)
    label = inside[0] | inside[1] if wide else inside[0]
    label = np.repeat(label[..., None], SHAPE[2], -1)
    return image.astype(np.float32), label.astype(np.uint8)


def configuration(kind: str) -> str:
    """The configuration of a trial, YAML; ``data`` is beside it."""
    sites = kind == "mislead"
    value = {
        "data": {"root": "data", "contrasts": ["T1w"], "labels": {"target": 1}},
        "metadata": {"protocol": {"dropout": 0.0}, "site": {"input": False}},
        "preprocessing": {"dimensions": "2d", "slice_axis": "axial", "crop": "none"},
        "network": {"base_filters": 6, "depth": 2},
        "augmentation": {"affine": 0.0, "noise": 0.0, "blur": 0.0, "brightness": 0.0, "gamma": 0.0},
        "splits": {"leave_out": "site"} if sites else {"folds": 3},
        "training": {
            "epochs": 1,
            "steps_per_epoch": 90,
            "batch_size": 8,
            "learning_rate": 1.0e-2,
            "warmup_steps": 5,
            "workers": 0,
        },
        "trial": {"seeds": 3},
    }
    return yaml.safe_dump(value, sort_keys=False)
