"""The data set that nnU-Net's arms are trained on, and what nnU-Net cannot take."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.integrations.nnunet import cases as integration
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.data.plan import make_plan
from fastfilm.segmentation.support.errors import Problems
from fastfilm.segmentation.support.files import read_json
from fastfilm.segmentation.trial import nnunet_data
from fastfilm.segmentation.trial.cost import cost_of, said
from fastfilm.segmentation.trial.design import Run, check_config, check_plan, design
from fastfilm.segmentation.trial.folder import open_trial

from ...support.nnunet_arms import (
    BOTH,
    count_as_installed,
    planned,
)
from ...support.phantoms import settings as phantom_settings
from ...support.phantoms import write_bids


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    count_as_installed(monkeypatch)


def test_the_data_set_holds_linked_images_and_merged_labels(tmp_path: Path) -> None:
    def label(image: Any, mask: Any) -> Any:
        values = np.zeros(mask.shape, np.uint8)
        values[2:5, 2:5, 2:5] = 7
        values[8:10, 8:10, 3] = 3
        values[0, 0, 0] = 9
        return values

    root = write_bids(tmp_path / "bids", count=4, labels=label)
    data = {"labels": {"inner": 7, "outer": [3, 4]}, "ignore_values": [9]}
    plan = planned(tmp_path, root, data=data)
    nnunet_data.write_data_set(plan, tmp_path)
    written = tmp_path / "nnunet" / "raw" / "Dataset001_fastfilm"
    assert read_json(tmp_path / "nnunet" / "cases.json") == {
        f"case_{i:05d}": case.id for i, case in enumerate(plan.cases)
    }
    assert read_json(written / "dataset.json") == {
        "channel_names": {"0": "contrast FLAIR"},
        "labels": {"background": 0, "1 inner": 1, "2 outer": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    assert len(list((written / "imagesTr").iterdir())) == len(plan.cases) == 4
    for i, case in enumerate(plan.cases):
        image = written / "imagesTr" / f"case_{i:05d}_0000.nii.gz"
        assert image.is_symlink() and image.samefile(case.images[0] or "")
        merged = nib.load(written / "labelsTr" / f"case_{i:05d}.nii.gz")
        expected = np.zeros(merged.shape, np.uint8)
        expected[2:5, 2:5, 2:5] = 1
        expected[8:10, 8:10, 3] = 2
        assert merged.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(merged.dataobj), expected)
        assert np.array_equal(merged.affine, nib.load(image).affine)


@pytest.mark.parametrize("odd_one", ["metres", "dimension"])
def test_images_that_nnunet_would_read_otherwise_are_copied_in_mm(
    tmp_path: Path, odd_one: str
) -> None:
    root = write_bids(tmp_path / "bids", count=4)
    odd = root / "sub-00" / "anat" / "sub-00_FLAIR.nii.gz"
    plain = nib.load(odd)
    array = np.asarray(plain.dataobj)
    metres = plain.affine.copy()
    metres[:3] /= 1000
    image = nib.Nifti1Image(array, metres)
    image.header.set_xyzt_units("meter")
    if odd_one == "dimension":
        image = nib.Nifti1Image(array[..., None], plain.affine)
    nib.save(image, odd)
    plan = planned(tmp_path, root)
    nnunet_data.write_data_set(plan, tmp_path)
    folder = tmp_path / "nnunet" / "raw" / "Dataset001_fastfilm" / "imagesTr"
    copy = nib.load(folder / "case_00000_0000.nii.gz")
    assert not (folder / "case_00000_0000.nii.gz").is_symlink()
    assert (folder / "case_00001_0000.nii.gz").is_symlink()
    assert copy.shape == array.shape and copy.header.get_xyzt_units()[0] == "mm"
    assert np.allclose(copy.affine, plain.affine, atol=1e-4)
    assert np.array_equal(np.asarray(copy.dataobj), array.astype(np.float32))


def test_images_whose_voxel_sizes_are_not_those_of_the_affine_are_copied(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=4)
    odd = root / "sub-02" / "anat" / "sub-02_FLAIR.nii.gz"
    image = nib.load(odd)
    image.header["pixdim"][1:4] *= np.float32(1.0002)
    image.header["qform_code"] = 0
    nib.save(image, odd)
    written = nib.load(odd)
    assert not np.allclose(
        written.header.get_zooms(), nib.affines.voxel_sizes(written.affine), rtol=1e-5
    )
    plan = planned(tmp_path, root)
    nnunet_data.write_data_set(plan, tmp_path)
    folder = tmp_path / "nnunet" / "raw" / "Dataset001_fastfilm" / "imagesTr"
    links = [(folder / f"case_{i:05d}_0000.nii.gz").is_symlink() for i in range(4)]
    assert links == [True, True, False, True]
    copy = nib.load(folder / "case_00002_0000.nii.gz")
    assert np.allclose(copy.header.get_zooms(), nib.affines.voxel_sizes(copy.affine), rtol=1e-6)


def test_a_data_set_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    plan = planned(tmp_path, write_bids(tmp_path / "bids", count=4))
    nnunet_data.write_data_set(plan, tmp_path)
    (tmp_path / "nnunet" / "raw" / "Dataset001_fastfilm" / "dataset.json").unlink()
    nnunet_data.write_data_set(plan, tmp_path)
    assert not (tmp_path / "nnunet" / "raw" / "Dataset001_fastfilm" / "dataset.json").exists()
    # without the file that is written last it was interrupted
    (tmp_path / "nnunet" / "cases.json").unlink()
    nnunet_data.write_data_set(plan, tmp_path)
    assert (tmp_path / "nnunet" / "raw" / "Dataset001_fastfilm" / "dataset.json").exists()


def test_labels_that_overlap_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=6, labels=lambda image, mask: mask * 0 + 2)
    with pytest.raises(
        Problems, match=r"(?s)\(6\).*sub-00: two and all overlap in 3072 voxels.*exclude"
    ) as raised:
        value = phantom_settings(
            root, trial={"arms": BOTH}, data={"labels": {"all": [1, 2], "two": 2}}
        )
        open_trial(parse({**value, "data": value["data"]}, "test"), tmp_path / "trial")
    assert len(raised.value.problems) == 6
    assert not (tmp_path / "trial" / "design.json").exists()
    assert not (tmp_path / "trial" / "nnunet" / "raw").exists()


def test_sheared_grids_are_refused(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=4)
    for path in root.rglob("*sub-01*.nii.gz"):
        image = nib.load(path)
        affine = image.affine.copy()
        affine[0, 1] = 0.3 * affine[1, 1]
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), path)
    plan = planned(tmp_path, root)
    with pytest.raises(Problems, match=r"sub-01: .*FLAIR.nii.gz: the axes are not at right angles"):
        nnunet_data.write_data_set(plan, tmp_path)


def test_splits_are_the_folds_with_the_held_out_part_as_validation(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=6)
    plan = planned(tmp_path, root)
    name = {f"sub-{i:02d}": f"case_{i:05d}" for i in range(6)}
    assert [c.subject for c in plan.cases] == list(name)
    plan.folds = [
        {"train": ["sub-00", "sub-03"], "val": ["sub-01"], "test": ["sub-02", "sub-05"]},
        {"train": ["sub-04"], "val": ["sub-00"], "test": ["sub-01"]},
    ]
    assert nnunet_data.splits(plan, "test") == [
        {"train": ["case_00000", "case_00003"], "val": ["case_00002", "case_00005"]},
        {"train": ["case_00004"], "val": ["case_00001"]},
    ]
    assert nnunet_data.splits(plan, "val")[0]["val"] == ["case_00001"]


def test_the_table_gives_the_trainer_what_the_other_arms_get(tmp_path: Path) -> None:
    """Categories that look like numbers stay categories, and what training has not seen is missing."""
    root = write_bids(tmp_path / "bids", count=6)
    rows = ["participant_id\tsite, old\tcase\tage"]
    sites = ["1", "2", "1", "2", "n/a", "3"]
    ages = ["10", "100", "n/a", "1000", "10", "0.1"]
    rows += [f"sub-{i:02d}\t{sites[i]}\tx\t{ages[i]}" for i in range(6)]
    (root / "participants.tsv").write_text("\n".join(rows) + "\n")
    metadata = {
        "site, old": {"unseen": "unknown"},
        "case": {"input": False},
        "age": {"kind": "continuous", "scaling": "log"},
    }
    value = phantom_settings(root, trial={"arms": BOTH})
    config = parse({**value, "metadata": metadata}, "test")
    plan = make_plan(config, tmp_path / "plan")[0]
    plan.folds = [{"train": [f"sub-{i:02d}" for i in range(5)], "val": ["sub-05"]}]
    path = tmp_path / "metadata.csv"
    columns = nnunet_data.write_table(plan, 0, "val", path)
    assert columns == ["metadata.site%2C%20old", "metadata.age"]
    with open(path, newline="") as file:
        written = list(csv.reader(file))
    assert written[0] == ["case", *columns]
    assert [r[0] for r in written[1:]] == [f"case_{i:05d}" for i in range(6)]
    assert [r[1] for r in written[1:]] == ["=1", "=2", "=1", "=2", "", ""]
    found = [r[2] for r in written[1:]]
    assert found[2] == ""
    assert [float(f) for f in found if f] == pytest.approx(
        [np.log(x) for x in (10, 100, 1000, 10, 0.1)]
    )
    # as the trainer reads it
    values = integration.read(str(path), columns, [r[0] for r in written[1:]])
    described = integration.describe(values, columns)
    assert [c["numbers"] for c in described] == [False, True]
    assert described[0]["values"] == ["=1", "=2"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"output": {"mode": "task"}}, "output.mode task: nnU-Net segments all labels at once"),
        (
            {"data": {"combine": "samples", "contrasts": ["FLAIR", "T1w"]}},
            "data.combine samples: the contrasts are channels in nnU-Net",
        ),
        (
            {"metadata": {"grade": {"kind": "ordered", "values": ["1", "2"]}}},
            "metadata.grade.kind ordered: 'nnunet_conditioned' takes category and continuous",
        ),
        (
            {"metadata": {"age": {"kind": "continuous", "scaling": "bins"}}},
            "metadata.age.scaling bins: 'nnunet_conditioned' takes standardise and log",
        ),
        (
            {"trial": {"arms": ["conditioned", "unconditioned", "nnunet_conditioned"]}},
            "'nnunet_conditioned' needs 'nnunet'",
        ),
    ],
)
def test_what_nnunet_cannot_take_is_refused_by_its_key(
    sections: dict[str, Any], message: str
) -> None:
    value = phantom_settings(Path("/nowhere"), **{"trial": {"arms": BOTH}, **sections})
    with pytest.raises(Problems) as raised:
        check_config(parse(value, "test"))
    assert [p for p in raised.value.problems if message in p]


def test_keys_that_are_no_input_may_be_of_any_kind(tmp_path: Path) -> None:
    grade = {"kind": "ordered", "values": ["1", "2"], "input": False}
    value = phantom_settings(Path("/nowhere"), trial={"arms": BOTH}, metadata={"grade": grade})
    check_config(parse(value, "test"))


def test_without_nnunet_the_command_to_install_it_is_named_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnunet_data, "installed", lambda: False)
    root = write_bids(tmp_path / "bids", count=4)
    arms = ["conditioned", "unconditioned", "nnunet"]
    config = parse(phantom_settings(root, trial={"arms": arms}), "test")
    with pytest.raises(Problems, match="pip install nnunetv2"):
        open_trial(config, tmp_path / "trial")
    assert not (tmp_path / "trial").exists()
    check_config(parse(phantom_settings(root), "test"))


def test_cases_without_a_channel_or_a_label_are_named(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=6)
    shutil.copy(
        root / "sub-00" / "anat" / "sub-00_FLAIR.nii.gz",
        root / "sub-00" / "anat" / "sub-00_T1w.nii.gz",
    )
    rows = [line.split("\t") for line in (root / "participants.tsv").read_text().splitlines()]
    rows = [[*r, "done" if i == 0 else "lesion" if i != 3 else ""] for i, r in enumerate(rows)]
    (root / "participants.tsv").write_text("\n".join("\t".join(r) for r in rows) + "\n")
    data = {"contrasts": ["FLAIR", "T1w"], "missing_contrast": "zeros"}
    plan = planned(tmp_path, root, data=data)
    plan.cases[2] = type(plan.cases[2])(**{**vars(plan.cases[2]), "labels": {}})
    with pytest.raises(Problems) as raised:
        check_plan(plan)
    wrong = raised.value.problems
    assert [w.split(":")[0] for w in wrong] == [
        "sub-01",
        "sub-02",
        "sub-02",
        "sub-03",
        "sub-04",
        "sub-05",
    ]
    assert "without the contrast T1w" in wrong[0]
    assert "lesion not annotated" in wrong[2]
    plan.config.trial.arms = ["conditioned", "unconditioned"]
    check_plan(plan)


def test_what_the_environment_changes_of_a_training_is_part_of_the_design(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, write_bids(tmp_path / "bids", count=4))
    whole = design(plan)
    said = whole["nnunet"]
    assert (said["configuration"], said["epochs"], said["iterations"]) == ("2d", None, None)
    assert said["version"] == nnunet_data.version("nnunetv2") and said["where"] == "decoder"
    monkeypatch.setenv("FASTFILM_NNUNET_EPOCHS", "7")
    shorter = design(plan)
    assert shorter["nnunet"]["epochs"] == 7 and shorter["sha256"] != whole["sha256"]
    plan.config.trial.arms = ["conditioned", "unconditioned"]
    assert "nnunet" not in design(plan)


def test_the_cost_of_nnunet_is_said_to_be_unknown() -> None:
    runs = [Run("nnunet", 0, 0), Run("nnunet_conditioned", 0, 0)]
    assert cost_of(None, runs, "cpu") == {}  # type: ignore[arg-type]
    (line,) = said({}, runs)
    assert line.startswith("2 networks of nnU-Net: their cost is not estimated")
