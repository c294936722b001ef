"""Numbers that are none, out of range, or there twice: in a configuration, a model.json, and results."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import yaml

from fastfilm.segmentation.config.schema import Config, parse
from fastfilm.segmentation.evaluation.folder import read_summary
from fastfilm.segmentation.metadata.groups import grouping
from fastfilm.segmentation.models.folder import read_info
from fastfilm.segmentation.support.errors import Problems, UserError

from ...support.models import make_model
from ..evaluation.test_pairs import (
    entry,
    manifest,
    run,
    some,
    summary,
    write,
)

# configuration


def configuration(key: str, text: str) -> Config:
    """One with ``key`` (dotted) as YAML reads ``text``."""
    value: dict[str, Any] = {
        "data": {"root": ".", "contrasts": ["T1w"], "labels": {"lesion": 1}},
        "metadata": {"age": {"kind": "continuous"}},
    }
    *parents, last = key.split(".")
    inner = value
    for parent in parents:
        inner = inner.setdefault(parent, {})
    inner[last] = yaml.safe_load(text)
    return parse(value, "config.yaml")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("data.labels.lesion", "yes"),
        ("data.labels.lesion", "[1, on]"),
        ("data.labels.lesion", "{values: [yes]}"),
        ("data.ignore_values", "[no, 2]"),
        ("data.grid_tolerance", "no"),
        ("training.epochs", "yes"),
        ("training.ema", "off"),
        ("augmentation.affine", "yes"),
        ("preprocessing.spacing", "[yes, 1, 1]"),
        ("preprocessing.patch_size", "[8, yes]"),
        ("network.film_layers", "[yes, 1]"),
        ("network.depth", "on"),
        ("metadata.age.dropout", "no"),
        ("splits.folds", "yes"),
    ],
)
def test_a_truth_value_is_no_number(key: str, text: str) -> None:
    with pytest.raises(Problems, match=f"{re.escape(key)}.*: must be a number, got (True|False)"):
        configuration(key, text)


def test_switches_take_truth_values() -> None:
    assert configuration("preprocessing.nonzero", "yes").preprocessing.nonzero is True
    assert configuration("training.channels_last", "off").training.channels_last is False
    arguments = configuration("network", "{name: condition, target: x.Y, arguments: {bias: no}}")
    assert arguments.network.arguments == {"bias": False}


@pytest.mark.parametrize("text", [".inf", ".nan"])
@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("training.learning_rate", "{}"),
        ("training.clip_gradient", "{}"),
        ("data.grid_tolerance", "{}"),
        ("preprocessing.spacing", "[{}, 1, 1]"),
        ("augmentation.affine", "{}"),
        ("metadata.age.dropout", "{}"),
    ],
)
def test_infinity_and_nan_are_no_numbers(key: str, form: str, text: str) -> None:
    with pytest.raises(Problems, match=re.escape(key)):
        configuration(key, form.format(text))


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("data.labels", "{lesion: []}", "data.labels.lesion.values: .*at least 1"),
        ("data.labels.lesion", "{values: []}", "data.labels.lesion.values: .*at least 1"),
        ("data.labels.lesion", "65536", "data.labels.lesion.values.0: .*65535"),
        ("data.labels.lesion", "0", "data.labels.lesion.values.0: "),
        ("data.ignore_values", "[3, 1]", "ignore_values: 1 is a value of the label 'lesion'"),
        ("metadata.age.separator", '""', "metadata.age.separator: "),
        ("network.depth", "13", "network.depth: "),
        ("preprocessing.patch_size", "[8, 4097]", "preprocessing.patch_size.1: "),
    ],
)
def test_values_out_of_range_are_named(key: str, text: str, message: str) -> None:
    with pytest.raises(Problems, match=message):
        configuration(key, text)


def test_the_largest_label_value_is_allowed() -> None:
    assert configuration("data.labels.lesion", "65535").data.labels["lesion"].values == [65535]


# model.json


def key_of(**values: Any) -> Any:
    def change(model: dict[str, Any]) -> None:
        model["metadata"]["keys"][0].update(values)

    return change


def channel_of(**values: Any) -> Any:
    def change(model: dict[str, Any]) -> None:
        model["preprocessing"]["channels"][0].update(values)

    return change


def label_of(**values: Any) -> Any:
    def change(model: dict[str, Any]) -> None:
        model["labels"][0].update(values)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (label_of(value=0), "labels.0.value: "),
        (label_of(value=65536), "labels.0.value: "),
        (label_of(value=True), "labels.0.value: must be a number"),
        (label_of(values=[0]), "labels.0.values.0: "),
        (lambda m: m["labels"].append({**m["labels"][0], "value": 2}), "labels: names must differ"),
        (channel_of(std=0), "preprocessing.channels.0.std: "),
        (channel_of(std=1e999), "preprocessing.channels.0.std: |not JSON"),
        (channel_of(low=2, high=1), "preprocessing.channels.0: low must not be above high"),
        (lambda m: m["preprocessing"].update(spacing=[1, 0, 1]), "preprocessing.spacing.1: "),
        (lambda m: m.update(patch_size=[8, 8, 4097]), "patch_size.2: "),
        (key_of(std=0), "metadata: key 'tumor_type': std must be above 0"),
        (key_of(values=["a", "a"]), "metadata: key 'tumor_type': values must differ"),
        (key_of(edges=[2, 1]), "metadata: key 'tumor_type': edges must ascend"),
        (key_of(dropout=2), "metadata: key 'tumor_type': dropout|metadata.keys.0.dropout"),
        (key_of(separator=""), "metadata: key 'tumor_type': sep|metadata.keys.0.separator"),
        (lambda m: m["metadata"]["keys"].append(m["metadata"]["keys"][0]), "metadata: names of"),
    ],
)
def test_a_model_json_made_by_hand_is_checked(tmp_path: Path, change: Any, message: str) -> None:
    make_model(tmp_path)
    path = tmp_path / "model.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message) as error:
        read_info(tmp_path)
    assert str(path) in str(error.value)


# metadata of several names


def test_a_list_is_several_names() -> None:
    values = {"a": ["x", "y", "x"], "b": ["y", ""], "c": [], "d": [None], "e": "x"}
    for kind in ("multilabel", None):
        found = grouping(values, kind)
        assert found is not None
        assert found.members == {"x": ["a", "e"], "y": ["a", "b"], "unknown": ["c", "d"]}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Predictions of two cases, each with its truth in predictions.json."""
    cases = {}
    for i, name in enumerate("ab"):
        write(tmp_path / "pred" / f"{name}.nii.gz", some(i))
        truth = write(tmp_path / "truth" / f"{name}.nii.gz", some(i + 2))
        cases[name] = entry(
            {"labels": f"{name}.nii.gz"}, name, truth={"lesion": str(truth)},
            metadata={"finding": ["x", "y"][: i + 1]},
        )  # fmt: skip
    manifest(tmp_path / "pred", cases, kinds={"finding": "multilabel"})
    return tmp_path


def changed(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_a_case_counts_in_the_group_of_each_of_its_names(two: Path) -> None:
    assert run("evaluate", two / "pred") == 0
    groups = summary(two / "pred")["labels"]["1"]["groups"]["finding"]
    assert {k: g["Dice"]["n"] for k, g in groups.items()} == {"x": 2, "y": 1}
    assert '"x;y"' in (two / "pred" / "cases.csv").read_text()


def test_a_case_is_in_the_row_of_each_of_its_names(two: Path) -> None:
    swapped = two / "swapped"
    for value in "xy":
        (swapped / value).mkdir(parents=True)
        for file in (two / "pred").iterdir():
            (swapped / value / file.name).write_bytes(file.read_bytes())
    fed = [{"value": v, "folder": v} for v in "xy"]
    about = {"key": "finding", "true": {"a": ["x"], "b": ["x", "y"]}, "fed": fed}
    (swapped / "swap.json").write_text(json.dumps(about))
    (swapped / "comparison.json").write_text("{}")
    assert run("evaluate", swapped) == 0
    rows = json.loads((swapped / "swap_table.json").read_text())["rows"]
    assert {k: r["x"]["n"] for k, r in rows.items()} == {"x": 2, "y": 1}
    assert not (swapped / "comparison.json").exists()
    changed(swapped / "swap.json", lambda v: v["true"].update(a={"x": 1}))
    assert run("evaluate", swapped) == 1


@pytest.mark.parametrize("value", [{"x": 1}, [["x"]], [{"x": 1}]])
def test_metadata_that_are_objects_are_refused(two: Path, value: Any, capsys: Any) -> None:
    path = two / "pred" / "predictions.json"
    changed(path, lambda v: v["cases"]["a"].update(metadata={"finding": value}))
    assert run("evaluate", two / "pred") == 1
    error = capsys.readouterr().err
    assert "cases.a.metadata.finding: must be text, a number or a list of them" in error


@pytest.mark.parametrize("values", [{"values": [0]}, {"values": [65536]}, {"value": 65536}])
def test_label_values_of_predictions_are_checked(two: Path, values: Any, capsys: Any) -> None:
    changed(two / "pred" / "predictions.json", lambda v: v["labels"][0].update(values))
    assert run("evaluate", two / "pred") == 1
    assert "labels.0.value" in capsys.readouterr().err


def test_values_of_other_programs_may_be_larger(tmp_path: Path) -> None:
    for folder in ("pred", "truth"):
        write(tmp_path / folder / "a.nii.gz", some().astype(np.int32) * 70000)
    assert run("evaluate", tmp_path / "pred", "--truth", tmp_path / "truth") == 0
    assert summary(tmp_path / "pred")["labels"]["70000"]["name"] == "70000"


# evaluation


@pytest.mark.parametrize("how", ["itself", "link", "hard link", "another case"])
def test_a_prediction_is_no_truth(two: Path, how: str, capsys: Any) -> None:
    path = two / "pred" / "a.nii.gz"
    if how == "link":
        os.symlink(path, two / "linked.nii.gz")
        path = two / "linked.nii.gz"
    elif how == "hard link":
        os.link(path, two / "linked.nii.gz")
        path = two / "linked.nii.gz"
    case = "b" if how == "another case" else "a"
    change = {"lesion": str(path)}
    changed(two / "pred" / "predictions.json", lambda v: v["cases"][case].update(truth=change))
    assert run("evaluate", two / "pred") == 1
    assert f"{case}: {path} is a prediction, and given as truth" in capsys.readouterr().err


def test_results_of_before_do_not_stay(two: Path) -> None:
    assert run("evaluate", two / "pred", "--out", two / "other") == 0
    assert run("evaluate", two / "pred", "--compare", two / "other") == 0
    assert (two / "pred" / "comparison.json").is_file()
    (two / "pred" / "swap_table.json").write_text("{}")
    assert run("evaluate", two / "pred") == 0
    assert not (two / "pred" / "comparison.json").exists()
    assert not (two / "pred" / "swap_table.json").exists()


def test_another_grid_is_said_without_an_option_that_is_not_there(two: Path, capsys: Any) -> None:
    moved = np.eye(4)
    moved[0, 3] = 5
    write(two / "truth" / "a.nii.gz", some(), moved)
    assert run("evaluate", two / "pred") == 1
    error = capsys.readouterr().err
    assert "5 mm apart" in error and "grid_tolerance" not in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["metric_per_case"][0]["metrics"]["1"].update(Dice=1e16), "Dice"),
        (lambda v: v["metric_per_case"][0]["metrics"]["1"].update(HD95=1e999), "HD95|not JSON"),
        (lambda v: v["labels"]["1"]["metrics"]["Dice"].update(low=-1e16), "low"),
        (lambda v: v["foreground_mean"].update(Dice=1e16), "foreground_mean"),
        (lambda v: v["metric_per_case"].append(v["metric_per_case"][0]), "'a' is there twice"),
        (lambda v: v["labels"].update({"2": v["labels"]["1"]}), "'lesion' is there twice"),
        (lambda v: v["bootstrap"].update(seed=2**32), "bootstrap.seed"),
    ],
)
def test_a_summary_changed_by_hand_is_checked(two: Path, change: Any, message: str) -> None:
    assert run("evaluate", two / "pred") == 0
    changed(two / "pred" / "summary.json", change)
    with pytest.raises(UserError, match=message):
        read_summary(two / "pred")


def test_a_seed_that_a_summary_cannot_have_is_not_taken(two: Path) -> None:
    assert run("evaluate", two / "pred", "--seed", 2**32) != 0
