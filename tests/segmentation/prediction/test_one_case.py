"""Decisions, entropies, planes between planes and dropout in prediction, voxel by voxel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from fastfilm.nn import ConvNormFiLM2d
from fastfilm.segmentation.prediction.one_case import (
    decide,
    dropping,
    entropy,
)


def probabilities(labels: int, exclusive: bool) -> np.ndarray:
    """[labels, n]: all combinations of quarters (with ``exclusive`` those that leave the background >= 0)."""
    every = itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=labels)
    return np.array([p for p in every if not exclusive or sum(p) <= 1], np.float32).T


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_exclusive_labels_are_the_most_probable_class_and_ties_go_to_the_first(labels: int) -> None:
    """The background is before the labels."""
    p = probabilities(labels, True)
    masks, strongest = decide(p, True)
    for i, column in enumerate(p.T.tolist()):
        classes = [1 - sum(column), *column]
        assert strongest[i] == classes.index(max(classes)), column
        assert masks[:, i].tolist() == [strongest[i] == k + 1 for k in range(labels)]


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_labels_that_may_overlap_are_on_from_one_half(labels: int) -> None:
    p = probabilities(labels, False)
    masks, strongest = decide(p, False)
    for i, column in enumerate(p.T.tolist()):
        assert masks[:, i].tolist() == [x >= 0.5 for x in column]
        first = column.index(max(column)) + 1
        assert strongest[i] == (first if max(column) >= 0.5 else 0)


@pytest.mark.parametrize("exclusive", [False, True])
def test_entropy_is_that_of_its_formula_in_bits(exclusive: bool) -> None:
    p = probabilities(3, exclusive)
    found = entropy(p, exclusive)

    def bits(*classes: float) -> float:
        return -sum(x * math.log2(x) for x in classes if x > 0)

    for i, column in enumerate(p.T.tolist()):
        each = [bits(x, 1 - x) for x in column]
        expected = bits(1 - sum(column), *column) if exclusive else max(each)
        assert found[i] == pytest.approx(expected, abs=1e-6)


def test_dropout_is_on_inside_only_and_nothing_else_of_training_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        ConvNormFiLM2d(1, 4, norm="batch", dropout=0.5), nn.BatchNorm2d(4), nn.Dropout(0.5)
    ).eval()
    x = torch.randn(2, 1, 6, 6)

    def state() -> list[object]:
        return [m.training for m in net.modules()]

    with torch.no_grad():
        before = net(x)
        plain, statistics = state(), [b.clone() for b in net.buffers()]
        with pytest.raises(RuntimeError, match="inside"), dropping(net):
            assert [m.training for m in net] == [False, False, True]
            first, second = net(x), net(x)
            raise RuntimeError("inside")
        assert state() == plain
        assert torch.equal(net(x), before) and torch.equal(net(x), before)
    assert not torch.equal(first, second) and not torch.equal(first, before)
    for a, b in zip(statistics, net.buffers(), strict=True):
        assert torch.equal(a, b)
    # each of the two drops: half of the block's channels, and half of all values behind
    dropped = (first == 0).float().mean((2, 3))
    assert ((dropped > 0.2) & (dropped < 0.8)).any() or (dropped == 1).any()
