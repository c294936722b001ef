"""The data set of ``fastfilm demo``: phantoms in which the target depends on the tumour type alone."""

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
    """Writes a BIDS folder of FLAIR phantoms, their labels and participants.tsv.

    The target is core, cavity and oedema of an astrocytoma, core and cavity of an ependymoma, and the core of a
    hemangioblastoma. The appearance of a lesion is drawn independently of its type, so that the image does not
    show which parts are the target.

    Args:
        root: folder to write.
        cases: number of subjects.
        shape: voxels of an image along right, anterior, superior.
        seed: seed of appearances and noise.
        progress: called with the number of cases; its result is called after each.
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
    """The demo's configuration; ``quick`` trains for two steps only, to try all commands."""
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
    """Writes ``configuration`` as YAML."""
    write_text(path, yaml.safe_dump(configuration(quick), sort_keys=False))
