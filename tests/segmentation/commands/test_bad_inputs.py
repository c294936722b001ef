"""A table of bad inputs: train, predict, evaluate and others name what is wrong, and nothing is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastfilm.__main__ import main

from ...support.bad_inputs import (
    Capsys,
    Change,
    Row,
    World,
    annexed,
    bomb,
    copied,
    cut,
    edit_json,
    flip,
    header,
    poke,
    refused,
    replace,
    table,
    voxels,
)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a plan, a model, predictions and their evaluation."""
    root = tmp_path_factory.mktemp("trained") / "w"
    shutil.copytree(data, root)
    World(root).settings()
    plan, model, predicted = (str(root / n) for n in ("plan", "model", "predicted"))
    assert main(["plan", str(root / "config.yaml"), plan]) == 0
    assert main(["train", plan, model, "--fold", "0"]) == 0
    assert main(["predict", model, plan, predicted]) == 0
    assert main(["evaluate", predicted]) == 0
    return root


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> World:
    return copied(trained, tmp_path / "w")


def _predict(w: World, *more: Any, source: Any = None, out: Any = None) -> list[str]:
    return ["predict", *map(str, (w.model, source or w.bids, out or w.out, *more))]


def _meta(*more: Any) -> Callable[[World], list[str]]:
    return lambda w: _predict(w, *more)


def _table(text: str | bytes, name: str = "t.tsv") -> Callable[[World], list[str]]:
    def change(w: World) -> list[str]:
        data = text.encode() if isinstance(text, str) else text
        (w.root / name).write_bytes(data)
        return _predict(w, "--table", w.root / name)

    return change


def _weights(w: World) -> None:
    """The weights of another model of the same sizes."""
    edit_json(w.model / "model.json", lambda v: v["preprocessing"]["channels"][0].update(std=7.0))


def _dicom_input(w: World) -> list[str]:
    (w.root / "scans").mkdir()
    (w.root / "scans" / "IM1").write_bytes(bytes(128) + b"DICM")
    return _predict(w, source=w.root / "scans")


PREDICT: list[Row] = [
    ("no model", lambda w: shutil.rmtree(w.model), "not a model folder"),
    ("a truncated model.json", lambda w: cut(w.model / "model.json"), "model.json: not JSON"),
    ("model.json is a list", lambda w: (w.model / "model.json").write_text("[]"), "not a fastfilm model"),
    ("a format to come", lambda w: edit_json(w.model / "model.json", lambda v: v.update(format=99)), "format 99"),
    (
        "a version to come",
        lambda w: edit_json(w.model / "model.json", lambda v: v.update(fastfilm="99.0.0")),
        "99.0.0",
    ),
    (
        "a wrong type in model.json",
        lambda w: edit_json(w.model / "model.json", lambda v: v.update(patch_size="x")),
        "patch_size",
    ),
    ("flipped weights", lambda w: flip(w.model / "best.safetensors", -40), "best.safetensors: damaged"),
    ("a flipped header of weights", lambda w: flip(w.model / "best.safetensors", 0.02), "best.safetensors"),
    ("truncated weights", lambda w: cut(w.model / "best.safetensors"), "best.safetensors"),
    ("no weights", lambda w: (w.model / "best.safetensors").unlink(), "no such weights; the folder has final"),
    ("weights of another model", _weights, "model.json is not the one"),
    (
        "another network",
        lambda w: edit_json(w.model / "model.json", lambda v: v["network"].update(norm="batch")),
        "model.json is not the one",
    ),
    ("no input", lambda w: _predict(w, source=w.root / "nowhere"), "nowhere: no such file or folder"),
    ("DICOM", _dicom_input, "1 DICOM files; dcm2niix"),
    ("an empty folder", lambda w: _predict(w, source=(w.root / "e").mkdir() or w.root / "e"), "has no files"),
    ("a part that is none", lambda w: _predict(w, "--part", "tes", source=w.plan), "no case in part 'tes'"),
    ("a fold that is none", lambda w: _predict(w, "--fold", "7", source=w.plan), "fold must be 0 to 1, got 7"),
    ("a key that is none", _meta("--meta", "tumour_type=x"), "no metadata key 'tumour_type'.*did you mean"),
    ("a value that is none", _meta("--meta", "tumor_type"), "--meta takes KEY=VALUE"),
    ("a key twice", _meta("--meta", "tumor_type=ependymoma", "--meta", "tumor_type=astrocytoma"), "twice"),
    ("a swapped key that is none", _meta("--swap", "age"), "'age' is not one of the model's"),
    ("a swapped value twice", _meta("--swap", "tumor_type=ependymoma,ependymoma"), "'ependymoma' occurs twice"),
    (
        "two files of a case",
        lambda w: nib.save(nib.load(w.image(1)), str(w.image(1)).removesuffix(".gz")),
        "both are the image",
    ),
    ("no table", _meta("--table", "/nowhere.tsv"), "nowhere.tsv: cannot be read"),
    ("an empty table", _table(""), "t.tsv: the table is empty"),
    ("a table with commas", _table("participant_id,tumor_type\nsub-00,x\n"), "separated by commas"),
    ("a table of nobody", _table("name\ttumor_type\nsub-00\tx\n"), "none of the columns participant_id"),
    ("a table in UTF-16", _table("participant_id\tx\nsub-00\ty\n".encode("utf-16")), "save the file as UTF-8"),
    ("two rows of one", _table("participant_id\tx\nsub-00\ty\nsub-00\tz\n"), "a second row for 'sub-00'"),
    ("a plane that is none", _meta("--flip", "x"), "--flip must be one of sagittal"),
    ("a plane across the slices", _meta("--flip", "axial"), "flips must be sagittal or coronal"),
    ("too much overlap", _meta("--overlap", "1"), "--overlap must be at least 0 and below 1"),
    ("overlap that is no number", _meta("--overlap", "nan"), "--overlap must be"),
    ("samples without dropout", _meta("--samples", "2"), "needs a network with dropout"),
    ("negative samples", _meta("--samples", "-1"), "must not be negative"),
    ("a device that is none", _meta("--device", "gpu"), "--device gpu|gpu"),
    ("no such device", _meta("--device", "cuda:77"), "cuda:77"),
    ("threads that are none", _meta("--threads", "0"), "threads"),
    ("the folder of the images", lambda w: _predict(w, source=w.image(0).parent, out=w.image(0).parent),
     "holds the image"),
    ("the image itself", lambda w: _predict(w, source=w.image(0), out=w.image(0)), "is the image itself"),
    ("one file for many", lambda w: _predict(w, out=w.root / "OUT" / "a.nii.gz"), "OUT must be a folder"),
    (
        "a plan that was changed",
        lambda w: replace(w.plan / "splits.json", "sub-00", "sub-99") or _predict(w, source=w.plan),
        "splits.json: is not the file that plan.json was written with",
    ),
    (
        "other predictions",
        lambda w: _predict(w, "--continue", "--overlap", "0.1", out=w.predicted),
        "holds predictions of another model or with other settings",
    ),
]  # fmt: skip


@table(PREDICT)
def test_a_bad_model_or_request_predicts_nothing(
    world: World, change: Change, message: str, capsys: Capsys
) -> None:
    refused(world, change, message, capsys, _predict(world))


CASES: list[Row] = [
    ("flipped bit", lambda w: flip(w.image(1)), "cannot be read as NIfTI"),
    ("truncated", lambda w: cut(w.image(1)), "cannot be read as NIfTI"),
    ("empty", lambda w: w.image(1).write_bytes(b""), "the file is empty"),
    ("annexed", lambda w: annexed(w.image(1)), "is a link to"),
    ("terabytes", lambda w: bomb(w.image(1)), "GiB are free"),
    ("absurd", lambda w: poke(w.image(1), 1e30), r"intensities of up to 1e\+30"),
    ("NaN", lambda w: poke(w.image(1), np.nan), "NaN or infinite"),
    ("four axes", lambda w: voxels(w.image(1), lambda a: np.stack([a, a], -1)), "one 3D volume"),
    ("an affine without an inverse", lambda w: header(w.image(1), srow_y=0), "affine is not usable"),
    ("no row", lambda w: replace(w.table, "sub-01", "sub-77"), "no row for sub-01"),
    ("a broken sidecar", lambda w: w.image(1).with_name("sub-01_FLAIR.json").write_text("{"), "JSON"),
]  # fmt: skip


@table(CASES)
def test_a_bad_case_is_named_and_the_others_are_predicted(
    world: World, change: Change, message: str, capsys: Capsys
) -> None:
    change(world)
    assert main(_predict(world)) == 1
    assert re.search(f"1 failed: - sub-01: .*{message}", " ".join(capsys.readouterr().err.split()))
    names = sorted(p.name for p in world.out.iterdir())
    assert names == ["predictions.json", *(f"sub-0{i}.nii.gz" for i in (0, 2, 3, 4, 5))]


def _train(w: World, *more: Any) -> list[str]:
    return ["train", str(w.plan), str(w.out), "--fold", "0", *map(str, more)]


def _option(*more: Any) -> Callable[[World], list[str]]:
    return lambda w: _train(w, *more)


def _replanned(w: World) -> World:
    """The plan, of this world's own files."""
    w.settings()
    shutil.rmtree(w.plan)
    assert main(["plan", str(w.root / "config.yaml"), str(w.plan)]) == 0
    return w


TRAIN: list[Row] = [
    ("a folder without --contrast", lambda w: ["plan", str(w.bids), str(w.out)], "--contrast is needed.*FLAIR"),
    ("a folder of no images", lambda w: ["plan", str(w.model), str(w.out)], "no images in sub-.*json files"),
    (
        "a label twice",
        lambda w: ["plan", str(w.bids), str(w.out), "--contrast", "FLAIR", "--label", "a=1", "--label", "a=2"],
        "--label: data.labels.a is given twice",
    ),
    ("no plan", lambda w: shutil.rmtree(w.plan), "not a plan"),
    ("the plan as a model", lambda w: ["train", str(w.plan), str(w.plan)], "holds a plan"),
    ("a model as a plan", lambda w: ["plan", w.settings(), str(w.model)], "holds a model"),
    ("a truncated plan.json", lambda w: cut(w.plan / "plan.json"), "plan.json: not JSON"),
    ("a truncated cases.json", lambda w: cut(w.plan / "cases.json"), "cases.json: is not the file"),
    ("another config", lambda w: replace(w.plan / "config.yaml", "seed: 0", "seed: 1"), "config.yaml: is not"),
    ("no splits.json", lambda w: (w.plan / "splits.json").unlink(), "splits.json: cannot be read"),
    ("a fold that is none", lambda w: _train(w, "--fold", "9"), "fold must be 0 to 1, got 9"),
    ("nothing to resume", _option("--resume"), "nothing to (resume|go on)"),
    ("a device that is none", _option("--device", "gpu"), "gpu"),
    ("no CUDA", _option("--device", "cuda:77"), "cuda:77"),
    ("threads that are none", _option("--threads", "0"), "threads"),
    ("a key that is none", _option("--set", "training.epoch=3"), "training.epoch: unknown key; did you mean"),
    ("a value that is none", _option("--set", "training.epochs=abc"), "training.epochs: .*got 'abc'"),
    ("a setting of the plan", _option("--set", "network.depth=3"), "part of the plan"),
    ("a setting twice", _option("--set", "training.epochs=3", "--set", "training.epochs=4"), "is given twice"),
    ("a setting without a value", _option("--set", "training.epochs"), "--set takes"),
    ("a setting that is no YAML", _option("--set", "training.epochs=["), "--set"),
    ("a batch that cannot be shared", _option("--set", "training.batch_size=3", "--set", "training.accumulate=2"),
     "batch of 3 cannot be shared"),
    ("a model that is none", _option("--from", "/nowhere"), "nowhere: not a model folder"),
    ("an image that is gone", lambda w: _replanned(w).image(1).unlink(), "sub-01.*no such file"),
    ("a damaged image", lambda w: flip(_replanned(w).image(1)), "sub-01.*cannot be"),
]  # fmt: skip


@table(TRAIN)
def test_a_bad_plan_or_request_is_not_trained(
    world: World, change: Change, message: str, capsys: Capsys
) -> None:
    refused(world, change, message, capsys, _train(world))


def _evaluate(w: World, *more: Any) -> list[str]:
    return ["evaluate", str(w.predicted), "--out", str(w.out), *map(str, more)]


def _scored(*more: Any) -> Callable[[World], list[str]]:
    return lambda w: _evaluate(w, *more)


def _manifest(change: Callable[[Any], Any]) -> Callable[[World], None]:
    return lambda w: edit_json(w.predicted / "predictions.json", change)


def _first(value: Any) -> Any:
    return next(iter(value["cases"].values()))


EVALUATE: list[Row] = [
    ("no folder", lambda w: shutil.rmtree(w.predicted), "no such folder"),
    ("an empty folder", lambda w: (shutil.rmtree(w.predicted), w.predicted.mkdir()), "predictions"),
    ("no truth folder", _scored("--truth", "/nowhere"), "nowhere: no such folder"),
    ("a truth folder without a match", lambda w: _evaluate(w, "--truth", w.model), "no truth in"),
    ("a truncated list of predictions", lambda w: cut(w.predicted / "predictions.json"), "predictions.json"),
    ("a list of predictions that is none", _manifest(lambda v: []), "predictions.json"),
    ("outputs that are gone", lambda w: [p.unlink() for p in w.predicted.glob("*.gz")] and None, "no such file"),
    ("an output elsewhere", _manifest(lambda v: _first(v)["outputs"].update(labels="../../x.nii.gz")), "x.nii.gz"),
    ("damaged outputs", lambda w: [flip(p) for p in w.predicted.glob("*.gz")] and None, "cannot be read"),
    ("a tolerance of 0", _scored("--tolerance", "0"), "--tolerance must be"),
    ("a tolerance that is no number", _scored("--tolerance", "nan"), "--tolerance must be"),
    ("a metric that is none", _scored("--metrics", "Dise"), "did you mean 'Dice'"),
    ("a label without a value", _scored("--label", "x"), "--label takes NAME=VALUE"),
    ("a label twice", _scored("--label", "x=1", "--label", "x=2"), "twice|'x'"),
    ("a comparison with nothing", _scored("--compare", "/nowhere"), "nowhere"),
    ("a comparison with another file", lambda w: _evaluate(w, "--compare", w.plan / "splits.json"), "splits.json"),
    ("a network as text", lambda w: ["export", str(w.model), str(w.out / "x.txt")], r"\.onnx"),
    ("a report of nothing", lambda w: ["report", str(w.out)], "nothing to report"),
    ("a report of no model", lambda w: ["report", str(w.out), "--model", str(w.bids)], "not a model folder"),
    ("a look into no model", lambda w: ["inspect", str(w.bids), str(w.out)], "not a model folder"),
    (
        "weights of no network",
        lambda w: ["import", str(w.model / "best.safetensors"), str(w.out), "--contrast", "T2w", "--label", "a",
                   "--patch", "16,x"],
        "--patch takes whole numbers",
    ),
]  # fmt: skip


@table(EVALUATE)
def test_bad_predictions_or_requests_are_not_scored_or_shown(
    world: World, change: Change, message: str, capsys: Capsys
) -> None:
    refused(world, change, message, capsys, _evaluate(world))


def test_images_too_large_for_the_memory_after_resampling_are_not_predicted(
    data: Path, tmp_path: Path, capsys: Capsys
) -> None:
    world = copied(data, tmp_path / "w")
    config = world.settings(preprocessing={"spacing": [4, 4, None]})
    plan, model = str(world.root / "plan"), str(world.root / "model")
    assert main(["plan", config, plan]) == 0 and main(["train", plan, model]) == 0
    voxels(world.image(1), lambda a: a, np.diag([4e6, 4e6, 9, 1]))
    assert main(["predict", model, str(world.bids), str(world.out)]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "1 failed" in text and re.search("need .* GiB of memory; .* unit of length", text)


def test_of_a_folder_with_other_images_those_of_the_contrast_are_predicted(
    world: World, capsys: Capsys
) -> None:
    folder = world.root / "flat"
    folder.mkdir()
    for name in ("a_FLAIR", "b_FLAIR", "a_T1w", "a_FLAIR_dseg"):
        shutil.copy(world.image(0), folder / f"{name}.nii.gz")
    argv = _predict(world, "--meta", "tumor_type=astrocytoma", source=folder)
    assert main(argv) == 0
    assert "2 of 4 files" in capsys.readouterr().out
    assert sorted(p.name for p in world.out.glob("*.nii.gz")) == [
        "a_FLAIR.nii.gz",
        "b_FLAIR.nii.gz",
    ]


def test_cases_without_a_prediction_are_said(world: World, capsys: Capsys) -> None:
    edit_json(world.predicted / "predictions.json", lambda v: v["asked"].append("ghost"))
    assert main(_evaluate(world)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 cases have no prediction" in text and "ghost" in text
