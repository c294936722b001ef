"""The paper's experiments: designs, resuming, statistics, and tiny runs of each on made-up volumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from benchmarks.pages import paper as page_of_paper
from benchmarks.paper import designs, results, run, train
from benchmarks.paper.data import load
from benchmarks.paper.designs import BACKGROUND, Unit

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``hippocampus`` of 45 subjects with two labels, bright and brighter."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for i in range(45):
        truth = np.zeros((16, 20, 3), np.uint8)
        truth[4:8, 5:12], truth[9:12, 5:12] = 1, 2
        image = truth * 2.0 + rng.normal(0, 0.3, truth.shape)
        name = f"sub-{i:03d}"
        for folder, array, end in (
            ("hippocampus", image.astype(np.float32), "T1w"),
            ("hippocampus/derivatives/labels", truth, "T1w_dseg"),
        ):
            path = root / folder / name / "anat" / f"{name}_{end}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return root


def paper(*argv: Any) -> int:
    return run.main([str(a) for a in argv])


def test_every_network_has_a_file_of_its_own() -> None:
    for experiment in designs.EXPERIMENTS:
        names = [
            u.name for u in designs.units(experiment, 3, train.labels(), train.SIZES["small"].base)
        ]
        assert len(set(names)) == len(names) > 20
        assert all(n.count("/") == 0 and " " not in n for n in names)


def test_subjects_are_parted_and_no_subject_is_in_two_parts(bids: Path) -> None:
    data = load("hippocampus", bids, True)
    for number in range(3):
        parts = designs.split(data.subjects, number)
        assert [len(p) for p in parts] == [27, 9, 9]
        assert len(set().union(*parts)) == 45


@pytest.mark.parametrize("condition", designs.CONDITIONS["2"])
def test_one_label_of_a_case_counts_as_annotated(bids: Path, condition: str) -> None:
    data = load("hippocampus", bids, True)
    target = 1 if condition == "single" else -1
    plan = designs.design(Unit("2", "hippocampus", condition, 0, target=target), data)
    for item in plan.train:
        known = [t for t in item.targets if t is not None]
        named = [t for t in known if t != BACKGROUND]
        assert named == [item.group]
        assert len(known) == (2 if condition == "missing as background" else 1)
        assert train.target(item).any() and (item.row is None) == ("FiLM" not in condition)
    asked = {(i.case.id, t) for i in plan.test for t in i.targets if t is not None}
    labels = [1] if condition == "single" else [0, 1]
    assert asked == {(i.case.id, t) for i in plan.test for t in labels}
    if condition != "single":
        counts = [sum(i.group == g for i in plan.train) for g in (0, 1)]
        assert abs(counts[0] - counts[1]) <= 1


def test_what_is_not_annotated_costs_nothing_and_a_missing_label_taken_for_background_does(
    bids: Path,
) -> None:
    data = load("hippocampus", bids, True)
    masks = {}
    for condition in ("mask", "missing as background"):
        plan = designs.design(Unit("2", "hippocampus", condition, 0), data)
        _, _, truth, known = train.Sampler(plan, 0, "cpu").batch()
        masks[condition] = (truth.any((2, 3)), known)
    assert (masks["mask"][1].sum(1) == 1).all()
    truth, known = masks["missing as background"]
    assert known.all() and (truth.sum(1) <= 1).all()


def test_few_subjects_of_one_structure_stand_beside_twelve_of_the_other(bids: Path) -> None:
    data = load("hippocampus", bids, True)
    for few in designs.FEW:
        film = designs.design(Unit("3", "hippocampus", "FiLM", 1, target=1, few=few), data)
        single = designs.design(Unit("3", "hippocampus", "single", 1, target=1, few=few), data)
        rare = [i.case.subject for i in film.train if i.group == 1]
        common = [i.case.subject for i in film.train if i.group == 0]
        assert rare == [i.case.subject for i in single.train] and len(rare) == few
        assert len(common) == 12 and not set(rare) & set(common)
        assert [i.case.id for i in film.test] == [i.case.id for i in single.test]


def test_shuffled_metadata_are_a_permutation_of_the_true_ones() -> None:
    data = load("phantom", None, True)
    true = designs.design(Unit("1", "phantom", "true", 0, "tumor_type"), data)
    shuffled = designs.design(Unit("1", "phantom", "shuffled", 0, "tumor_type"), data)

    def fed(plan: designs.Design) -> list[str]:
        parts = (plan.train, plan.validation, plan.test)
        items = [i for part in parts for i in part]
        own = {
            i.case.id: i.fed
            for i in items
            if plan is shuffled or i.fed == i.case.values["tumor_type"]
        }
        return [own[c.id] for c in data.cases]

    assert sorted(fed(true)) == sorted(fed(shuffled)) and fed(true) != fed(shuffled)


@pytest.mark.parametrize("experiment", ["2", "3"])
def test_an_experiment_runs_resumes_and_writes_tables_and_a_figure(
    bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], experiment: str
) -> None:
    command = ("--experiment", experiment, "--size", "test", "--data", bids, "--out", tmp_path)
    command += ("--sets", "hippocampus")
    assert paper(*command) == 0
    first = capsys.readouterr().out
    units = sorted((tmp_path / "test" / "units").iterdir())
    assert f"{len(units)} networks, 0 of them are there" in first
    record = json.loads((tmp_path / "test" / f"experiment-{experiment}.json").read_text())
    assert record["summary"]["blocks"] and len(record["units"]) == len(units)
    assert (tmp_path / "test" / f"experiment-{experiment}.png").stat().st_size > 5000
    # as after a kill: one network is missing, and comes out the same
    before = json.loads(units[0].read_text())
    untouched = units[1].stat().st_mtime_ns
    units[0].unlink()
    assert paper(*command) == 0
    assert f"{len(units) - 1} of them are there" in capsys.readouterr().out
    after = json.loads(units[0].read_text())
    assert after["cases"] == before["cases"] and units[1].stat().st_mtime_ns == untouched


def test_the_swap_table_of_a_tiny_run_has_every_true_and_fed_type(tmp_path: Path) -> None:
    result = train.run(Unit("1", "phantom", "true", 0, "tumor_type"), "test", None, "cpu")
    table = results.summarise("1", [result])["blocks"][0]["swap"]
    assert table["names"] == ["astrocytoma", "ependymoma", "hemangioblastoma"]
    assert np.array(table["dice"]).shape == (3, 3)


def test_the_ratio_to_eager_is_paired() -> None:
    found = train.eager_ratio("test", "cpu", rounds=3, steps=1)
    low, high = found["quartiles"]
    assert 0 < low <= found["median"] <= high and found["rounds"] == 3
    assert "plain PyTorch over the fused path" in results.ratio_text(found)


def test_an_ablation_that_changes_nothing_is_left_out() -> None:
    base = {"order": "conv-norm-film-act", "generator": "identity"}
    found = {u.condition for u in designs.units("ablation", 1, {}, base)}
    left_out = {"order conv-norm-film-act", "generator identity"}
    assert found == set(designs.ABLATIONS) - left_out


def test_a_missing_set_is_named_with_its_public_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper("--experiment", "2", "--out", tmp_path / "out") == 1
    assert "creatis" in capsys.readouterr().err
    assert paper("--experiment", "3", "--data", tmp_path, "--out", tmp_path / "out") == 1
    assert f"{tmp_path / 'acdc'}: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def made(condition: str, split: int, dice: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A unit's result: case -> fed type -> Dice; the case's own type is its first letter."""
    cases = [
        {"case": c, "subject": c, "label": "target", "true": c[0], "fed": f, "dice": d}
        for c, row in dice.items()
        for f, d in row.items()
    ]
    unit = {
        "data": "phantom",
        "key": "tumor_type",
        "few": 0,
        "condition": condition,
        "split": split,
    }
    return {"unit": unit, "seconds": 1.0, "cases": cases}


def test_means_are_over_splits_and_differences_over_cases() -> None:
    units = [
        made("constant", 0, {"a1": {"a": 0.5}, "b1": {"b": 0.3}}),
        made("constant", 1, {"a2": {"a": 0.6}, "b2": {"b": 0.6}}),
        made("true", 0, {"a1": {"a": 0.7, "b": 0.1}, "b1": {"b": 0.5, "a": 0.2}}),
        made("true", 1, {"a2": {"a": 0.8, "b": 0.3}, "b2": {"b": 0.8, "a": 0.0}}),
    ]
    block = results.summarise("1", units)["blocks"][0]
    true = block["conditions"]["true"]["all"]
    # of the true type only: (60, 80), deviation over splits with n - 1
    assert true["mean"] == 70 and true["splits"] == [60, 80]
    assert true["std"] == pytest.approx(20 / 2**0.5, abs=0.01)
    difference = block["differences"]["true"]
    assert difference["difference"] == 20 and difference["n"] == 4
    assert difference["low"] == difference["high"] == 20
    assert difference["p_greater"] == pytest.approx(1 / 16)
    swap = block["swap"]
    assert swap["dice"] == [[75, 20], [10, 65]] and swap["diagonal_on_top"]


def test_paths_are_compared_over_networks() -> None:
    dice = {
        "all layers (base)": (0.5, 0.7),
        "another seed": (0.6, 0.6),
        "eager": (0.4, 0.7),
        "eager, another seed": (0.8, 0.5),
        "eager, a third seed": (0.9, 0.9),  # without a partner
    }
    units = [
        made(c, s, {f"a{s}": {"a": d}, f"b{s}": {"b": d}})
        for c, row in dice.items()
        for s, d in enumerate(row)
    ]
    for u in units:
        u["unit"]["experiment"] = "ablation"
    found = results.summarise("ablation", units)["blocks"][0]["paths"]
    assert found["networks"] == 4 and found["fused"]["mean"] == 60 and found["eager"]["mean"] == 60
    assert found["difference"] == 0 and found["p_two_sided"] > 0.5


def test_a_swap_table_whose_diagonal_is_not_on_top_says_so() -> None:
    units = [made("true", 0, {"a1": {"a": 0.2, "b": 0.4}, "b1": {"b": 0.5, "a": 0.2}})]
    assert not results.summarise("1", units)["blocks"][0]["swap"]["diagonal_on_top"]


def test_the_pages_tables_are_those_of_the_committed_results() -> None:
    found = page_of_paper.records()
    assert set(found) == {"experiment-1", "experiment-2", "experiment-3", "ablation"}
    page = page_of_paper.PAGE.read_text(encoding="utf-8")
    assert page_of_paper.written(page, found) == page
    for name, record in found.items():
        assert record["size"] == "small" and record["configuration"]["splits"] >= 3
        summary = results.summarise(record["experiment"], record["units"])
        assert json.loads(json.dumps(summary)) == record["summary"], name
