"""Metrics of random masks against counts and distances taken voxel by voxel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from fastfilm.segmentation.evaluation.metrics import case_metrics
from fastfilm.segmentation.prediction.postprocessing import fill_holes, keep_largest

SPACING = (0.7, 1.0, 2.5)


def groups(voxels: set[Any], corners: bool = True) -> list[set[Any]]:
    """Connected sets of voxels, by flooding."""
    steps = [d for d in itertools.product((-1, 0, 1), repeat=3) if corners or sum(map(abs, d)) == 1]
    left, found = set(voxels), []
    while left:
        front = [left.pop()]
        group = set(front)
        while front:
            at = front.pop()
            for step in steps:
                near = tuple(a + b for a, b in zip(at, step, strict=True))
                if near in left:
                    left.remove(near)
                    group.add(near)
                    front.append(near)
        found.append(group)
    return found


def voxels(mask: np.ndarray) -> set[Any]:
    return set(map(tuple, np.argwhere(mask).tolist()))


def surface(mask: np.ndarray) -> np.ndarray:
    """mm of the voxels with a face neighbour outside, which the border of the image is."""
    inside = voxels(mask)
    steps = [d for d in itertools.product((-1, 0, 1), repeat=3) if sum(map(abs, d)) == 1]
    found = [
        v
        for v in inside
        if any(tuple(a + b for a, b in zip(v, d, strict=True)) not in inside for d in steps)
    ]
    return np.array(found) * SPACING


@pytest.mark.parametrize("seed", range(4))
def test_metrics_of_random_masks_are_those_of_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = rng.uniform(0.02, 0.06, 2)
    a, b = (rng.random((9, 8, 7)) < s for s in shares)
    both = a & rng.permutation(b.ravel()).reshape(b.shape)
    prediction, truth = a, b | both
    prediction[:3, :2, :2] = truth[:4, :2, :3] = True
    p, t = voxels(prediction), voxels(truth)
    found = case_metrics(prediction, truth, SPACING)
    assert found["Dice"] == pytest.approx(2 * len(p & t) / (len(p) + len(t)))
    assert found["IoU"] == pytest.approx(len(p & t) / len(p | t))
    assert found["volume_error"] == pytest.approx((len(p) - len(t)) * 0.7 * 2.5 / 1000)
    assert found["relative_volume_error"] == pytest.approx((len(p) - len(t)) / len(t))
    real, lesions = groups(p), groups(t)
    hit = sum(bool(g & p) for g in lesions), sum(bool(g & t) for g in real)
    assert (found["lesions_ref"], found["lesions_found"]) == (len(lesions), hit[0])
    assert (found["lesions_pred"], found["lesions_false"]) == (len(real), len(real) - hit[1])
    s, r = hit[0] / len(lesions), hit[1] / len(real)
    assert (found["lesion_sensitivity"], found["lesion_precision"]) == pytest.approx((s, r))
    assert found["lesion_F1"] == pytest.approx(2 / (1 / s + 1 / r))
    x, y = surface(prediction), surface(truth)
    apart = np.linalg.norm(x[:, None] - y[None], axis=-1)
    ends = np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95)
    assert found["HD95"] == pytest.approx(max(ends), rel=1e-4)
    assert ends[0] != pytest.approx(ends[1]), "else one direction would do"


@pytest.mark.parametrize("swapped", [False, True])
def test_surfaces_within_the_tolerance_are_counted_by_their_area(swapped: bool) -> None:
    """A box and one that is longer by 4 mm along x: nothing is off but around the far end."""
    long, short = np.zeros((2, 40, 30, 26), bool)
    long[5:35, 5:25, 5:21] = short[5:31, 5:25, 5:21] = True
    a, b = (short, long) if swapped else (long, short)
    sides, end = 2 * (20 + 16), 20 * 16

    def share(tolerance: float) -> float:
        return float(case_metrics(a, b, (1, 1, 1), tolerance)["NSD"] or 0)

    # the long one's end and its sides from 1 to 4 mm; of the short one's end what is over 1 mm from those sides
    off = end + 3 * sides + 18 * 14
    whole = 4 * end + 56 * sides
    assert share(1.0) == pytest.approx(1 - off / whole, abs=0.02)
    assert share(3.9) == pytest.approx(1 - (end + 12 * 8) / whole, abs=0.02)
    assert share(4.1) == pytest.approx(1)


def test_the_largest_component_and_holes_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    for _ in range(6):
        mask = rng.random((6, 7, 5)) < 0.12
        largest = max(groups(voxels(mask)), key=len)
        assert len(voxels(keep_largest(mask))) == len(largest)
        assert len(groups(voxels(keep_largest(mask)))) == 1
        full = rng.random((6, 7, 5)) < 0.75
        edge = [{0, n - 1} for n in full.shape]
        open_ = [
            g
            for g in groups(voxels(~full), corners=False)
            if any(v[i] in edge[i] for v in g for i in range(3))
        ]
        assert voxels(~fill_holes(full)) == set().union(*open_)


def test_of_equally_large_components_the_first_is_kept() -> None:
    mask = np.zeros((9, 3, 3), bool)
    mask[1:3, 1, 1] = mask[5:7, 1, 1] = True
    assert voxels(keep_largest(mask)) == {(1, 1, 1), (2, 1, 1)}
