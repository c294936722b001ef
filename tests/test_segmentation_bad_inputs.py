"""A table of bad inputs: each command ends with status 1 and names what is wrong, and nothing is written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import nibabel as nib
import yaml

from fastfilm.__main__ import main

from .bad_inputs import World, annexed, bomb, cut, edit_json, flip, header, poke, replace, voxels
from .phantoms import settings, write_bids

Row = tuple[str, Callable[[World], Any], str]
"""Name; what is done to the world, and the arguments of the command if it returns a list; message (a pattern)."""


def _csv(w: World, text: str, **data: Any) -> None:
    (w.root / "table.csv").write_text(text, encoding="utf-8")
    given = {"source": "csv", "contrasts": ["image"], "labels": {"lesion": 1}, **data}
    path = Path(w.settings(data=given, metadata={}))
    value = yaml.safe_load(path.read_text())
    value["data"]["root"] = str(w.root / "table.csv")
    path.write_text(yaml.safe_dump(value))


def _dicom(w: World) -> None:
    shutil.rmtree(w.bids)
    w.bids.mkdir()
    for i in range(3):
        (w.bids / f"IM{i:04d}").write_bytes(bytes(128) + b"DICM" + bytes(60))


PLAN: list[Row] = [
    # images
    ("flipped bit", lambda w: flip(w.image(1)), "sub-01_FLAIR.nii.gz: cannot be read as NIfTI"),
    ("flipped checksum", lambda w: flip(w.image(1), -6), "compressed data are damaged"),
    ("truncated", lambda w: cut(w.image(1)), "sub-01_FLAIR.nii.gz: cannot be read"),
    ("empty file", lambda w: w.image(1).write_bytes(b""), "the file is empty"),
    ("text as an image", lambda w: w.image(1).write_text("x" * 900), "cannot be read as NIfTI"),
    ("a folder as an image", lambda w: (w.image(1).unlink(), w.image(1).mkdir()), "no such file"),
    ("annexed image", lambda w: annexed(w.image(1)), "is a link to .* datalad get"),
    ("terabytes", lambda w: bomb(w.image(1)), r"30000x30000x3000 voxels need .* GiB"),
    ("NaN", lambda w: poke(w.image(1), np.nan), "1 voxels are NaN or infinite"),
    ("infinite", lambda w: poke(w.image(1), np.inf), "1 voxels are NaN or infinite"),
    ("absurd", lambda w: poke(w.image(1), 1.8e21), r"intensities of up to 1.8e\+21"),
    ("constant", lambda w: voxels(w.image(1), lambda a: 0 * a), "every voxel is 0"),
    ("four axes", lambda w: voxels(w.image(1), lambda a: np.stack([a, a], -1)), "one 3D volume"),
    ("no voxels", lambda w: voxels(w.image(1), lambda a: a[:0]), "sub-01_FLAIR"),
    ("complex", lambda w: voxels(w.image(1), lambda a: a * np.complex64(1j)), "must be numbers"),
    (
        "colours",
        lambda w: voxels(
            w.image(1), lambda a: np.zeros(a.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
        ),
        "must be numbers",
    ),
    ("a singular affine", lambda w: header(w.image(1), srow_y=0), "affine is not usable"),
    ("an affine that is no number", lambda w: header(w.image(1), srow_y=np.nan), "affine|cannot be read"),
    ("an unknown type", lambda w: header(w.image(1), datatype=4242), "cannot be read as NIfTI"),
    ("negative sizes", lambda w: header(w.image(1), dim=[3, -4, 4, 4, 1, 1, 1, 1]), "sub-01_FLAIR.nii.gz"),
    ("larger sizes", lambda w: header(w.image(1), dim=[3, 99, 99, 99, 1, 1, 1, 1]), "cannot be read as NIfTI"),
    (
        "microns that are said to be millimetres",
        lambda w: (
            voxels(w.image(1), lambda a: a, np.diag([4000.0, 4000, 9000, 1])),
            voxels(w.label(1), lambda a: a, np.diag([4000.0, 4000, 9000, 1])),
            w.settings(preprocessing={"dimensions": "3d", "patch_size": None, "spacing": [0.1] * 3}),
        ),
        r"sub-01: 16x16x12 voxels of 4e\+03 × .* GiB of memory",
    ),
    ("no images", lambda w: w.settings(data={"contrasts": ["T2star"]}), "images are of FLAIR"),
    ("another contrast", lambda w: w.settings(data={"contrasts": ["FLAR"]}), "did you mean 'FLAIR'"),
    ("DICOM", _dicom, "3 DICOM files; dcm2niix converts"),
    ("an empty folder", lambda w: (shutil.rmtree(w.bids), w.bids.mkdir()), "the folder has no files"),
    ("no folder", lambda w: shutil.rmtree(w.bids), "no such folder"),
    # labels
    ("no label", lambda w: w.label(1).unlink(), "sub-01: no label file for lesion; looked for .*dseg"),
    (
        "a label under another name",
        lambda w: w.label(1).rename(str(w.label(1)).replace("dseg", "seg")),
        "the folder has sub-01_FLAIR_seg.nii.gz",
    ),
    (
        "no labels at all",
        lambda w: shutil.rmtree(w.bids / "derivatives"),
        "there is no folder derivatives",
    ),
    ("annexed label", lambda w: annexed(w.label(1)), "FLAIR_dseg.nii.gz: is a link to"),
    (
        "annexed label where labels may be missing",
        lambda w: (annexed(w.label(1)), w.settings(data={"missing_labels": "mask"})),
        "FLAIR_dseg.nii.gz: is a link to",
    ),
    (
        "annexed label where cases are skipped",
        lambda w: (annexed(w.label(1)), w.settings(data={"missing_labels": "skip"})),
        "FLAIR_dseg.nii.gz: is a link to",
    ),
    ("a value too many", lambda w: poke(w.label(1), 7), r"label values 7 are not in .* \[0, 1\]"),
    ("half a value", lambda w: poke(w.label(1), 1.5, float), r"label values 1.5 are neither whole"),
    ("nearly a value", lambda w: poke(w.label(1), 2.004, float), r"label values 2.004 are neither"),
    ("a negative value", lambda w: poke(w.label(1), -1, np.int16), "label values -1 are not in"),
    ("NaN in a label", lambda w: poke(w.label(1), np.nan, float), "label values are NaN"),
    ("another grid", lambda w: voxels(w.label(1), lambda a: a[1:]), "not on the grid of its image"),
    (
        "a label elsewhere",
        lambda w: voxels(w.label(1), lambda a: a, nib.load(w.image(1)).affine + np.eye(4)[:, [3, 0, 1, 2]]),
        "mm apart",
    ),
    ("an empty label", lambda w: voxels(w.label(1), lambda a: 0 * a), "all background"),
    (
        "a label without a voxel",
        lambda w: w.settings(data={"labels": {"lesion": 1, "cord": 2}}),
        "'cord' .* has no voxel in any case",
    ),
    # tables
    ("no row", lambda w: replace(w.table, "sub-03", "sub-33"), "no row for sub-03"),
    ("a second row", lambda w: replace(w.table, "sub-03", "sub-02"), "a second row for sub-02"),
    ("an empty table", lambda w: w.table.write_text(""), "participants.tsv: the table is empty"),
    ("a table with commas", lambda w: replace(w.table, "\t", ","), "its cells are separated by commas"),
    ("no table", lambda w: w.table.unlink(), "'tumor_type' has no value in any case: there is no table"),
    (
        "a misspelt key",
        lambda w: w.settings(metadata={"tumour_type": {}}),
        "has the columns participant_id, tumor_type, age.*did you mean 'tumor_type'",
    ),
    (
        "an empty column",
        lambda w: w.table.write_text(re.sub(r"\t\d+\n", "\tn/a\n", w.table.read_text()))
        and w.settings(metadata={"age": {"kind": "continuous"}}),
        "column 'age' of .* is empty or n/a everywhere",
    ),
    ("two columns", lambda w: replace(w.table, "tumor_type\tage", "age\tage"), "'age' is there 2 times"),
    ("a short row", lambda w: replace(w.table, "\t31", ""), "line 3 has 2 cells"),
    ("no participant_id", lambda w: replace(w.table, "participant_id", "id"), "no column 'participant_id'"),
    ("UTF-16", lambda w: w.table.write_bytes(w.table.read_text().encode("utf-16")), "save the file as UTF-8"),
    (
        "Latin-1",
        lambda w: w.table.write_bytes(w.table.read_text().replace("n", "ñ").encode("latin-1")),
        "save the file as UTF-8",
    ),
    (
        "an Excel file",
        lambda w: w.table.write_bytes(b"PK\x03\x04" + b"x" * 100),
        "Excel or ZIP file|binary data",
    ),
    (
        "numbers as categories",
        lambda w: w.settings(metadata={"age": {}}),
        "6 different numbers as categories.*declare metadata.age.kind: continuous",
    ),
    (
        "text as a number",
        lambda w: w.settings(metadata={"tumor_type": {"kind": "continuous"}}),
        "further cases like these",
    ),
    (
        "one text among numbers",
        lambda w: (replace(w.table, "31", "old"), w.settings(metadata={"age": {"kind": "continuous"}})),
        "sub-01: metadata 'age' must be a number, got 'old'",
    ),
    (
        "NaN as a number",
        lambda w: (replace(w.table, "31", "NaN"), w.settings(metadata={"age": {"kind": "continuous"}})),
        "must be a finite number, got 'NaN' .*missing",
    ),
    (
        "a value of held-out cases alone",
        lambda w: (
            replace(w.table, "sub-00\tastrocytoma", "sub-00\trare"),
            w.settings(metadata={"tumor_type": {}}),
        ),
        "sub-00 in fold .*'rare', which was not in training",
    ),
    (
        "a value that is not listed",
        lambda w: w.settings(metadata={"tumor_type": {"values": ["astrocytoma"]}}),
        "expected one of astrocytoma",
    ),
    ("no such split column", lambda w: w.settings(splits={"column": "part"}), "no column 'part'"),
    ("no column of annotations", lambda w: w.settings(data={"annotated_column": "tumor_typ"}),
     "no column 'tumor_typ'.*did you mean 'tumor_type'"),
    (
        "no table of annotations",
        lambda w: (w.table.unlink(), w.settings(data={"annotated_column": "x"}, metadata={})),
        "no such table",
    ),
    ("a CSV column in BIDS", lambda w: w.settings(data={"labels": {"a": {"column": "x"}}}), "not for data.source"),
    ("no such label contrast", lambda w: w.settings(data={"label_contrast": "flair"}), "did you mean 'FLAIR'"),
    ("balance over no key", lambda w: w.settings(training={"balance": "tumour_type"}), "did you mean 'tumor_"),
    ("more folds than subjects", lambda w: w.settings(splits={"folds": 9}), "9 folds need as many subjects"),
    # sidecars
    (
        "a sidecar that is a list",
        lambda w: w.image(1).with_name("sub-01_FLAIR.json").write_text("[]"),
        "sub-01_FLAIR.json: must be a JSON object",
    ),
    ("an annexed sidecar", lambda w: annexed(w.bids / "FLAIR.json"), "FLAIR.json: is a link to"),
    ("a broken sidecar", lambda w: (w.bids / "FLAIR.json").write_text("{"), "FLAIR.json: cannot be read as JSON"),
    # CSV
    ("no CSV column", lambda w: _csv(w, "id,img,label\n1,a,b\n"), "no column 'image'; it has id, img, label"),
    ("no CSV rows", lambda w: _csv(w, "image,label\n"), "the table has no rows"),
    ("no CSV image", lambda w: _csv(w, "image,label\nnan,b.nii\n"), "line 2: no image"),
    ("a CSV file that is not there", lambda w: _csv(w, "image,label\na.nii,b.nii\n"), "a.nii: no such file"),
    ("a case twice", lambda w: _csv(w, "id,image,label\n1,a.nii,b.nii\n1,a.nii,b.nii\n"), "'1' is in line 2"),
    (
        "labels that are not annotated anywhere",
        lambda w: _csv(w, "image,label,known\na.nii,b.nii,lesions\n", annotated_column="known"),
        "known names 'lesions', which is no label",
    ),
    # configuration
    ("an unknown key", lambda w: w.settings(trainig={}), "trainig: unknown key; did you mean 'training'"),
    ("an unknown value", lambda w: w.settings(training={"optimizer": "adam"}), "did you mean 'adamw'"),
    ("a key twice", lambda w: w.root.joinpath("config.yaml").open("a").write("splits: {}\n"), "there twice"),
    ("YAML that is none", lambda w: w.root.joinpath("config.yaml").write_text("data: ["), "not YAML"),
    ("a list as a configuration", lambda w: w.root.joinpath("config.yaml").write_text("- 1"), "keys and values"),
    ("no configuration", lambda w: w.root.joinpath("config.yaml").unlink(), "config.yaml: cannot be read"),
    ("a network too deep", lambda w: w.settings(network={"depth": 9}), "depth can be at most 4"),
    (
        "a network too deep for the images",
        lambda w: w.settings(network={"depth": 9}, preprocessing={"patch_size": None}),
        "images are 16x16: depth can be at most 4",
    ),
    (
        "a network with pretrained weights",
        lambda w: w.settings(
            network={
                "name": "condition", "depth": None, "target": "monai.networks.nets.EfficientNetBN",
                "arguments": {"model_name": "efficientnet-b0", "pretrained": True},
            },
            preprocessing={"patch_size": None},
        ),
        "pretrained.*nothing is ever fetched|nothing is ever fetched.*pretrained",
    ),
    ("an activation that is none", lambda w: w.settings(network={"activation": "relo"}), "network: .*relo"),
    (
        "a network of elsewhere",
        lambda w: w.settings(
            network={"name": "condition", "depth": None, "target": "os.system"},
            preprocessing={"patch_size": None},
        ),
        "target must begin with one of",
    ),
    ("a patch of three numbers", lambda w: w.settings(preprocessing={"patch_size": [8, 8, 8]}), "needs 2 numbers"),
    ("no labels in the configuration", lambda w: w.settings(data={"labels": {}}), "data.labels"),
    ("a label of value 0", lambda w: w.settings(data={"labels": {"a": 0}}), "data.labels.a"),
    ("values of a continuous key", lambda w: w.settings(metadata={"age": {"kind": "continuous", "values": ["1"]}}),
     "takes no values"),
    ("no order", lambda w: w.settings(metadata={"tumor_type": {"kind": "ordered"}}), "needs values"),
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and a configuration."""
    root = tmp_path_factory.mktemp("world")
    config = settings(write_bids(root / "bids"), training={"epochs": 1, "steps_per_epoch": 1})
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


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


def copied(source: Path, to: Path) -> World:
    shutil.copytree(source, to, symlinks=True)
    return World(to)


def refused(
    world: World, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with status 1 and the message, and ``world.out`` is not there."""
    capsys.readouterr()
    status = main(argv)
    text = " ".join(capsys.readouterr().err.split())
    assert status == 1 and re.search(message, text), f"{status}: {text[:1500]}"
    assert "Traceback" not in text
    assert not world.out.exists(), sorted(world.out.rglob("*"))


def table(rows: list[Row]) -> Any:
    return pytest.mark.parametrize(
        ("change", "message"), [pytest.param(r[1], r[2], id=r[0].replace(" ", "_")) for r in rows]
    )


@table(PLAN)
def test_a_bad_data_set_or_configuration_is_not_planned(
    data: Path,
    tmp_path: Path,
    change: Callable[[World], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = copied(data, tmp_path / "w")
    world.settings()
    change(world)
    refused(world, ["plan", str(world.root / "config.yaml"), str(world.out)], message, capsys)


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
    ("a swapped value twice", _meta("--swap", "tumor_type=ependymoma,ependymoma"), "'ependymoma' is there twice"),
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
    trained: Path,
    tmp_path: Path,
    change: Callable[[World], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = copied(trained, tmp_path / "w")
    argv = change(world)
    refused(world, argv if isinstance(argv, list) else _predict(world), message, capsys)


CASES: list[Row] = [
    ("flipped bit", lambda w: flip(w.image(1)), "cannot be read as NIfTI"),
    ("truncated", lambda w: cut(w.image(1)), "cannot be read as NIfTI"),
    ("empty", lambda w: w.image(1).write_bytes(b""), "the file is empty"),
    ("annexed", lambda w: annexed(w.image(1)), "is a link to"),
    ("terabytes", lambda w: bomb(w.image(1)), "GiB are free"),
    ("absurd", lambda w: poke(w.image(1), 1e30), r"intensities of up to 1e\+30"),
    ("NaN", lambda w: poke(w.image(1), np.nan), "NaN or infinite"),
    ("four axes", lambda w: voxels(w.image(1), lambda a: np.stack([a, a], -1)), "one 3D volume"),
    ("no row", lambda w: replace(w.table, "sub-01", "sub-77"), "no row for sub-01"),
    ("a broken sidecar", lambda w: w.image(1).with_name("sub-01_FLAIR.json").write_text("{"), "JSON"),
]  # fmt: skip


@table(CASES)
def test_a_bad_case_is_named_and_the_others_are_predicted(
    trained: Path,
    tmp_path: Path,
    change: Callable[[World], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = copied(trained, tmp_path / "w")
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
    ("no plan", lambda w: shutil.rmtree(w.plan), "not a plan"),
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
    trained: Path,
    tmp_path: Path,
    change: Callable[[World], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = copied(trained, tmp_path / "w")
    argv = change(world)
    refused(world, argv if isinstance(argv, list) else _train(world), message, capsys)


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
    trained: Path,
    tmp_path: Path,
    change: Callable[[World], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = copied(trained, tmp_path / "w")
    argv = change(world)
    refused(world, argv if isinstance(argv, list) else _evaluate(world), message, capsys)


def test_cases_without_a_prediction_are_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = copied(trained, tmp_path / "w")
    edit_json(world.predicted / "predictions.json", lambda v: v["asked"].append("ghost"))
    assert main(_evaluate(world)) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 cases have no prediction" in text and "ghost" in text
