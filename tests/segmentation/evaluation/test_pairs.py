"""Which truth belongs to which prediction, what is said about the files, and what hostile ones cannot do."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import nibabel as nib
import yaml

from fastfilm.segmentation.commands import cli

from ...support.phantoms import settings, write_bids

LESION = [("lesion", 1)]


def run(*argv: Any) -> int:
    return cli.run(str(argv[0]), [str(a) for a in argv[1:]])


def some(seed: int = 0, shape: tuple[int, ...] = (5, 6, 7)) -> np.ndarray:
    return (np.random.default_rng(seed).random(shape) > 0.5).astype(np.uint8)


def write(
    path: Path, array: np.ndarray, affine: np.ndarray | None = None, unit: str = "mm"
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


def manifest(folder: Path, cases: dict[str, Any], labels: Any = LESION, **more: Any) -> None:
    """predictions.json; a label without a value has a mask of its own."""
    separate = any(v is None for _, v in labels)
    listed = [
        {"name": n, "values": [] if v is None else [v], "value": v or i}
        for i, (n, v) in enumerate(labels, 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    value = {"labels": listed, "separate": separate, "cases": cases, **more}
    (folder / "predictions.json").write_text(json.dumps(value))


def entry(outputs: dict[str, str], subject: str = "s", **more: Any) -> dict[str, Any]:
    return {
        "subject": subject,
        "images": [],
        "metadata": {},
        "truth": {},
        "outputs": outputs,
        **more,
    }


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def references(folder: Path) -> dict[str, str]:
    return {c["case"]: Path(c["reference_file"]).name for c in summary(folder)["metric_per_case"]}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Predictions of cases ``a`` and ``a_b`` of a plan, and a folder with another truth of both."""
    cases = {}
    for i, name in enumerate(("a", "a_b")):
        write(tmp_path / "pred" / f"{name}.nii.gz", some(i))
        write(tmp_path / "truth" / f"{name}.nii.gz", some(i))
        plan = write(tmp_path / "plan" / f"{name}.nii.gz", 1 - some(i))
        cases[name] = entry({"labels": f"{name}.nii.gz"}, name, truth={"lesion": str(plan)})
    manifest(tmp_path / "pred", cases)
    return tmp_path


def test_with_a_truth_folder_the_plans_labels_do_not_count(two: Path, capsys: Any) -> None:
    assert run("evaluate", two / "pred", "--truth", two / "truth") == 0
    assert summary(two / "pred")["foreground_mean"]["Dice"] == 1
    assert run("evaluate", two / "pred", "--out", two / "plan-truth") == 0
    assert summary(two / "plan-truth")["foreground_mean"]["Dice"] == 0
    (two / "truth" / "a.nii.gz").unlink()
    # a_b.nii.gz is the truth of a_b, and not of a
    assert run("evaluate", two / "pred", "--truth", two / "truth", "--out", two / "out") == 1
    assert f"a: no truth in {two / 'truth'}" in capsys.readouterr().err
    assert not (two / "out").exists()


def test_the_longer_case_name_wins_also_with_more_behind_it(two: Path) -> None:
    for name in ("a", "a_b"):
        (two / "truth" / f"{name}.nii.gz").rename(two / "truth" / f"{name}_seg.nii.gz")
    assert run("evaluate", two / "pred", "--truth", two / "truth") == 0
    assert references(two / "pred") == {"a": "a_seg.nii.gz", "a_b": "a_b_seg.nii.gz"}


def test_several_files_that_could_be_the_truth_are_named(two: Path, capsys: Any) -> None:
    write(two / "truth" / "again" / "a.nii.gz", some())
    assert run("evaluate", two / "pred", "--truth", two / "truth") == 1
    error = capsys.readouterr().err
    assert "a: several files could be its truth" in error and "again/a.nii.gz" in error


@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
def test_an_image_in_the_truth_folder_is_not_its_own_truth(
    tmp_path: Path, how: str, capsys: Any
) -> None:
    image = write(tmp_path / ("t" if how == "itself" else "images") / "a.nii.gz", some(3))
    (tmp_path / "t").mkdir(exist_ok=True)
    if how == "link":
        os.symlink(image, tmp_path / "t" / "a.nii.gz")
    elif how == "hard link":
        os.link(image, tmp_path / "t" / "a.nii.gz")
    write(tmp_path / "pred" / "a.nii.gz", some())
    manifest(tmp_path / "pred", {"a": entry({"labels": "a.nii.gz"}, images=[str(image)])})
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t") == 1
    assert "a: no truth in" in capsys.readouterr().err
    write(tmp_path / "t" / "a_seg.nii.gz", some())
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t") == 0
    assert references(tmp_path / "pred") == {"a": "a_seg.nii.gz"}


def test_predictions_are_never_their_own_truth(two: Path, capsys: Any) -> None:
    assert run("evaluate", two / "pred", "--truth", two / "pred") == 1
    assert "a: no truth in" in capsys.readouterr().err
    # nor are those of a folder inside the truth folder
    write(two / "truth" / "mine" / "a.nii.gz", some(5))
    (two / "truth" / "a_b.nii.gz").unlink()
    assert run("evaluate", two / "truth" / "mine", "--truth", two / "truth") == 0
    assert references(two / "truth" / "mine") == {"a": "a.nii.gz"}
    assert summary(two / "truth" / "mine")["foreground_mean"]["Dice"] < 1


def test_a_dangling_link_is_named_and_the_other_cases_count(two: Path, capsys: Any) -> None:
    (two / "truth" / "a.nii.gz").unlink()
    os.symlink(two / "annex" / "object", two / "truth" / "a.nii.gz")
    assert run("evaluate", two / "pred", "--truth", two / "truth") == 1
    error = capsys.readouterr().err
    assert "a.nii.gz: is a link to" in error and "Traceback" not in error
    assert list(references(two / "pred")) == ["a_b"]
    os.symlink(two / "gone", two / "folder")
    assert run("evaluate", two / "pred", "--truth", two / "folder") == 1
    assert "is a link to" in capsys.readouterr().err


def test_masks_of_their_own_find_their_truth_and_missing_ones_are_said(
    tmp_path: Path, capsys: Any
) -> None:
    labels = [("core", None), ("my core", None)]
    cases = {}
    for i, case in enumerate(("x", "y")):
        outputs = {"core": f"{case}_core.nii.gz", "my core": f"sub/{case}_my%20core.nii.gz"}
        for path in outputs.values():
            write(tmp_path / "pred" / path, some(i))
        cases[case] = entry(outputs, case)
    manifest(tmp_path / "pred", cases, labels)
    write(tmp_path / "t" / "x_core.nii.gz", some(0) * 255)
    write(tmp_path / "t" / "x_my core.nii.gz", 1 - some(0))
    write(tmp_path / "t" / "y_seg_core.nii.gz", some(1))
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t") == 0
    said = capsys.readouterr().out
    assert f"note: my core: no truth in {tmp_path / 't'} for 1 of 2 cases: y" in said
    means = summary(tmp_path / "pred")["labels"]
    assert [(d["name"], d["metrics"]["Dice"]["mean"]) for d in means.values()] == [
        ("core", 1),
        ("my core", 0),
    ]


def test_values_that_are_no_label_are_said(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "pred" / "a.nii.gz", some() * 3)
    write(tmp_path / "t" / "a.nii.gz", some() * 255)
    manifest(tmp_path / "pred", {"a": entry({"labels": "a.nii.gz"})})
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t") == 0
    said = capsys.readouterr().out
    assert "truth: values that are no label (255) in 1 file" in said and "t/a.nii.gz" in said
    (tmp_path / "pred" / "predictions.json").unlink()
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t", "--label", "x=255") == 0
    said = capsys.readouterr().out
    assert "predictions: values that are no label (3)" in said and "truth" not in said
    assert summary(tmp_path / "pred")["notes"]


def test_labels_of_a_model_may_have_other_values_in_the_truth(tmp_path: Path, capsys: Any) -> None:
    pred = some() * 2
    pred[0] = 1
    truth = np.where(pred == 1, 7, 0) + np.where(pred == 2, 9, 0)
    write(tmp_path / "pred" / "a.nii.gz", pred)
    write(tmp_path / "t" / "a.nii.gz", truth.astype(np.uint8))
    manifest(tmp_path / "pred", {"a": entry({"labels": "a.nii.gz"})}, [("core", 1), ("edema", 2)])
    command = ["evaluate", tmp_path / "pred", "--truth", tmp_path / "t"]
    assert run(*command, "--label", "core=7", "--label", "edema=9") == 0
    assert summary(tmp_path / "pred")["foreground_mean"]["Dice"] == 1
    # a name of the user's own: several of their values together, in both
    assert run(*command, "--label", "whole=1,2") == 0
    assert summary(tmp_path / "pred")["foreground_mean"]["Dice"] == 0
    # the plan's truth has the model's values
    plan = str(write(tmp_path / "plan" / "a.nii.gz", pred))
    cases = {"a": entry({"labels": "a.nii.gz"}, truth={"core": plan, "edema": plan})}
    manifest(tmp_path / "pred", cases, [("core", 1), ("edema", 2)])
    assert run("evaluate", tmp_path / "pred", "--label", "whole=1,2") == 0
    assert summary(tmp_path / "pred")["foreground_mean"]["Dice"] == 1
    # a label that was not annotated is not scored against the others' file
    manifest(tmp_path / "pred", {"a": {**cases["a"], "truth": {"core": plan}}},
             [("core", 1), ("edema", 2)])  # fmt: skip
    capsys.readouterr()
    assert run("evaluate", tmp_path / "pred") == 0
    assert "edema: no truth known for 1 of 1 cases: a" in capsys.readouterr().out
    assert list(summary(tmp_path / "pred")["labels"]) == ["1"]
    assert run(*command, "--label", "oedema=9") == 1
    error = capsys.readouterr().err
    assert "core=1, edema=2" in error and "did you mean 'edema'?" in error


def test_a_label_of_other_programs_is_all_of_its_values(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    write(tmp_path / "pred" / "a.nii.gz", array)
    write(tmp_path / "t" / "a.nii.gz", array)
    command = ["evaluate", tmp_path / "pred", "--truth", tmp_path / "t"]
    assert run(*command, "--label", "whole=1,2", "--label", "third=3") == 0
    counts = summary(tmp_path / "pred")["metric_per_case"][0]["metrics"]
    assert counts["1"]["n_pred"] == counts["1"]["n_ref"] == int(np.isin(array, (1, 2)).sum())


def test_soft_masks_are_cut_at_one_half_and_said(tmp_path: Path, capsys: Any) -> None:
    hard = some()
    write(tmp_path / "pred" / "a.nii.gz", hard)
    write(tmp_path / "t" / "a.nii.gz", (0.2 + 0.5 * hard).astype(np.float32))
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t", "--label", "x=1") == 0
    assert "cut at 1/2" in capsys.readouterr().out
    assert summary(tmp_path / "pred")["foreground_mean"]["Dice"] == 1
    write(tmp_path / "t" / "a.nii.gz", (17.3 * hard).astype(np.float32))
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t", "--label", "x=1") == 1
    assert "a.nii.gz: label values 17.29" in capsys.readouterr().err


def test_units_of_the_file_are_converted_and_remarks_said_once(tmp_path: Path, capsys: Any) -> None:
    truth = np.zeros((12, 12, 12), np.uint8)
    truth[4:8, 4:8, 4:8] = 1
    for name in "ab":
        for folder, array in (("pred", np.roll(truth, 1, 0)), ("t", truth)):
            for unit, scale in (("mm", 1), ("micron", 1000), ("unknown", 1)):
                affine = np.diag([2.0 * scale] * 3 + [1])
                write(tmp_path / unit / folder / f"{name}.nii.gz", array, affine, unit)
    for unit in ("mm", "micron", "unknown"):
        folder = tmp_path / unit
        assert run("evaluate", folder / "pred", "--truth", folder / "t") == 0
        assert summary(folder / "pred")["foreground_mean"]["HD95"] == pytest.approx(2)
    said = capsys.readouterr().out
    assert said.count("no unit of length") == 1 and "4 files" in said


def test_subjects_of_other_programs_are_those_of_their_bids_names(tmp_path: Path) -> None:
    for name in ("sub-1_ses-1", "sub-1_ses-2", "other"):
        write(tmp_path / "pred" / f"{name}.nii.gz", some())
        write(tmp_path / "t" / f"{name}_dseg.nii.gz", some())
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t") == 0
    subjects = {c["case"]: c["subject"] for c in summary(tmp_path / "pred")["metric_per_case"]}
    assert subjects == {"other": "other", "sub-1_ses-1": "sub-1", "sub-1_ses-2": "sub-1"}


def test_cells_of_the_table_are_no_formulas(tmp_path: Path) -> None:
    metadata = {"a": "=1+2", "b": "@x", "c": "-3", "d": -3.5, "e": "+cmd", "f": "\tx", "g": "\rx,y",
                "h": "-", "i": None, "j": ["=x"], "k": "+49 12"}  # fmt: skip
    write(tmp_path / "pred" / "x.nii.gz", some())
    truth = write(tmp_path / "t" / "x.nii.gz", some())
    cases = {"=x": entry({"labels": "x.nii.gz"}, "-s", metadata=metadata,
                         truth={"+lesion": str(truth)})}  # fmt: skip
    manifest(tmp_path / "pred", cases, [("+lesion", 1)])
    assert run("evaluate", tmp_path / "pred") == 0
    with open(tmp_path / "pred" / "cases.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["case"], row["subject"], row["label"]) == ("'=x", "'-s", "'+lesion")
    expected = [
        "'=1+2",
        "'@x",
        "-3",
        "-3.5",
        "'+cmd",
        "'\tx",
        "'\rx,y",
        "'-",
        "",
        "'=x",
        "'+49 12",
    ]
    assert [row[f"meta_{k}"] for k in metadata] == expected
    assert float(row["Dice"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a list of predictions"),
        ('{"separate": false, "cases": {}}', "labels: Field required"),
        ('{"labels": [{"name": "x", "values": [1], "value": 1}], "separate": false, "cases": []}',
         "cases"),
        ('{"labels": [{"name": "x", "values": [1], "value": 1}], "separate": false,'
         ' "cases": {"a": {"subject": 3, "outputs": {}}}}', "cases.a.subject"),
        ('{"labels": [{"name": "x", "values": [1], "value": 0}], "separate": false, "cases": {}}',
         "labels.0.value: Input should be greater"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_a_damaged_list_of_predictions_is_one_message(
    tmp_path: Path, text: str, message: str, capsys: Any
) -> None:
    write(tmp_path / "pred" / "a.nii.gz", some())
    (tmp_path / "pred" / "predictions.json").write_text(text)
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "pred") == 1
    error = capsys.readouterr().err
    assert message in error and "predictions.json" in error and error.count("\n") == 1


@pytest.mark.parametrize("path", ["/etc/hostname", "../a.nii.gz", "", "x/../../a.nii.gz"])
def test_outputs_outside_the_folder_are_refused(tmp_path: Path, path: str, capsys: Any) -> None:
    write(tmp_path / "a.nii.gz", some())
    manifest(tmp_path / "pred", {"a": entry({"labels": path})})
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path) == 1
    error = capsys.readouterr().err
    assert "predictions.json: a:" in error and "is not a path in" in error


@pytest.mark.parametrize("folder", ["../outside", "/tmp", ".", "", "a/b", "link"])
def test_swapped_results_are_not_written_outside(tmp_path: Path, folder: str, capsys: Any) -> None:
    pred, outside = tmp_path / "swap", tmp_path / "outside"
    for where in (outside, pred / "a" / "b"):
        write(where / "x.nii.gz", some())
    write(tmp_path / "t" / "x.nii.gz", some())
    os.symlink(outside, pred / "link")
    swap = {"key": "k", "true": {"x": "v"}, "fed": [{"value": "v", "folder": folder}]}
    (pred / "swap.json").write_text(json.dumps(swap))
    assert run("evaluate", pred, "--truth", tmp_path / "t") == 1
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tolerance", "nan"], "--tolerance"),
        (["--tolerance", "inf"], "--tolerance"),
        (["--label", "x=1", "--label", "x=2"], "twice"),
        (["--label", "x=1", "--label", "y=1"], "the value 1"),
        (["--label", "x=1,1"], "the value 1"),
        (["--label", "x=0"], "above 0"),
        (["--label", "x=-1"], "above 0"),
        (["--label", "=1"], "NAME=VALUE"),
        (["--metrics", "Dise"], "did you mean 'Dice'?"),
        (["--compare", "FOLDER/nothing"], "FOLDER/nothing"),
        (["--out", "FOLDER/t/a.nii.gz"], "is not a folder"),
    ],
)
def test_options_that_cannot_be_are_named(
    tmp_path: Path, options: list[str], message: str, capsys: Any
) -> None:
    write(tmp_path / "pred" / "a.nii.gz", some())
    write(tmp_path / "t" / "a.nii.gz", some())
    options = [o.replace("FOLDER", str(tmp_path)) for o in options]
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t", *options) == 1
    error = capsys.readouterr().err
    assert message.replace("FOLDER", str(tmp_path)) in error and "Traceback" not in error
    assert not (tmp_path / "pred" / "summary.json").exists()


@pytest.mark.parametrize("content", [b"", b"no NIfTI"])
def test_a_truth_that_cannot_be_read_is_named(tmp_path: Path, content: bytes, capsys: Any) -> None:
    write(tmp_path / "pred" / "a.nii.gz", some())
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.nii.gz").write_bytes(content)
    for options in ([], ["--label", "x=1"]):
        assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "t", *options) == 1
        error = capsys.readouterr().err
        assert "t/a.nii.gz: " in error and "Traceback" not in error
    assert not (tmp_path / "pred" / "summary.json").exists()


def test_regions_that_overlap_are_written_and_scored_each_on_its_own(tmp_path: Path) -> None:
    def regions(_: Any, mask: Any) -> Any:
        mask = (mask > 0).astype(np.uint8)
        mask[mask.shape[0] // 2 :][mask[mask.shape[0] // 2 :] > 0] = 2
        mask[0, 0, 0] = 1
        return mask

    root = write_bids(tmp_path / "bids", labels=regions)
    value = settings(
        root,
        data={"labels": {"whole": [1, 2], "core": 2}},
        training={"epochs": 1, "steps_per_epoch": 1},
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(value))
    plan, model, out = (tmp_path / n for n in ("plan", "model", "out"))
    assert run("plan", tmp_path / "c.yaml", plan) == 0 and run("train", plan, model) == 0
    assert run("predict", model, plan, out) == 0
    # the truth itself as the prediction: each region is right although they overlap
    manifest = json.loads((out / "predictions.json").read_text())
    for entry in manifest["cases"].values():
        assert set(entry["outputs"]) == {"whole", "core"}
        truth = nib.load(entry["truth"]["core"])
        labels = np.asarray(truth.dataobj)
        for name, values in (("whole", (1, 2)), ("core", (2,))):
            mask = np.isin(labels, values).astype(np.uint8)
            nib.save(nib.Nifti1Image(mask, truth.affine), out / entry["outputs"][name])
    for options in ([], ["--truth", root / "derivatives"]):
        assert run("evaluate", out, *options) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert {d["name"]: d["metrics"]["Dice"]["mean"] for d in summary["labels"].values()} == {
            "whole": 1.0, "core": 1.0,
        }  # fmt: skip
