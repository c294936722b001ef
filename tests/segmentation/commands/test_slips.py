"""Slips that were accepted in silence once: each is refused or said now, and nothing is written over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import nibabel as nib

from fastfilm.__main__ import main
from fastfilm.segmentation.config.schema import override, parse
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.data.cache import cached
from fastfilm.segmentation.data.datasets import find_cases
from fastfilm.segmentation.data.plan import make_plan
from fastfilm.segmentation.metadata.encoder import MetadataEncoder, MetadataError
from fastfilm.segmentation.prediction.inputs import _row_of, _rows
from fastfilm.segmentation.support.errors import UserError

from ...support.bad_inputs import (
    World,
    copied,
    header,
    replace,
    voxels,
    write_world,
)
from ...support.phantoms import settings, write_bids


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planned and trained data set, conditioned on a category and a number."""
    root = write_world(tmp_path_factory.mktemp("slips") / "w")
    config = World(root).settings(metadata={"age": {"kind": "continuous"}})
    plan, model = str(root / "plan"), str(root / "model")
    assert main(["plan", config, plan]) == 0 and main(["train", plan, model]) == 0
    return root


@pytest.fixture
def world(trained: Path, tmp_path: Path) -> World:
    return copied(trained, tmp_path / "w")


def run(*argv: Any) -> int:
    return main([str(a) for a in argv])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("values", [[0.1] * 3, [0.1] * 7, [0.004] * 10, [9.9] * 12, [-0.3] * 11])
def test_a_number_that_is_the_same_in_all_cases_is_not_divided_by_rounding(
    values: list[float],
) -> None:
    rows = {str(i): {"k": v} for i, v in enumerate(values)}
    encoder = MetadataEncoder.fit(rows, {"k": MetadataKey(kind="continuous")})
    assert encoder["k"].std == 1.0
    assert abs(encoder.encode({"k": values[0] + 0.01})[0] - 0.01) < 1e-6


@pytest.mark.parametrize("value", [1e39, [True, False], "1_000", 10**400, {"a": 1}])
def test_what_is_no_number_of_this_world_is_refused(value: Any) -> None:
    rows = {"a": {"k": 31}, "b": {"k": 34}}
    encoder = MetadataEncoder.fit(rows, {"k": MetadataKey(kind="continuous")})
    with pytest.raises(MetadataError, match="'k'"):
        encoder.encode({"k": value})


def test_a_list_is_no_category_and_a_list_of_missing_values_is_missing() -> None:
    encoder = MetadataEncoder.fit({"a": {"k": "x"}, "b": {"k": "y"}}, {"k": MetadataKey()})
    assert encoder.encode({"k": ["n/a", None]}).tolist() == [0, 0, 1]
    with pytest.raises(MetadataError, match="kind multilabel"):
        encoder.encode({"k": ["x", "y"]})


def test_channels_in_another_order_are_another_entry_of_the_cache(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    for i in range(1, 6):
        image = root / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_FLAIR.nii.gz"
        shutil.copy(image, str(image).replace("FLAIR", "T1w"))
    folders = set()
    for contrasts in (["FLAIR", "T1w"], ["T1w", "FLAIR"]):
        data = {"contrasts": contrasts, "missing_contrast": "zeros"}
        made, notes = make_plan(parse(settings(root, data=data), "test"), tmp_path / "plan")
        assert any("1 cases lack a contrast" in n for n in notes)
        case = next(c for c in made.cases if None in c.images)
        (entry,) = cached([case], made.config.data, made.plan.preprocessing, tmp_path / "cache")
        assert [bool(c.any()) for c in entry.image()] == [p is not None for p in case.images]
        folders.add(entry.folder)
    assert len(folders) == 2


@pytest.mark.parametrize("options", [{"missing_contrast": "zeros"}, {"combine": "samples"}])
def test_a_contrast_that_no_case_has_is_named(tmp_path: Path, options: dict[str, str]) -> None:
    root = write_bids(tmp_path / "bids")
    config = parse(settings(root, data={"contrasts": ["FLAIR", "FLAIRE"], **options}), "test")
    assert any("no case has an image of contrast FLAIRE" in p for p in find_cases(config).problems)


def test_subjects_without_a_case_are_said_and_links_to_folders_are_followed(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    image = root / "sub-03" / "anat" / "sub-03_FLAIR.nii.gz"
    image.rename(image.with_name("sub-03_Flair.nii.gz"))
    shutil.move(root / "sub-04" / "anat", tmp_path / "elsewhere")
    (root / "sub-04" / "anat").symlink_to(tmp_path / "elsewhere")
    (root / "sub-04" / "loop").symlink_to(root / "sub-04")
    replace(root / "participants.tsv", "sub-05", "sub-77")
    shutil.rmtree(root / "sub-05")
    found = find_cases(parse(settings(root), "test"))
    assert [c.subject for c in found.cases] == ["sub-00", "sub-01", "sub-02", "sub-04"]
    assert "1 sub-* folders have no image of FLAIR: sub-03" in found.notes
    assert "1 rows of participants.tsv have no folder: sub-77" in found.notes


def test_the_sidecar_of_another_contrast_does_not_stand_for_a_missing_image(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=2)
    for i in range(2):
        image = root / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_FLAIR.nii.gz"
        other = Path(str(image).replace("FLAIR", "T1w"))
        shutil.copy(image, other)
        other.with_name(f"sub-{i:02d}_T1w.json").write_text('{"EchoTime": 0.003}')
        image.with_name(f"sub-{i:02d}_FLAIR.json").write_text('{"EchoTime": 0.1}')
    (root / "sub-00" / "anat" / "sub-00_FLAIR.nii.gz").unlink()
    label = root / "derivatives" / "labels" / "sub-00" / "anat" / "sub-00_FLAIR_dseg.nii.gz"
    label.rename(str(label).replace("FLAIR", "T1w"))
    config = settings(
        root,
        data={"contrasts": ["FLAIR", "T1w"], "missing_contrast": "zeros"},
        metadata={"EchoTime": {"kind": "continuous"}},
    )
    values = [c.metadata["EchoTime"] for c in find_cases(parse(config, "test")).cases]
    assert values == [None, 0.1]


CHANGES: list[tuple[str, Callable[[World], Any], str]] = [
    ("labels", lambda w: voxels(w.label(1), lambda a: 7 * a), "label values 7 are not in"),
    ("no labels", lambda w: voxels(w.label(1), lambda a: 0 * a), "all background"),
    ("constant", lambda w: voxels(w.image(1), lambda a: 0 * a + 3), "every voxel is 3"),
    (
        "absurd",
        lambda w: voxels(w.image(1), lambda a: a * np.float32(1e30)),
        "intensities of up to",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), [pytest.param(c, m, id=n.replace(" ", "_")) for n, c, m in CHANGES]
)
def test_files_that_changed_after_the_plan_are_checked_again(
    world: World,
    change: Callable[[World], Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.rmtree(world.plan)
    assert run("plan", world.settings(), world.plan) == 0
    change(world)
    assert run("train", world.plan, world.out) == 1
    text = said(capsys)
    assert "sub-01: has changed since the plan was made" in text and message in text
    assert not world.out.exists()


def test_settings_are_added_to_what_is_there() -> None:
    value: dict[str, Any] = {"metadata": ["tumor_type"], "training": {"epochs": 3, "seed": 1}}
    override(value, "metadata.age.kind", "continuous")
    override(value, "training", {"epochs": 1})
    assert value == {
        "metadata": {"tumor_type": {}, "age": {"kind": "continuous"}},
        "training": {"epochs": 1, "seed": 1},
    }
    with pytest.raises(UserError, match="epochs has no keys"):
        override(value, "training.epochs.x", 1)


def test_a_configuration_is_not_written_over(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.out.mkdir()
    shutil.copy(world.settings(), world.out / "config.yaml")
    before = (world.out / "config.yaml").read_bytes()
    assert run("plan", world.out / "config.yaml", world.out) == 1
    assert "would be written over" in said(capsys)
    assert (world.out / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "target", ["sub-00_FLAIR.nii.gz", ".nii.gz", "../bids/sub-00/anat/sub-00_FLAIR.nii.gz"]
)
def test_an_image_is_never_written_over(
    world: World, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world.root / "flat"
    folder.mkdir()
    image = folder / "sub-00_FLAIR.nii.gz"
    os.link(world.image(0), image)
    before = image.read_bytes()
    argv = ["--meta", "tumor_type=astrocytoma", "--meta", "age=31"]
    assert run("predict", world.model, image, folder / target, *argv) == 1
    assert image.read_bytes() == before and "Traceback" not in said(capsys)


def test_a_single_prediction_has_the_name_that_was_asked_for(world: World) -> None:
    world.out.mkdir()
    argv = ["--meta", "tumor_type=astrocytoma", "--meta", "age=31"]
    assert run("predict", world.model, world.image(0), world.out / "my seg.nii", *argv) == 0
    assert [p.name for p in world.out.iterdir()] == ["my seg.nii"]
    assert np.asarray(nib.load(world.out / "my seg.nii").dataobj).shape == (16, 16, 12)


def test_files_of_others_in_the_output_folder_are_not_written_over(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.out.mkdir()
    shutil.copy(world.label(1), world.out / "sub-01.nii.gz")
    before = (world.out / "sub-01.nii.gz").read_bytes()
    assert run("predict", world.model, world.bids, world.out) == 1
    assert "was not written by fastfilm predict" in said(capsys)
    assert (world.out / "sub-01.nii.gz").read_bytes() == before


def test_results_of_earlier_predictions_do_not_outlive_them(world: World) -> None:
    assert run("predict", world.model, world.plan, world.out, "--swap", "tumor_type") == 0
    assert run("evaluate", world.out) == 0
    assert run("predict", world.model, world.plan, world.out) == 0
    names = {p.name for p in world.out.iterdir() if p.is_file()}
    assert not names & {"swap.json", "swap_table.json", "summary.json", "comparison.json"}
    assert run("evaluate", world.out) == 0 and (world.out / "summary.json").is_file()
    assert run("predict", world.model, world.plan, world.out, "--overlap", "0.1") == 0
    assert not (world.out / "summary.json").exists()


def test_going_on_with_other_weights_is_refused(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", world.model, world.plan, world.out]
    assert run(*argv) == 0 and run(*argv, "--continue", "--weights", "final") == 1
    assert "another model or with other settings" in said(capsys)


ROWS = {
    "sessions": ("participant_id\tses\tage\nsub-1\t1\t31\nsub-1\tses-2\t34\n", ["31", "34", None]),
    "cases": (
        "participant_id\tcase\tage\nsub-1\tsub-1_ses-1\t31\nsub-1\tsub-1_ses-2\t34\n",
        ["31", "34", None],
    ),
    "subject": ("subject\tage\nsub-1\t31\n", ["31", "31", "31"]),
    "index": ("participant_id\tid\tage\nsub-1\t7\t31\n", ["31", "31", "31"]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_case_has_its_own_row_or_none(tmp_path: Path, kind: str) -> None:
    text, expected = ROWS[kind]
    (tmp_path / "t.tsv").write_text(text)
    table = _rows(tmp_path / "t.tsv")
    for session, age in zip("123", expected, strict=True):
        names = [f"sub-1_ses-{session}", f"sub-1_ses-{session}_FLAIR", "sub-1", "1"]
        row = _row_of(table, names, {"sub": "1", "ses": session})
        assert (row or {}).get("age") == age


@pytest.mark.parametrize(
    "text",
    [
        "case\tsubject\tage\na\tx\t1\na\ty\t2\n",
        "participant_id\tage\nsub-1\t1\nsub-1\t2\n",
        "participant_id\tses\tage\nsub-1\t1\t1\nsub-1\t1\t2\n",
    ],
)
def test_two_rows_of_one_case_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(UserError, match="line 3: a second row for"):
        _rows(tmp_path / "t.tsv")


def test_values_that_training_did_not_have_are_said(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--meta", "tumor_type=astrocitoma", "--meta", "age=400"]
    assert run("predict", world.model, world.bids, world.out, *argv) == 0
    text = said(capsys)
    assert (
        "tumor_type has a value that was not in training, and counts as unknown, in 6 of 6" in text
    )
    assert "age is outside the training's range (3" in text and "in 6 of 6 cases" in text
    for swap in ("tumor_type=zzz", "age=20,20.0"):
        assert run("predict", world.model, world.bids, world.root / "s", "--swap", swap) == 1
    assert "Traceback" not in said(capsys)


def test_a_number_beyond_all_numbers_is_its_cases_problem_alone(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(world.table, "\t31", "\t1e39")
    assert run("predict", world.model, world.bids, world.out) == 1
    text = said(capsys)
    assert "1 failed" in text and "sub-01" in text and "beyond all numbers" in text
    assert len(list(world.out.glob("*.nii.gz"))) == 5


def test_several_values_at_once_are_named_by_their_separator(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    table = root / "participants.tsv"
    lines = table.read_text().splitlines()
    values = ["f", "a", "b", "a|b", "a", "b", "a|b"]
    table.write_text("".join(f"{line}\t{v}\n" for line, v in zip(lines, values, strict=True)))
    config = settings(root, metadata={"f": {"kind": "multilabel", "separator": "|"}})
    config["training"] |= {"epochs": 1, "steps_per_epoch": 1}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    plan, model, out = (tmp_path / n for n in ("plan", "model", "out"))
    assert run("plan", tmp_path / "c.yaml", plan) == 0 and run("train", plan, model) == 0
    assert run("predict", model, plan, out, "--part", "train") == 0 and run("evaluate", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["labels"]["1"]["groups"]["f"]) <= {"a", "b", "unknown"}


def test_an_infinite_scale_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    header(world.image(1), scl_slope=np.inf)
    assert run("plan", world.settings(), world.out) == 1
    assert "scl_slope in its header is infinite" in said(capsys)


def test_a_plan_is_no_place_for_predictions(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", world.model, world.bids, world.plan) == 1
    assert "holds plan.json" in said(capsys)
