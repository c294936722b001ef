"""The results of a trial, from scores that are written by hand or drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.trial.results import _rising, collect
from fastfilm.segmentation.trial.statistics import Difference

from ...support.trials import (
    SHA,
    case,
    write_design,
    write_run,
    write_trial,
)

ARMS = ("conditioned", "unconditioned")


def by_hand(
    out: Path, dice: dict[str, Any], labels: tuple[str, ...] = ("a", "b"), **more: Any
) -> Path:
    """Two folds and two seeds; ``dice``: arm -> case -> seed -> label's Dice. c0, c2 are in fold 0."""
    write_design(out, labels=list(labels), keys=more.pop("keys", {}))
    for arm in ARMS:
        for fold in (0, 1):
            for seed in (0, 1):
                cases = {
                    c: case(f"s{c}", dict(zip(labels, v[seed], strict=True)), **more.get(c, {}))
                    for c, v in dice[arm].items()
                    if int(c[1:]) % 2 == fold
                }
                write_run(out, arm, fold, seed, cases)
    return out


DICE: dict[str, Any] = {
    "conditioned": {
        "c0": [(0.8, 0.6), (0.9, 0.7)],
        "c1": [(0.7, None), (0.5, 0.0)],
        "c2": [(0.6, 0.6), (0.6, 0.6)],
        "c3": [(None, None), (None, None)],
    },
    "unconditioned": {
        "c0": [(0.6, 0.6), (0.7, 0.5)],
        "c1": [(0.6, 0.0), (0.6, 0.0)],
        "c2": [(0.5, 0.7), (0.6, 0.4)],
        "c3": [(None, 0.0), (None, 0.0)],
    },
}


def test_a_case_counts_by_the_mean_of_the_labels_that_are_defined_in_every_run(
    tmp_path: Path,
) -> None:
    found = collect(by_hand(tmp_path, DICE))
    # c1's b and both of c3 are not defined somewhere; c1 counts by a alone
    points = {p["case"]: p["difference"] for p in found["points"]["cases"]}
    assert points == pytest.approx({"c0": 0.15, "c1": 0.0, "c2": 0.05})
    assert found["primary"]["mean"] == pytest.approx(0.2 / 3)
    assert found["counts"] == {
        "cases": 4, "compared": 3, "subjects": 3, "clusters": None, "folds": 2, "seeds": 2,
        "networks": 8, "steps": [400],
    }  # fmt: skip
    networks = {(p["fold"], p["seed"]): p["difference"] for p in found["points"]["networks"]}
    assert networks == pytest.approx({(0, 0): 0.05, (0, 1): 0.15, (1, 0): 0.1, (1, 1): -0.1})
    assert found["labels"]["a"]["mean"] == pytest.approx((0.2 + 0.0 + 0.05) / 3)
    assert found["labels"]["b"]["mean"] == pytest.approx((0.1 + 0.05) / 2)
    arm = found["arms"]["conditioned"]
    assert arm["by_seed"] == pytest.approx([(0.7 + 0.7 + 0.6) / 3, (0.8 + 0.5 + 0.6) / 3])
    assert arm["mean"] == pytest.approx(0.65)
    assert arm["spread_seeds"] == pytest.approx(abs(2.0 - 1.9) / 3 / np.sqrt(2))
    assert arm["spread_cases"] == pytest.approx(np.std([0.75, 0.6, 0.6], ddof=1))


def test_empty_truth_is_noted_with_what_was_predicted_there(tmp_path: Path) -> None:
    notes = collect(by_hand(tmp_path, DICE))["notes"]
    assert (
        "b: the truth of 2 cases is empty (c1, c3), left out of its Dice; something was predicted there"
        " by conditioned in 25%, unconditioned in 100% of the runs" in notes
    )
    assert "1 case without a label that counts: c3" in notes
    assert any("3 subjects: a permutation test of fewer than 6" in n for n in notes)


def test_other_metrics_are_compared_too_and_small_is_good_for_distances(tmp_path: Path) -> None:
    found = collect(by_hand(tmp_path, DICE))["secondary"]
    assert found["HD95"]["better"] == "lower" and found["NSD"]["better"] == "higher"
    assert found["HD95"]["mean"] == pytest.approx(-20 * 0.2 / 3)
    assert found["HD95"]["conditioned"] == pytest.approx(20 * (1 - 0.65))


def test_an_unannotated_label_is_not_an_empty_one(tmp_path: Path) -> None:
    by_hand(tmp_path, DICE)
    for path in tmp_path.glob("runs/*/fold-1/*/scores.json"):
        run = json.loads(path.read_text())
        for c in run["cases"].values():
            del c["metrics"]["b"]
        path.write_text(json.dumps(run))
    found = collect(tmp_path)
    assert found["labels"]["b"]["cases"] == 2
    assert not any(n.startswith("b: empty") for n in found["notes"])


def test_groups_are_those_of_the_metadata_and_the_extremes_are_named(tmp_path: Path) -> None:
    out = write_trial(
        tmp_path,
        {"conditioned": 0.0},
        keys={"site": ["A", "B", "C"], "age": list(range(20, 60))},
        kinds={"age": "continuous"},
        group_gain={("site", "B"): 0.1, ("site", "C"): -0.1},
        subjects=42,
    )
    found = collect(out)
    assert list(found["groups"]) == ["age", "site"]
    assert found["groups"]["age"]["binned"] and found["groups"]["age"]["input"]
    assert not found["groups"]["site"]["input"]
    groups = found["groups"]["site"]["groups"]
    means = {g: row["mean"] for g, row in groups.items()}
    assert means == pytest.approx({"A": 0.0, "B": 0.1, "C": -0.1}, abs=0.03)
    assert [row["cases"] for row in groups.values()] == [14, 14, 14]
    assert found["extremes"] == {"best": ["site", "B"], "worst": ["site", "C"]}
    # six groups: the smallest p counts six times
    every = [row for key in found["groups"].values() for row in key["groups"].values()]
    first = min(every, key=lambda row: row["p"])
    assert len(every) == 6 and first["p_holm"] == pytest.approx(6 * first["p"])


def test_a_cluster_by_itself_is_judged_by_its_subjects(tmp_path: Path) -> None:
    keys = {"site": ["A", "B", "C"], "sex": ["f", "m"]}
    out = write_trial(
        tmp_path, {"conditioned": 0.03}, keys=keys, cluster="site", subjects=24, folds=2
    )
    found = collect(out)
    assert (found["primary"]["clusters"], found["counts"]["clusters"]) == (3, 3)
    one = found["groups"]["site"]["groups"]["A"]
    assert (one["clusters"], one["subjects"]) == (None, 8) and one["low"] < one["mean"] < one[
        "high"
    ]
    assert found["groups"]["sex"]["groups"]["f"]["clusters"] == 3
    assert any("3 values of site: a permutation test of fewer than 6" in n for n in found["notes"])


def test_each_further_arm_is_compared_and_corrected_for_their_number(tmp_path: Path) -> None:
    gain = {"conditioned": 0.05, "shuffled": 0.0, "channels": 0.05, "encoder": 0.045}
    found = collect(write_trial(tmp_path, gain, subjects=30, folds=3))
    assert list(found["against"]) == ["shuffled", "channels", "encoder"]
    means = [row["mean"] for row in found["against"].values()]
    assert means == pytest.approx([0.05, 0.0, 0.005], abs=0.02)
    p = [row["p"] for row in found["against"].values()]
    assert found["against"]["shuffled"]["p_holm"] == pytest.approx(3 * min(p))
    assert set(found["needed"]) == {"unconditioned", "shuffled"}
    assert Difference(**found["primary"]).superior


def test_a_wrong_value_costs_what_the_network_makes_of_it(tmp_path: Path) -> None:
    keys = {"type": ["x", "y"], "unused": ["u", "v", "w"]}
    out = write_trial(
        tmp_path, keys=keys, subjects=24, folds=3, wrong={"type": 0.06, "unused": 0.0}
    )
    found = collect(out)["swaps"]
    assert found["type"]["used"] is True and found["unused"]["used"] is False
    assert found["type"]["wrong"]["mean"] == pytest.approx(0.06)
    assert found["type"]["unknown"]["mean"] == pytest.approx(0.03)
    assert found["unused"]["wrong"]["mean"] == pytest.approx(0, abs=1e-9)
    row = found["type"]["rows"]["x"]
    assert row["n"] == 12 and row["fed"]["x"] == pytest.approx(row["true"])
    assert row["fed"]["y"] == pytest.approx(row["true"] - 0.06)
    assert collect(write_trial(tmp_path / "without", subjects=12, folds=2))["swaps"] == {}


def test_the_mean_of_the_wrong_values_is_a_cases_own(tmp_path: Path) -> None:
    """c0 loses 0.1 and 0.3 by its two wrong values; c1's own value was not fed, it loses 0.2 by the one; c2 has
    no value, so that none is wrong."""
    swapped = {
        "c0": {"key": {"p": {"a": 0.5}, "q": {"a": 0.4}, "r": {"a": 0.2}}},
        "c1": {"key": {"p": {"a": 0.3}}},
        "c2": {"key": {"p": {"a": 0.9}, "unknown": {"a": 0.9}}},
    }
    metadata = {"c0": {"key": "p"}, "c1": {"key": "s"}, "c2": {"key": None}}
    dice = {arm: {c: [(0.5,), (0.5,)] for c in ("c0", "c1", "c2")} for arm in ARMS}
    entries = {c: {"metadata": metadata[c], "swapped": swapped[c]} for c in swapped}
    found = collect(by_hand(tmp_path, dice, ("a",), keys={"key": "category"}, **entries))
    assert found["swaps"]["key"]["wrong"]["mean"] == pytest.approx((0.2 + 0.2) / 2)
    assert found["swaps"]["key"]["wrong"]["cases"] == 2
    # a label that was not segmented under another value leaves nothing to compare the case with
    two = {arm: {c: [(0.5, 0.9), (0.5, 0.9)] for c in dice[arm]} for arm in ARMS}
    both = collect(by_hand(tmp_path / "two", two, keys={"key": "category"}, **entries))
    assert both["swaps"]["key"]["wrong"] is None
    assert found["swaps"]["key"]["unknown"] is None


def test_the_calibration_error_is_of_the_pooled_bins(tmp_path: Path) -> None:
    """Truth is 0.1 below the probabilities, but for the lowest two bins: none at 0.05, 0.05 at 0.15."""
    dice = {arm: {c: [(0.5,), (0.5,)] for c in ("c0", "c1")} for arm in ARMS}
    entries: dict[str, Any] = {
        c: {"shift": 0.1, "metadata": {"sex": s}} for c, s in (("c0", "f"), ("c1", "m"))
    }
    found = collect(by_hand(tmp_path, dice, ("a",), **entries))["calibration"]
    assert found["error"] == pytest.approx({arm: (0.05 + 9 * 0.1) / 10 for arm in ARMS})
    assert found["labels"]["conditioned"]["a"]["bins"][1] == pytest.approx([400, 0.15, 0.05])
    assert list(found["groups"]["sex"]) == ["f", "m"]
    assert found["groups"]["sex"]["f"]["unconditioned"] == pytest.approx(0.095)
    assert collect(by_hand(tmp_path / "none", dice, ("a",)))["calibration"] == {}


def test_curves_are_means_over_runs(tmp_path: Path) -> None:
    by_hand(tmp_path, DICE)
    for i, path in enumerate(sorted(tmp_path.glob("runs/conditioned/*/*/scores.json"))):
        run = json.loads(path.read_text())
        run["curve"] = [{"step": 10, "dice_mean": 0.1 * i}, {"step": 20, "dice_mean": None}]
        path.write_text(json.dumps(run))
    found = collect(tmp_path)["curves"]
    assert found["conditioned"] == [
        {"step": 10, "mean": pytest.approx(0.15), "low": 0.0, "high": pytest.approx(0.3), "runs": 4}
    ]
    assert found["unconditioned"] == []


def test_the_file_is_the_same_whatever_the_order_and_the_time_of_the_runs(tmp_path: Path) -> None:
    a = write_trial(tmp_path / "a", subjects=12, folds=2, seeds=2)
    shutil.copytree(a, tmp_path / "b")
    for path in tmp_path.glob("b/runs/**/scores.json"):
        run = json.loads(path.read_text())
        run["seconds"] *= 3
        run["cases"] = dict(reversed(run["cases"].items()))
        path.unlink()
        path.write_text(json.dumps(dict(reversed(run.items()))))
    collect(a), collect(tmp_path / "b")
    files = [tmp_path / name / "results.json" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads(files[0].read_text()) == collect(a)
    assert "seconds" not in files[0].read_text()


def test_runs_that_are_missing_are_counted_and_named(tmp_path: Path) -> None:
    by_hand(tmp_path, DICE)
    (tmp_path / "runs/conditioned/fold-1/seed-0/scores.json").unlink()
    shutil.rmtree(tmp_path / "runs/unconditioned/fold-0")
    with pytest.raises(
        UserError, match="3 of 8 runs are not finished: conditioned fold 1 seed 0, unc"
    ):
        collect(tmp_path)
    assert not (tmp_path / "results.json").exists()


def edited(out: Path, arm: str, fold: int, seed: int, change: Any) -> Path:
    """``out`` with one of its scores changed."""
    path = by_hand(out, DICE) / "runs" / arm / f"fold-{fold}" / f"seed-{seed}" / "scores.json"
    run = json.loads(path.read_text())
    change(run)
    path.write_text(json.dumps(run))
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: r.update(design="ab" * 32),
            "is of another design .abababababab. than .*design.json",
        ),
        (lambda r: r.update(seed=4), "holds unconditioned, fold 1, seed 4; expected .* seed 1"),
        (lambda r: r["cases"].pop("c1"), "its cases are not those of .*conditioned.*: c1"),
        (
            lambda r: r["cases"]["c1"].update(subject="s9"),
            "c1 has not the subject, metadata or labels",
        ),
        (lambda r: r["cases"]["c1"].update(metrics={"x": {}}), "'x' is no label of the design"),
        (lambda r: r["cases"]["c1"]["metrics"]["a"].update(Dice="0.5"), "valid number"),
        (lambda r: r.pop("steps"), "steps: Field required"),
        (lambda r: r["cases"]["c1"].update(reliability={"a": [[1, 2]]}), "at least 3 items"),
    ],
)
def test_scores_that_do_not_belong_here_are_refused(
    tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        collect(edited(tmp_path, "unconditioned", 1, 1, change))


def test_a_case_that_two_folds_hold_out_is_refused(tmp_path: Path) -> None:
    by_hand(tmp_path, DICE)
    for path in tmp_path.glob("runs/*/fold-1/*/scores.json"):
        run = json.loads(path.read_text())
        run["cases"]["c0"] = run["cases"]["c1"]
        path.write_text(json.dumps(run))
    with pytest.raises(UserError, match="c0 is held out in fold 0 too"):
        collect(tmp_path)


def test_a_design_or_scores_without_anything_to_compare_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"design.json: cannot be read"):
        collect(tmp_path)
    write_design(tmp_path, arms=["conditioned"])
    with pytest.raises(UserError, match="arms must have conditioned and unconditioned"):
        collect(tmp_path)
    nothing = {arm: {"c0": [(None,), (None,)], "c1": [(None,), (0.0,)]} for arm in ARMS}
    with pytest.raises(UserError, match="no case has a label whose Dice is defined in every run"):
        collect(by_hand(tmp_path, nothing, ("a",)))
    assert len(SHA) == 64


def test_a_training_that_had_not_levelled_off_is_said() -> None:
    def curve(*means: float) -> list[dict[str, float]]:
        return [{"step": 100.0 * (i + 1), "mean": m} for i, m in enumerate(means)]

    assert _rising("conditioned", curve(0.1, 0.5, 0.70, 0.715)) == []
    assert _rising("conditioned", curve(0.9, 0.5, 0.70, 0.6)) == []
    assert _rising("conditioned", curve(0.5)) == []
    assert _rising("conditioned", []) == []
    (line,) = _rising("conditioned", curve(0.1, 0.5, 0.70, 0.75))
    assert line.startswith(
        "conditioned: the validation Dice still rose by 0.050 in the last quarter"
    )


def test_nnunets_arms_are_compared_with_each_other_too(tmp_path: Path) -> None:
    gain = {"conditioned": 0.03, "nnunet": 0.05, "nnunet_conditioned": 0.1}
    found = collect(write_trial(tmp_path, gain, subjects=20, folds=2))
    assert list(found["against"]) == ["nnunet", "nnunet_conditioned"]
    (row,) = found["pairs"].values()
    assert list(found["pairs"]) == ["nnunet_conditioned - nnunet"]
    difference = found["against"]["nnunet"]["mean"] - found["against"]["nnunet_conditioned"]["mean"]
    assert row["mean"] == pytest.approx(difference) and row["low"] > 0.02
    # one family of three
    p = [r["p"] for r in (*found["against"].values(), row)]
    assert min(r["p_holm"] for r in (*found["against"].values(), row)) == pytest.approx(3 * min(p))
