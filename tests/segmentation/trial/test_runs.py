"""The runs of a trial: scores, interruption at any moment, several processes, and a budget."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastfilm.__main__ import main
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.models.folder import load_model
from fastfilm.segmentation.support.files import read_json
from fastfilm.segmentation.support.lock import locked
from fastfilm.segmentation.support.stopping import Stopped
from fastfilm.segmentation.trial import runs as module
from fastfilm.segmentation.trial.cost import cost_of, said
from fastfilm.segmentation.trial.design import Run, runs, selected
from fastfilm.segmentation.trial.folder import open_trial
from fastfilm.segmentation.trial.runs import done, make_runs, mean_dice
from fastfilm.segmentation.trial.scoring import fed_values, reliability_bins

from ...support.phantoms import settings, write_bids
from ...support.trainings import ONE, at_step, saved_step

SECTIONS = {
    "trial": {"seeds": 3},
    "metadata": {"tumor_type": {}, "age": {"kind": "continuous"}},
    "splits": {"folds": 2, "stratify": ["tumor_type"]},
}


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("bids"), count=6)


def opened(bids: Path, out: Path) -> Any:
    plan, design, _ = open_trial(parse(settings(bids, **SECTIONS), "test"), out)
    return plan, design


@pytest.fixture(scope="module")
def made(bids: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Fold 0 of all arms, undisturbed."""
    out = tmp_path_factory.mktemp("trial") / "out"
    plan, design = opened(bids, out)
    assert not make_runs(out, plan, design, selected(design, folds=[0], seeds=[0]), ONE).late
    return out, plan, design


def scores(out: Path, run: Run) -> Any:
    """What a run found, without how long it took."""
    value = read_json(out / run.path / "scores.json")
    del value["seconds"]
    return value


CONDITIONED = Run("conditioned", 0, 0)


def test_every_held_out_case_is_scored(made: Any) -> None:
    out, plan, design = made
    for arm in design["arms"]:
        found = scores(out, Run(arm, 0, 0))
        assert (found["arm"], found["fold"], found["seed"]) == (arm, 0, 0)
        assert found["design"] == design["sha256"] and found["steps"] == 6
        assert list(found["cases"]) == [c.id for c in plan.cases_of(0, "val")]
        for case in found["cases"].values():
            assert set(case["metrics"]) == {"lesion"}
            assert bool(case["swaps"]) == (arm == "conditioned")
        assert [line["step"] for line in found["curve"]] == [3, 6]
    assert not done(out, Run("conditioned", 1, 0))


def test_scores_are_those_of_predict_and_evaluate(made: Any, tmp_path: Path) -> None:
    out, _, _ = made
    model = out / CONDITIONED.path / "model"
    words = ["--fold", "0", "--weights", "final"]
    assert main(["predict", str(model), str(out / "plan"), str(tmp_path / "p"), *words]) == 0
    assert main(["evaluate", str(tmp_path / "p")]) == 0
    summary = read_json(tmp_path / "p" / "summary.json")
    found = scores(out, CONDITIONED)["cases"]
    assert len(summary["metric_per_case"]) == len(found)
    for case in summary["metric_per_case"]:
        own = found[case["case"]]["metrics"]["lesion"]
        for metric, value in own.items():
            assert case["metrics"]["1"][metric] == pytest.approx(value), metric


def test_the_true_value_costs_nothing_and_others_are_fed(made: Any) -> None:
    out, plan, _ = made
    for name, case in scores(out, CONDITIONED)["cases"].items():
        swaps = case["swaps"]
        own = next(c for c in plan.cases if c.id == name).metadata
        assert swaps["tumor_type"][own["tumor_type"]]["lesion"] == case["metrics"]["lesion"]["Dice"]
        assert {"unknown"} < set(swaps["tumor_type"]) and "unknown" in swaps["age"]
        assert len(swaps["age"]) <= 4
    train = {float(c.metadata["age"]) for c in plan.cases_of(0, "train")}
    assert {float(v) for v in swaps["age"] if v != "unknown"} <= train


def test_only_the_most_frequent_values_of_a_key_are_fed(made: Any, monkeypatch: Any) -> None:
    from fastfilm.segmentation.trial import scoring

    out, plan, _ = made
    monkeypatch.setattr(scoring, "MOST_VALUES", 2)
    model = load_model(out / CONDITIONED.path / "model", weights="final")
    cases = plan.cases_of(0, "train")
    kinds = [str(c.metadata["tumor_type"]) for c in cases]
    fed = fed_values(model, {"tumor_type": plan.config.metadata["tumor_type"]}, [*cases, cases[-1]])
    assert len(fed["tumor_type"]) == 3 and kinds[-1] in fed["tumor_type"]


def test_the_shuffled_network_is_another_one_and_the_sampling_is_the_same(made: Any) -> None:
    out, _, _ = made
    weights = {}
    for arm in ("conditioned", "shuffled"):
        model = load_model(out / Run(arm, 0, 0).path / "model", weights="final")
        weights[arm] = model.network.state_dict()
    same = [torch.equal(weights["conditioned"][k], v) for k, v in weights["shuffled"].items()]
    assert not all(same)


def test_a_run_that_is_done_is_not_made_again(made: Any, monkeypatch: Any) -> None:
    out, plan, design = made
    monkeypatch.setattr(module, "_make", lambda *a: pytest.fail("made again"))
    make_runs(out, plan, design, selected(design, folds=[0], seeds=[0]), ONE)


@pytest.mark.parametrize("step", [0, 2, 4, 5])
def test_a_run_that_was_interrupted_ends_with_the_same_scores(
    bids: Path, made: Any, tmp_path: Path, monkeypatch: Any, step: int
) -> None:
    plan, design = opened(bids, tmp_path / "out")
    run = [CONDITIONED]
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Stopped, match="fastfilm trial"):
            make_runs(tmp_path / "out", plan, design, run, ONE)
    assert not done(tmp_path / "out", CONDITIONED)
    make_runs(tmp_path / "out", plan, design, run, ONE)
    assert scores(tmp_path / "out", CONDITIONED) == scores(made[0], CONDITIONED)


def test_a_run_that_was_interrupted_while_it_scored_goes_on(
    bids: Path, made: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    plan, design = opened(bids, tmp_path / "out")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "score_cases", fail)
        with pytest.raises(KeyboardInterrupt):
            make_runs(tmp_path / "out", plan, design, [CONDITIONED], ONE)
    make_runs(tmp_path / "out", plan, design, [CONDITIONED], ONE)
    assert scores(tmp_path / "out", CONDITIONED) == scores(made[0], CONDITIONED)


def test_a_deadline_ends_a_run_with_its_state_saved(
    bids: Path, made: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    plan, design = opened(bids, tmp_path / "out")
    now, late = time.monotonic(), []
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: late.append(True))
        patch.setattr(time, "monotonic", lambda: now + 1000.0 * len(late))
        left = make_runs(tmp_path / "out", plan, design, [CONDITIONED], ONE, deadline=now + 500)
    assert left.late and not done(tmp_path / "out", CONDITIONED)
    assert saved_step(tmp_path / "out" / CONDITIONED.path / "model") == 4
    make_runs(tmp_path / "out", plan, design, [CONDITIONED], ONE)
    assert scores(tmp_path / "out", CONDITIONED) == scores(made[0], CONDITIONED)


def test_no_run_is_begun_after_the_deadline(bids: Path, tmp_path: Path) -> None:
    plan, design = opened(bids, tmp_path / "out")
    left = make_runs(tmp_path / "out", plan, design, [CONDITIONED], ONE, deadline=0.0)
    assert left.late and not (tmp_path / "out" / CONDITIONED.path).exists()


def test_a_run_of_another_process_is_left_to_it(bids: Path, tmp_path: Path) -> None:
    plan, design = opened(bids, tmp_path / "out")
    with locked(tmp_path / "out" / CONDITIONED.path, "fastfilm trial"):
        left = make_runs(tmp_path / "out", plan, design, [CONDITIONED], ONE)
    assert left.busy == [CONDITIONED] and not left.late


def test_mean_dice_is_over_cases_and_leaves_out_what_is_not_defined() -> None:
    def case(*dice: float | None) -> Any:
        return {"metrics": {str(i): {"Dice": d} for i, d in enumerate(dice)}}

    cases = {"a": case(0.5, 1.0), "b": case(None, 0.25), "c": case(None, None)}
    assert mean_dice({"cases": cases}) == pytest.approx((0.75 + 0.25) / 2)
    assert mean_dice({"cases": {"c": case(None)}}) is None


def test_reliability_counts_voxels_around_truth_and_prediction() -> None:
    p = np.zeros((20, 20, 20), np.float32)
    p[10, 10, 10], p[10, 10, 11] = 1.0, 0.25
    truth, mask = p > 0.2, p > 0.5
    bins = reliability_bins(p, mask, truth)
    # 5 voxels more on each side of a box of 1 x 1 x 2
    assert [b[0] for b in bins] == [11 * 11 * 12 - 2, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert bins[2] == [1, 0.25, 1] and bins[9] == [1, 1.0, 1]
    assert reliability_bins(p, mask & False, truth & False) == [[0, 0.0, 0]] * 10


def test_the_cost_is_said_arm_by_arm(made: Any) -> None:
    _, plan, design = made
    every = list(runs(design))
    costs = cost_of(plan, every, "cpu")
    assert list(costs) == design["arms"]
    assert all(c.steps == 6 and c.seconds > 0 for c in costs.values())
    # under every value of both keys, one after the other
    assert costs["conditioned"].scoring > costs["unconditioned"].scoring
    lines = said(costs, every)
    assert len(lines) == 4 and lines[-1].startswith("18 networks on this device: about ")


def test_dry_trains_nothing(bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json.yaml"
    path.write_text(json.dumps(settings(bids, **SECTIONS)))
    assert main(["trial", str(path), str(tmp_path / "out"), "--dry"]) == 0
    assert "18 networks on this device" in capsys.readouterr().out
    assert (tmp_path / "out" / "design.json").is_file()
    assert not (tmp_path / "out" / "runs").exists()
