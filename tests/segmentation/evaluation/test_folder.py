"""Metrics, statistics, the evaluate command, counterfactuals, reports, the demo."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import nibabel as nib
from scipy import stats

from fastfilm.segmentation.commands import cli
from fastfilm.segmentation.evaluation.metrics import case_metrics
from fastfilm.segmentation.evaluation.statistics import compare, mean_of
from fastfilm.segmentation.reports.inspection import inspect, principal_components

from ...support.models import TYPES, make_model


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float, spacing=(1, 1, 1)):
    grid = np.indices(shape).T * np.array(spacing)
    return (np.linalg.norm(grid - np.array(centre), axis=-1) <= radius).T


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with a face neighbour outside."""
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for axis, step in itertools.product(range(3), (-1, 1)):
        inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inner)


def test_overlap_and_volume_are_those_of_the_voxel_counts() -> None:
    truth, prediction = np.zeros((2, 6, 5, 4), bool)
    truth[1:4, 1:3, :2] = True  # 12
    prediction[2:5, 1:3, :3] = True  # 18, 8 of them in the truth
    m = case_metrics(prediction, truth, (1, 2, 5))
    assert m["Dice"] == pytest.approx(16 / 30) and m["IoU"] == pytest.approx(8 / 22)
    assert (m["TP"], m["FP"], m["FN"], m["TN"]) == (8, 10, 4, 98)
    assert m["volume_error"] == pytest.approx(6 * 10 / 1000)
    assert m["relative_volume_error"] == pytest.approx(0.5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.0, 3.0)])
def test_hd95_is_the_larger_of_both_directed_percentiles_in_mm(spacing) -> None:
    truth = ball((24, 22, 12), (9, 10, 15), 6.5, spacing)
    prediction = ball((24, 22, 12), (10.5, 11, 18), 6, spacing)
    prediction[0, 0, 0] = True  # touches the border of the image
    a, b = (surface(m) * np.array(spacing) for m in (prediction, truth))
    d = np.linalg.norm(a[:, None] - b[None], axis=-1)
    expected = max(np.percentile(d.min(1), 95), np.percentile(d.min(0), 95))
    got = case_metrics(prediction, truth, spacing)["HD95"]
    assert got == pytest.approx(expected, rel=1e-4)


def test_a_sheared_grid_is_measured_along_its_affine() -> None:
    truth = np.zeros((14, 12, 11), bool)
    truth[3:9, 3:8, 2:7] = True
    prediction = np.roll(truth, (2, 1), (0, 2))
    prediction[0, 0, 0] = True
    axes = np.array([[0.9, 0.3, 0.0], [0.0, 1.1, 0.4], [0.2, 0.0, 2.0]])
    a, b = (surface(m) @ axes.T for m in (prediction, truth))
    d = np.linalg.norm(a[:, None] - b[None], axis=-1)
    expected = max(np.percentile(d.min(1), 95), np.percentile(d.min(0), 95))
    m = case_metrics(prediction, truth, axes)
    assert m["HD95"] == pytest.approx(expected, rel=1e-6) and m["NSD"] is None
    # one voxel more, of the parallelepiped's volume
    assert m["volume_error"] == pytest.approx(np.linalg.det(axes) / 1000)
    corners = np.array(list(itertools.product((0, 1), repeat=3))) * truth.shape @ axes.T
    diagonal = max(np.linalg.norm(p - q) for p, q in itertools.combinations(corners, 2))
    empty = case_metrics(np.zeros_like(truth), truth, axes)
    assert empty["HD95"] == pytest.approx(diagonal) and empty["NSD"] is None
    # axes that are turned and flipped, but at right angles, are not sheared
    turned = np.array([[0, -1.5, 0], [0.8, 0, 0], [0, 0, -3.0]])
    plain = case_metrics(prediction, truth, (0.8, 1.5, 3))
    assert case_metrics(prediction, truth, turned) == pytest.approx(plain)


def test_surface_dice_knows_millimetres() -> None:
    truth = np.zeros((20, 20, 20), bool)
    truth[5:15, 5:15, 5:15] = True
    shifted = np.roll(truth, 1, 2)
    near = case_metrics(shifted, truth, (1, 1, 3), tolerance=3.1)["NSD"]
    far = case_metrics(shifted, truth, (1, 1, 3), tolerance=1.0)["NSD"]
    assert near == pytest.approx(1)
    # the two faces across the shift are 3 mm off: 200 of 600 in voxel faces, 200 of 1400 in mm²
    assert 0.75 < far < 0.95
    assert case_metrics(truth, truth, (1, 1, 3))["NSD"] == pytest.approx(1)


def test_what_is_empty_follows_the_conventions() -> None:
    empty, some = np.zeros((2, 3, 4, 12), bool)
    some[1, 1, 1] = True
    both = case_metrics(empty, empty, (1, 1, 1))
    undefined = ("Dice", "IoU", "HD95", "NSD", "relative_volume_error", "lesion_F1")
    assert all(both[m] is None for m in undefined) and both["volume_error"] == 0
    for prediction, truth in ((empty, some), (some, empty)):
        m = case_metrics(prediction, truth, (1, 1, 1))
        assert m["Dice"] == m["IoU"] == m["NSD"] == m["lesion_F1"] == 0
        assert m["HD95"] == pytest.approx(13.0)
    assert case_metrics(some, empty, (1, 1, 1))["relative_volume_error"] is None


def test_lesions_are_counted_by_components() -> None:
    truth, prediction = np.zeros((2, 20, 8, 8), bool)
    truth[1:3, 1, 1] = truth[3, 2, 2] = True  # one lesion: its parts touch at a corner
    truth[8, 4, 4] = True
    truth[12, 4, 4] = True
    prediction[1, 1, 1] = True
    prediction[8:13, 4, 4] = True  # one blob over two lesions
    prediction[18, 7, 7] = True
    m = case_metrics(prediction, truth, (1, 1, 1))
    assert (m["lesions_ref"], m["lesions_found"]) == (3, 3)
    assert (m["lesions_pred"], m["lesions_false"]) == (3, 1)
    assert m["lesion_sensitivity"] == 1 and m["lesion_precision"] == pytest.approx(2 / 3)


def test_intervals_resample_subjects_and_are_reproducible() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.8, 0.1, 60).tolist()
    alone = [str(i) for i in range(60)]
    a, b = mean_of(values, alone, seed=1), mean_of(values, alone, seed=1)
    assert a == b and a != mean_of(values, alone, seed=2)
    half = 1.96 * np.std(values) / np.sqrt(60)
    assert a.high - a.low == pytest.approx(2 * half, rel=0.15)
    # five copies of each case of a subject carry no more information than one
    copies = mean_of(np.repeat(values, 5).tolist(), np.repeat(alone, 5).tolist(), seed=1)
    assert (copies.low, copies.high) == pytest.approx((a.low, a.high))
    assert mean_of([None, None], ["a", "b"]).mean is None
    assert mean_of([None, 0.5], ["a", "b"]).n == 1


def test_one_subject_has_no_interval_and_one_pair_no_test() -> None:
    m = mean_of([0.5, 0.7, None], ["a", "a", "b"])
    assert (m.mean, m.low, m.high, m.n, m.subjects) == (pytest.approx(0.6), None, None, 2, 1)
    c = compare([0.5, 0.7], [0.4, 0.5], ["a", "a"])
    assert (c.low, c.high, c.n, c.subjects) == (None, None, 2, 1) and c.p_two_sided is not None
    c = compare([0.5, None], [0.4, 0.5], ["a", "b"])
    assert (c.low, c.p_greater, c.p_less, c.p_two_sided, c.n) == (None, None, None, None, 1)
    assert c.difference == pytest.approx(0.1) and c.effect == 1
    c = compare([0.5, 0.7], [0.4, 0.5], ["a", "b"])
    assert c.low == pytest.approx(0.1) and c.high == pytest.approx(0.2)


def test_runs_are_compared_in_pairs() -> None:
    rng = np.random.default_rng(0)
    b = rng.uniform(0.5, 0.9, 20)
    a = b + rng.normal(0.03, 0.02, 20)
    names = [str(i) for i in range(20)]
    c = compare(a.tolist(), b.tolist(), names)
    assert c is not None
    for alternative, p in (
        ("greater", c.p_greater),
        ("less", c.p_less),
        ("two-sided", c.p_two_sided),
    ):
        assert p == pytest.approx(stats.wilcoxon(a, b, alternative=alternative).pvalue)
    assert c.difference == pytest.approx((a - b).mean()) and c.low < c.difference < c.high
    assert compare((b + 1).tolist(), b.tolist(), names).effect == 1
    assert compare(b.tolist(), (b + 1).tolist(), names).effect == -1
    same = compare(b.tolist(), b.tolist(), names)
    assert (same.p_two_sided, same.effect, same.difference) == (1, 0, 0)
    assert compare([None], [0.5], ["x"]) is None


# the commands


def run(*argv: Any) -> int:
    return cli.run(str(argv[0]), [str(a) for a in argv[1:]])


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), np.eye(4) if affine is None else affine), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions of another program and the truth: labels 1 and 2, three cases."""
    rng = np.random.default_rng(0)
    for name in "abc":
        truth = rng.integers(0, 3, (6, 7, 8))
        wrong = rng.random(truth.shape) < 0.2
        write(tmp_path / "truth" / f"{name}.nii.gz", truth)
        write(tmp_path / "pred" / f"{name}.nii.gz", np.where(wrong, 0, truth))
    return tmp_path / "pred", tmp_path / "truth"


def test_a_summary_has_nnunets_shape(folders, capsys) -> None:
    pred, truth = folders
    assert run("evaluate", pred, "--truth", truth, "--label", "liver=1", "--label", "spleen=2") == 0
    summary = json.loads((pred / "summary.json").read_text())
    assert set(summary["mean"]) == {"1", "2"}
    case = summary["metric_per_case"][0]
    assert {"Dice", "IoU", "TP", "FP", "FN", "TN", "n_pred", "n_ref"} <= set(case["metrics"]["1"])
    assert case["prediction_file"].endswith("a.nii.gz")
    dice = [c["metrics"]["1"]["Dice"] for c in summary["metric_per_case"]]
    assert summary["mean"]["1"]["Dice"] == pytest.approx(np.mean(dice))
    both = [summary["mean"][v]["Dice"] for v in "12"]
    assert summary["foreground_mean"]["Dice"] == pytest.approx(np.mean(both))
    with open(pred / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["label"]) for r in rows][:2] == [("a", "liver"), ("a", "spleen")]
    assert float(rows[0]["Dice"]) == pytest.approx(dice[0])
    assert "liver" in capsys.readouterr().out


def test_another_run_is_compared(folders, tmp_path, capsys) -> None:
    pred, truth = folders
    for path in (tmp_path / "truth").iterdir():
        write(tmp_path / "perfect" / path.name, np.asarray(nib.load(path).dataobj))
    assert run("evaluate", pred, "--truth", truth) == 0
    assert run("evaluate", tmp_path / "perfect", "--truth", truth, "--compare", pred) == 0
    compared = json.loads((tmp_path / "perfect" / "comparison.json").read_text())
    dice = compared["labels"]["1"]["Dice"]
    assert dice["n"] == 3 and dice["effect"] == 1 and dice["mean_a"] == 1
    assert "rank-biserial" in capsys.readouterr().out
    (tmp_path / "other").mkdir()
    assert run("evaluate", pred, "--truth", truth, "--compare", tmp_path / "other") == 1


@pytest.mark.parametrize("what", ["truncated", "grid", "shape"])
def test_a_case_that_cannot_be_scored_is_named_and_the_others_count(folders, capsys, what) -> None:
    pred, truth = folders
    path = truth / "b.nii.gz"
    array = np.asarray(nib.load(path).dataobj)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif what == "grid":
        write(path, array, np.diag([1.0, 1.0, 2.0, 1.0]))
    else:
        write(path, array[:-1])
    assert run("evaluate", pred, "--truth", truth, "--label", "liver=1") == 1
    error = capsys.readouterr().err
    assert "1 failed" in error and "b.nii.gz" in error and "Traceback" not in error
    summary = json.loads((pred / "summary.json").read_text())
    assert [c["case"] for c in summary["metric_per_case"]] == ["a", "c"]


def test_missing_truth_is_named_and_nothing_is_written(folders, capsys) -> None:
    pred, truth = folders
    (truth / "b.nii.gz").unlink()
    assert run("evaluate", pred, "--truth", truth, "--label", "liver=1") == 1
    assert "b: no truth" in capsys.readouterr().err
    assert not (pred / "summary.json").exists()
    assert run("evaluate", pred, "--label", "liver") == 1
    assert run("evaluate", pred / "none") == 1


def test_sheared_files_are_said_by_name_and_give_no_nsd(folders, capsys) -> None:
    pred, truth = folders
    affine = np.eye(4)
    affine[0, 1] = 0.2
    for folder in folders:
        path = folder / "b.nii.gz"
        write(path, np.asarray(nib.load(path).dataobj), affine)
    assert run("evaluate", pred, "--truth", truth, "--label", "liver=1") == 0
    said = capsys.readouterr().out
    assert said.count("sheared grids") == 1 and "b.nii.gz" in said and "NSD is not defined" in said
    summary = json.loads((pred / "summary.json").read_text())
    nsd = {c["case"]: c["metrics"]["1"]["NSD"] for c in summary["metric_per_case"]}
    assert nsd["b"] is None and nsd["a"] is not None
    assert summary["labels"]["1"]["metrics"]["NSD"]["n"] == 2


def test_swapped_predictions_give_the_true_by_fed_table_and_a_report(tmp_path, capsys) -> None:
    make_model(tmp_path / "model", patch_size=[8, 8, 8])
    rng = np.random.default_rng(0)
    rows = ["participant_id\ttumor_type"]
    for i in range(6):
        volume = rng.standard_normal((8, 9, 7)).astype(np.float32)
        (tmp_path / "in").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "in" / f"c{i}.nii.gz")
        write(tmp_path / "truth" / f"c{i}.nii.gz", volume > 0)
        rows.append(f"c{i}\t{TYPES[i % 2]}")
    (tmp_path / "in" / "participants.tsv").write_text("\n".join(rows) + "\n")
    swap = f"tumor_type={TYPES[0]},{TYPES[1]}"
    model = tmp_path / "model"
    assert run("predict", model, tmp_path / "in", tmp_path / "swap", "--swap", swap) == 0
    assert run("predict", model, tmp_path / "in", tmp_path / "out") == 0
    assert run("evaluate", tmp_path / "swap", "--truth", tmp_path / "truth") == 0
    assert run("evaluate", tmp_path / "out", "--truth", tmp_path / "truth") == 0
    table = json.loads((tmp_path / "swap" / "swap_table.json").read_text())
    assert set(table["rows"]) == set(TYPES[:2])
    # the diagonal is what the plain run gives to the cases of that type
    plain = json.loads((tmp_path / "out" / "summary.json").read_text())
    groups = plain["labels"]["1"]["groups"]["tumor_type"]
    for t in TYPES[:2]:
        assert table["rows"][t][t]["mean"] == pytest.approx(groups[t]["Dice"]["mean"])
        assert table["rows"][t][t]["n"] == 3
    other = table["differences"][TYPES[0]][TYPES[1]]
    row = table["rows"][TYPES[0]]
    assert other["difference"] == pytest.approx(row[TYPES[0]]["mean"] - row[TYPES[1]]["mean"])
    masks = [
        np.asarray(nib.load(tmp_path / "swap" / f"tumor_type={t}" / "c0.nii.gz").dataobj) > 0
        for t in TYPES[:2]
    ]
    total = masks[0].sum() + masks[1].sum()
    dice = 2 * (masks[0] & masks[1]).sum() / total if total else 1
    assert table["sensitivity"]["c0/lesion"] == pytest.approx(1 - dice)
    assert "true tumor_type" in capsys.readouterr().out
    report = ["--model", model, "--evaluated", tmp_path / "out", "--swapped", tmp_path / "swap"]
    report += ["--compare", tmp_path / "swap" / f"tumor_type={TYPES[1]}"]
    assert run("report", tmp_path / "report", *report) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page.replace("http-equiv", "")
    pictures = {p.stem for p in (tmp_path / "report").glob("*.png")}
    assert pictures >= {"overlays", "comparison", "swap", "film_tumor_type"}
    assert run("inspect", model, tmp_path / "inspect") == 0
    with np.load(tmp_path / "inspect" / "film.npz", allow_pickle=False) as arrays:
        assert arrays["tumor_type/values"].tolist() == [*TYPES, "unknown"]
        assert arrays["tumor_type/encoder 1/gamma"].shape == (4, 2)


def test_inspection_gives_the_coefficients_that_the_network_uses(tmp_path) -> None:
    model = make_model(tmp_path)
    (found,) = inspect(model)
    used = model.network.modulate(model.encode({"tumor_type": TYPES[1]})).film
    assert len(found.layers) == len(used)
    for layer, (gamma, beta) in zip(found.layers, used, strict=True):
        np.testing.assert_allclose(layer.gamma[1], gamma[0].detach().numpy(), rtol=1e-6)
        np.testing.assert_allclose(layer.beta[1], beta[0].detach().numpy(), rtol=1e-6)


def test_components_keep_the_distances_of_a_plane() -> None:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((5, 2)) @ rng.standard_normal((2, 9))
    at, share = principal_components(flat.astype(np.float32))
    assert sum(share) == pytest.approx(1, abs=1e-5)
    for i, j in itertools.combinations(range(5), 2):
        expected = np.linalg.norm(flat[i] - flat[j])
        assert np.linalg.norm(at[i] - at[j]) == pytest.approx(expected, rel=1e-4)


def test_the_demo_runs_from_phantoms_to_the_report(tmp_path, capsys) -> None:
    assert run("demo", tmp_path / "demo", "--quick") == 0
    report = tmp_path / "demo" / "report" / "report.html"
    assert report.is_file() and str(report) in capsys.readouterr().out
    assert run("demo", tmp_path / "demo", "--quick") == 1
    assert "another folder" in capsys.readouterr().err
