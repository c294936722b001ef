"""A table of bad data sets and configurations: plan names what is wrong, and nothing is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

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
    flip,
    header,
    poke,
    refused,
    replace,
    table,
    voxels,
)


@pytest.fixture
def world(data: Path, tmp_path: Path) -> World:
    return copied(data, tmp_path / "w")


def _csv(w: World, text: str, **data: Any) -> None:
    (w.root / "table.csv").write_text(text, encoding="utf-8")
    given = {"source": "csv", "contrasts": ["image"], "labels": {"lesion": 1}, **data}
    path = Path(w.settings(data=given))
    value = yaml.safe_load(path.read_text())
    value["data"]["root"] = str(w.root / "table.csv")
    value["metadata"] = {}
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
    ("two columns", lambda w: replace(w.table, "tumor_type\tage", "age\tage"), "'age' occurs 2 times"),
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
    (
        "an object as a value",
        lambda w: (
            (w.bids / "FLAIR.json").write_text('{"Coil": {"name": "x"}}'),
            w.settings(metadata={"Coil": {}}),
        ),
        "'Coil' must be text, a number or a list of them",
    ),
    (
        "a DICOM file as an image",
        lambda w: w.image(1).write_bytes(bytes(128) + b"DICM" + bytes(900)),
        "it is a DICOM file; dcm2niix",
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
        "known names 'lesions', which is not a label",
    ),
    (
        "an image as its label",
        lambda w: _csv(w, f"image,label\n{w.image(0)},{w.image(0)}\n{w.image(1)},{w.label(1)}\n"),
        "is the label of .* and its image",
    ),
    # configuration
    ("an unknown key", lambda w: w.settings(trainig={}), "trainig: unknown key; did you mean 'training'"),
    ("an unknown value", lambda w: w.settings(training={"optimizer": "adam"}), "did you mean 'adamw'"),
    ("a key twice", lambda w: w.root.joinpath("config.yaml").open("a").write("splits: {}\n"), "occurs twice"),
    ("YAML that is none", lambda w: w.root.joinpath("config.yaml").write_text("data: ["), "not YAML"),
    ("a list as a configuration", lambda w: w.root.joinpath("config.yaml").write_text("- 1"), "keys and values"),
    ("no configuration", lambda w: w.root.joinpath("config.yaml").unlink(), "config.yaml: cannot be read"),
    ("one contrast twice", lambda w: w.settings(data={"contrasts": ["FLAIR", "FLAIR"]}), "contrasts must differ"),
    (
        "classes that share a value",
        lambda w: w.settings(data={"labels": {"a": [1, 2], "b": 2}}, output={"mode": "classes"}),
        "value 2 is in several of them",
    ),
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


@table(PLAN)
def test_a_bad_data_set_or_configuration_is_not_planned(
    world: World, change: Change, message: str, capsys: Capsys
) -> None:
    argv = ["plan", world.settings(), str(world.out)]
    refused(world, change, message, capsys, argv)


def test_a_label_file_that_several_subjects_share_is_said(world: World, capsys: Capsys) -> None:
    rows = [f"{i},{world.image(i)},{world.label(i // 5 * 4)}" for i in range(6)]
    _csv(world, "\n".join(["id,image,label", *rows]) + "\n")
    assert main(["plan", str(world.root / "config.yaml"), str(world.out)]) == 0
    assert "is the label of several subjects: 0, 1, 2, 3, 4" in capsys.readouterr().out
