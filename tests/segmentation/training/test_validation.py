"""The Dice that training logs is the one that ``predict`` and ``evaluate`` give for the same cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.__main__ import main
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.data.plan import make_plan, read_plan
from fastfilm.segmentation.support.distributed import Processes
from fastfilm.segmentation.support.files import read_json
from fastfilm.segmentation.training.fold import Start, train
from fastfilm.segmentation.training.record import read_log

from ...support.phantoms import settings, write_bids

ONE = Processes(0, 1, torch.device("cpu"))


def bright_and_dark(image: Any, mask: Any) -> Any:
    """Two labels that a few steps learn: the brighter half of the voxels, and most of the darker ones."""
    middle = np.median(image)
    return np.where(image > middle, 1, np.where(image > middle - 1e-3 * np.ptp(image), 0, 2))


FORMS: dict[str, dict[str, Any]] = {
    "channels": {"output": {"mode": "channels"}},
    "classes": {"output": {"mode": "classes"}},
    "task": {"output": {"mode": "task"}},
    "masks of their own": {
        "data": {"labels": {"bright": {"suffix": "bright"}, "dark": {"suffix": "dark"}}}
    },
    "volumes, an average, another overlap": {
        "preprocessing": {"dimensions": "3d", "patch_size": [8, 8, 8]},
        "training": {"ema": 0.5, "validation_overlap": 0.25},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_logs_dice_is_that_of_predict_and_evaluate(tmp_path: Path, form: str) -> None:
    root = write_bids(tmp_path / "bids", count=4, labels=bright_and_dark)
    for path in (root / "derivatives").rglob("*_dseg.nii.gz"):
        for value, name in ((1, "bright"), (2, "dark")):
            only(path, path.with_name(path.name.replace("dseg", name)), value)
    sections: dict[str, Any] = {
        "data": {"root": str(root), "labels": {"bright": 1, "dark": 2}},
        # windows overlap in both directions
        "preprocessing": {"patch_size": [8, 10], "crop": "none"},
        "training": {"epochs": 1, "steps_per_epoch": 12, "learning_rate": 0.02, "warmup_steps": 0},
    }
    for name, section in FORMS[form].items():
        sections[name] = {**sections.get(name, {}), **section}
    make_plan(parse(settings(root, **sections), "test"), tmp_path / "plan")
    train(Start(read_plan(tmp_path / "plan"), 0, tmp_path / "model"), ONE)
    overlap = sections["training"].get("validation_overlap", 0.5)
    where = [str(tmp_path / name) for name in ("model", "plan", "out")]
    assert main(["predict", *where, "--fold", "0", "--overlap", str(overlap)]) == 0
    assert main(["evaluate", str(tmp_path / "out")]) == 0
    summary = read_json(tmp_path / "out" / "summary.json")
    evaluated = {d["name"]: d["metrics"]["Dice"]["mean"] for d in summary["labels"].values()}
    logged = read_log(tmp_path / "model")[-1]["dice"]
    assert logged == pytest.approx(evaluated, abs=1e-6)
    assert 0.1 < max(logged.values()) < 1


def only(path: Path, to: Path, value: int) -> None:
    """A mask file of one value of a label file."""
    import nibabel as nib

    image = nib.load(path)
    mask = (np.asarray(image.dataobj) == value).astype(np.uint8)
    nib.save(nib.Nifti1Image(mask, image.affine), to)
