"""Metadata from DICOM headers and from the sidecars that dcm2niix writes: both say the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from pydantic import ValidationError

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydicom", reason="needs the extra [dicom]")

import pydicom

from fastfilm.segmentation.config.schema import Config, parse
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.data.datasets import find_cases
from fastfilm.segmentation.data.plan import make_plan
from fastfilm.segmentation.metadata.dicom import (
    of_image,
    read_tags,
    tag_of,
)
from fastfilm.segmentation.metadata.encoder import MetadataEncoder
from fastfilm.segmentation.models.folder import ModelInfo
from fastfilm.segmentation.prediction.inputs import find_inputs
from fastfilm.segmentation.support.errors import Problems, UserError

from ...support.models import make_model
from ...support.phantoms import settings, write_bids

HEADER = {"EchoTime": "30", "RepetitionTime": "8500", "InversionTime": "2500.5"}
HEADER |= {"MagneticFieldStrength": "3", "Manufacturer": "SIEMENS "}

SIDECAR = {"EchoTime": 0.03, "RepetitionTime": 8.5, "InversionTime": 2.5005}
SIDECAR |= {"MagneticFieldStrength": 3, "Manufacturer": "SIEMENS"}
"""What dcm2niix writes of HEADER."""


def write(path: Path, **values: Any) -> Path:
    """A DICOM file with these tags, and pixels that cannot be decoded."""
    header = pydicom.Dataset()
    header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    header.SOPInstanceUID = "1.2.3"
    for keyword, value in values.items():
        setattr(header, keyword, value)
    header.PixelData = b"\0\0"
    header["PixelData"].VR = "OW"
    path.parent.mkdir(parents=True, exist_ok=True)
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.save_as(path, enforce_file_format=True)
    return path


def read(path: Path, *tags: str) -> dict[str, Any]:
    values, wrong = read_tags(path, {t: t for t in tags})
    assert not wrong
    return values


# headers


def test_times_are_in_seconds_and_everything_else_as_dcm2niix_has_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", **HEADER)
    values = read(path, *HEADER)
    assert values == SIDECAR
    # by number, in either case of the letters
    assert read(path, "0018,0081", "0008,0070") == {"0018,0081": 0.03, "0008,0070": "SIEMENS"}
    assert tag_of("0018,008A") == tag_of("0018,008a") == 0x0018008A


def test_lists_ages_and_what_is_not_there(tmp_path: Path) -> None:
    values = {"ImageType": ["ORIGINAL", "PRIMARY"], "PixelSpacing": [0.5, 1], "EchoTime": None}
    path = write(tmp_path / "a.dcm", PatientAge="018M", EchoTrainLength="16", **values)
    tags = ("ImageType", "PixelSpacing", "PatientAge", "EchoTrainLength", "EchoTime", "FlipAngle")
    assert read(path, *tags) == {
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "PixelSpacing": [0.5, 1],
        "PatientAge": 1.5,
        "EchoTrainLength": 16,
        "EchoTime": None,
        "FlipAngle": None,
    }


def test_the_first_and_last_files_of_a_folder_that_are_dicom_are_read(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "0.txt").write_text("notes")
    write(tmp_path / "s" / "DICOMDIR")
    write(tmp_path / "s" / "1" / "a", EchoTime="10", FlipAngle="90")
    write(tmp_path / "s" / "1" / "b", EchoTime="77", FlipAngle="90")
    write(tmp_path / "s" / "1" / "c", EchoTime="20", FlipAngle="90")
    (tmp_path / "s" / "z.json").write_text("{}")
    values, wrong = read_tags(tmp_path / "s", {"te": "EchoTime", "FlipAngle": "FlipAngle"})
    assert values == {"te": None, "FlipAngle": 90} and len(wrong) == 1
    assert "'te': DICOM tag EchoTime is 0.01 in " in wrong[0] and "0.02 in c" in wrong[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "s: no such file or folder"),
        (lambda p: p.write_text("x" * 200), "s: cannot be read as DICOM"),
        (lambda p: p.mkdir(), "s: none of its 0 files can be read as DICOM"),
    ],
)
def test_what_is_no_dicom_is_named(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        read_tags(tmp_path / "s", {"EchoTime": "EchoTime"})


def test_tags_that_hold_no_number_or_text_are_problems(tmp_path: Path) -> None:
    inner = pydicom.Sequence([pydicom.Dataset()])
    path = write(tmp_path / "a", SharedFunctionalGroupsSequence=inner)
    _, wrong = read_tags(path, {"k": "SharedFunctionalGroupsSequence"})
    assert len(wrong) == 1 and "'k'" in wrong[0] and "value representation SQ" in wrong[0]


def test_a_keyword_that_there_is_not_has_a_suggestion() -> None:
    with pytest.raises(UserError, match="no keyword 'EcoTime'; did you mean 'EchoTime'"):
        tag_of("EcoTime")


def test_without_pydicom_the_command_that_installs_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    keys = {"EchoTime": {"kind": "continuous", "source": "dicom"}}
    with pytest.raises(UserError, match=r'metadata.EchoTime: .*pip install "fastfilm\[dicom\]"'):
        find_cases(config_of(write_bids(tmp_path / "b"), keys))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tag": "EchoTime"}, "tag is for source 'dicom', not for 'auto'"),
        ({"source": "dicom", "tag": "18,81"}, "should match pattern"),
        ({"source": "dicom", "kind": "vector"}, "kind 'vector' has no source 'dicom'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MetadataKey(**options)


# data sets


def config_of(bids: Path, keys: dict[str, Any], **data: Any) -> Config:
    value = settings(bids)
    return parse({**value, "data": {**value["data"], **data}, "metadata": keys}, "test")


KEYS: dict[str, Any] = {
    **{k: {"kind": "continuous"} for k in HEADER},
    "Manufacturer": {},
}

FROM_DICOM = {k: {**v, "source": "dicom"} for k, v in KEYS.items()}


def image_of(root: Path, i: int) -> Path:
    return root / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_FLAIR.nii.gz"


def source_of(root: Path, i: int) -> Path:
    return root / "sourcedata" / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_FLAIR"


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """Six subjects: two with a folder of DICOM files, one with a file, and the first three with a sidecar."""
    root = write_bids(tmp_path / "bids")
    for i in (0, 1):
        write(source_of(root, i) / "1.dcm", **HEADER)
        write(source_of(root, i) / "2.dcm", **HEADER)
    write(source_of(root, 2).with_suffix(".dcm"), **HEADER)
    for i in range(3):
        image = image_of(root, i)
        image.with_name(image.name.replace(".nii.gz", ".json")).write_text(json.dumps(SIDECAR))
    return root


def write_table(bids: Path) -> Path:
    """A table of the first three subjects, with paths to images, labels and DICOM files."""
    labels = bids / "derivatives" / "labels"
    lines = ["subject,image,label,dicom"]
    for i in range(3):
        image = image_of(bids, i).relative_to(bids)
        label = (labels / image).with_name(image.name.replace("FLAIR", "FLAIR_dseg"))
        source = source_of(bids, i).relative_to(bids)
        source = source if i < 2 else source.with_suffix(".dcm")
        lines.append(f"sub-{i:02d},{image},{label.relative_to(bids)},{source}")
    (bids / "t.csv").write_text("\n".join(lines) + "\n")
    return bids / "t.csv"


@pytest.mark.parametrize("source", ["bids", "csv"])
def test_headers_and_sidecars_give_the_same_metadata(bids: Path, source: Any) -> None:
    data = {"source": source}
    if source == "csv":
        data |= {"root": str(write_table(bids)), "contrasts": ["image"]}
    found = [find_cases(config_of(bids, keys, **data)) for keys in (KEYS, FROM_DICOM)]
    for cases, origin in ((found[0].cases, "sidecar"), (found[1].cases, "dicom")):
        assert [c.metadata for c in cases[:3]] == [SIDECAR] * 3
        assert cases[2].origins == dict.fromkeys(KEYS, origin)
    if source == "bids":
        assert [c.metadata["EchoTime"] for c in found[1].cases[3:]] == [None] * 3
    assert not found[0].problems and not found[1].problems


def test_a_field_of_another_name_comes_from_its_tag(bids: Path) -> None:
    keys = {"te": {"kind": "continuous", "source": "dicom", "tag": "0018,0081"}}
    assert find_cases(config_of(bids, keys)).cases[0].metadata == {"te": 0.03}


def test_headers_that_contradict_each_other_or_cannot_be_read_are_problems(bids: Path) -> None:
    write(source_of(bids, 0) / "3.dcm", **{**HEADER, "EchoTime": "60"})
    for path in source_of(bids, 1).iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(Problems) as error:
        make_plan(config_of(bids, {"EchoTime": FROM_DICOM["EchoTime"]}), bids / "plan")
    text = "\n".join(error.value.problems)
    assert "sub-00: metadata 'EchoTime': DICOM tag EchoTime is 0.03 in" in text
    assert "sub-01: metadata 'EchoTime': " in text and "none of its 2 files" in text


def test_a_tag_that_no_file_has_says_where_it_was_looked_for(bids: Path) -> None:
    key = {"FlipAngle": {"kind": "continuous", "source": "dicom"}}
    with pytest.raises(Problems, match=r"no DICOM file has tag FlipAngle; looked in sourcedata/"):
        make_plan(config_of(bids, key), bids / "plan")
    table = write_table(bids)
    data = {"source": "csv", "root": str(table), "contrasts": ["image"]}
    with pytest.raises(Problems, match="looked in the paths in column 'dicom'"):
        make_plan(config_of(bids, key, **data), bids / "plan")
    with pytest.raises(Problems, match="no column 'series'; it has subject, image, label, dicom"):
        make_plan(config_of(bids, key, **data, dicom_column="series"), bids / "plan")


def test_only_the_folder_that_is_called_like_the_image_is_its(tmp_path: Path) -> None:
    image = tmp_path / "sub-01" / "ses-2" / "anat" / "sub-01_ses-2_T2w.nii.gz"
    folder = tmp_path / "sourcedata" / "sub-01" / "ses-2"
    write(folder / "1.dcm")
    stem = "sub-01_ses-2_T2w"
    assert of_image(image, stem, tmp_path) is None
    write(folder / "anat" / stem / "1.dcm")
    assert of_image(image, stem, tmp_path) == folder / "anat" / stem
    assert of_image(tmp_path.parent / "x.nii.gz", "x", tmp_path) is None


def info_of(tmp_path: Path, **changes: Any) -> ModelInfo:
    rows = {str(i): {"EchoTime": 0.01 * i} for i in range(1, 4)}
    keys = {"EchoTime": MetadataKey(kind="continuous", source="dicom")}
    return make_model(tmp_path / "m", metadata=MetadataEncoder.fit(rows, keys), **changes).info


def test_prediction_finds_the_headers_in_the_data_set_and_in_the_table(bids: Path) -> None:
    info = info_of(bids.parent, dicom_column="series")
    by_folder = find_inputs(bids, info, meta={})
    assert [c.metadata["EchoTime"] for c in by_folder] == [0.03] * 3 + [None] * 3
    folder = bids.parent / "loose"
    folder.mkdir()
    for name in "abc":
        image = nib.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4))
        nib.save(image, folder / f"{name}.nii.gz")
    write(folder / "s" / "1", EchoTime="20")
    (folder / "t.csv").write_text("case,series\na,s\nb,\nc,gone\n")
    a, b, c = find_inputs(folder, info, meta={}, table=folder / "t.csv")
    assert a.metadata == {"EchoTime": 0.02} and b.metadata == {"EchoTime": None}
    assert c.problem and "c.nii.gz: metadata 'EchoTime': " in c.problem and "gone" in c.problem
    (given,) = find_inputs(image_of(bids, 0), info, meta={"EchoTime": "0.5"})
    assert given.metadata == {"EchoTime": "0.5"}


def test_the_model_folder_keeps_where_headers_are(tmp_path: Path) -> None:
    info = info_of(tmp_path)
    again = ModelInfo.model_validate(json.loads(json.dumps(info.model_dump(mode="json"))))
    assert again == info and again.metadata["EchoTime"].source == "dicom"
