"""The data set of ``fastfilm demo``: phantoms in which the tumour type alone decides what is the target."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import yaml

from fastfilm.phantom import LESIONS, make_phantom

from ..support.files import atomic, write_text

TYPES = tuple(LESIONS)


def write_data_set(
    root: Path,
    cases: int = 30,
    shape: Sequence[int] = (48, 48, 16),
    seed: int = 0,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> None:
    """A BIDS folder of FLAIR phantoms, ``derivatives/labels`` and participants.tsv.

    How a lesion looks is drawn apart from its type, so that the image does not tell which of its parts are asked
    for: astrocytoma core, cavity and oedema, ependymoma core and cavity, hemangioblastoma the core.
    """
    rng = np.random.default_rng(seed)
    done = progress(cases)
    rows = ["participant_id\ttumor_type"]
    for i in range(cases):
        kind, look = TYPES[i % len(TYPES)], TYPES[int(rng.integers(len(TYPES)))]
        image, mask = make_phantom(
            shape=shape, spacing=(4.0, 4.0, 9.0), tumour_type=kind, look=look, seed=seed + i
        )
        name = f"sub-{i + 1:02d}"
        label = root / "derivatives" / "labels" / name / "anat" / f"{name}_FLAIR_dseg.nii.gz"
        for path, nifti in ((root / name / "anat" / f"{name}_FLAIR.nii.gz", image), (label, mask)):
            with atomic(path) as temporary:
                nib.save(nifti, temporary)
        rows.append(f"{name}\t{kind}")
        done()
    write_text(root / "participants.tsv", "\n".join(rows) + "\n")
    about = {"Name": "fastfilm phantoms", "BIDSVersion": "1.9.0", "DatasetType": "raw"}
    write_text(root / "dataset_description.json", json.dumps(about, indent=1) + "\n")


def configuration(quick: bool) -> dict[str, Any]:
    """The configuration of the demo; ``quick`` runs everything and learns nothing."""
    return {
        "data": {"root": "data", "contrasts": ["FLAIR"], "labels": {"target": 1}},
        "metadata": {"tumor_type": {"dropout": 0.15}},
        "preprocessing": {"dimensions": "2d", "slice_axis": "axial"},
        "network": {"base_filters": 8, "depth": 3},
        "augmentation": {"flip": ["sagittal"]},
        "splits": {"folds": 3, "stratify": ["tumor_type"]},
        "training": {
            "epochs": 1 if quick else 24,
            "steps_per_epoch": 2 if quick else 50,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "validate_every": 1 if quick else 3,
            "foreground": 0.7,
            "workers": 0 if quick else 1,
        },
    }


def write_configuration(path: Path, quick: bool) -> None:
    """``configuration`` as YAML."""
    write_text(path, yaml.safe_dump(configuration(quick), sort_keys=False))
