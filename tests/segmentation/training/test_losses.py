"""Losses with labels that are not known, against formulas written out sample by sample."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.sections import Training
from fastfilm.segmentation.training.losses import KnownLoss

ALPHA, GAMMA, SMALL = 0.2, 1.5, 1e-5
LOSSES = ["dice", "tversky", "generalised_dice", "ce", "focal"]
KNOWN = torch.tensor([[True, True, True], [True, False, True], [False] * 3, [False, True, False]])


def sample(name: str, p: Tensor, y: Tensor, background: Tensor | None) -> list[Tensor]:
    """The loss of each of a sample's entries; p, y: [K, voxels]; background: its probability [voxels]."""
    tp, fp, fn = (p * y).sum(1), (p * (1 - y)).sum(1), ((1 - p) * y).sum(1)
    if name == "dice":
        return list(1 - (2 * tp + SMALL) / (p.sum(1) + y.sum(1) + SMALL))
    if name == "tversky":
        return list(1 - (tp + SMALL) / (tp + ALPHA * fp + (1 - ALPHA) * fn + SMALL))
    if name == "generalised_dice":
        size = y.sum(1)
        weight = torch.where(size > 0, 1 / size**2, 0.0)
        weight = torch.where(size > 0, weight, weight.max())
        above, below = (weight * 2 * tp).sum(), (weight * (p.sum(1) + size)).sum()
        return [1 - (above + SMALL) / (below + SMALL)]
    power = GAMMA if name == "focal" else 0.0
    if background is None:
        right = torch.where(y == 1, p, 1 - p)
        return list(((1 - right) ** power * -right.log()).mean(1))
    right = torch.where(y.any(0), (p * y).sum(0), background)
    return [((1 - right) ** power * -right.log()).mean()]


def expected(name: str, logits: Tensor, masks: Tensor, known: Tensor, exclusive: bool) -> Tensor:
    """The mean over every known entry of the batch."""
    entries: list[Tensor] = []
    for x, y, row in zip(logits.double().flatten(2), masks.double().flatten(2), known, strict=True):
        if not row.any():
            continue
        p = torch.softmax(x, 0)[1:][row] if exclusive else torch.sigmoid(x)[row]
        entries += sample(name, p, y[row], 1 - p.sum(0) if exclusive else None)
    return torch.stack(entries).mean()


def data(exclusive: bool) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 3 + exclusive, 5, 4)
    label = torch.randint(0, 4, (4, 1, 5, 4))
    masks = torch.cat([label == k + 1 for k in range(3)], 1)
    masks[0, 1] = False  # annotated, and empty
    if not exclusive:
        masks |= torch.rand(masks.shape) < 0.2  # labels may overlap
    return logits, masks.byte()


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_mean_of_its_known_entries(name: Any, exclusive: bool) -> None:
    logits, masks = data(exclusive)
    loss = KnownLoss(Training(loss=[name], tversky_alpha=ALPHA, focal_gamma=GAMMA), exclusive)
    found = loss(logits, masks, KNOWN, loss.weights(KNOWN))
    theirs = expected(name, logits, masks, KNOWN, exclusive)
    torch.testing.assert_close(found.double(), theirs, rtol=1e-4, atol=1e-5)
    # in parts of one sample, each divided by the entries of the whole batch
    parts = [
        loss(logits[i : i + 1], masks[i : i + 1], KNOWN[i : i + 1], loss.weights(KNOWN))
        for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(parts).sum(), found)


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("names", list(itertools.combinations(LOSSES, 2)), ids="+".join)
def test_losses_add_up(names: Any, exclusive: bool) -> None:
    logits, masks = data(exclusive)

    def value(*loss: Any) -> Tensor:
        made = KnownLoss(Training(loss=list(loss)), exclusive)
        return made(logits, masks, KNOWN, made.weights(KNOWN))

    torch.testing.assert_close(value(*names), value(names[0]) + value(names[1]))


@pytest.mark.parametrize("name", ["dice", "tversky"])
def test_an_empty_label_that_is_predicted_empty_costs_nothing(name: Any) -> None:
    loss, known = KnownLoss(Training(loss=[name]), False), torch.ones(1, 1, dtype=torch.bool)
    logits, masks = torch.full((1, 1, 8, 8), -30.0), torch.zeros(1, 1, 8, 8)
    assert float(loss(logits, masks, known, loss.weights(known))) == pytest.approx(0, abs=1e-3)
    masks[..., 0] = 1
    assert float(loss(logits, masks, known, loss.weights(known))) == pytest.approx(1, abs=1e-3)


def test_coarse_outputs_are_held_against_the_voxels_at_their_centres_with_halved_weights() -> None:
    torch.manual_seed(0)
    loss, known = KnownLoss(Training(loss=["ce"]), False), torch.ones(2, 1, dtype=torch.bool)
    masks = (torch.rand(2, 1, 12, 8) > 0.5).byte()
    sizes = [(12, 8), (6, 4), (4, 2)]
    logits = [torch.randn(2, 1, *s) for s in sizes]
    total = 0.0
    for level, (x, size) in enumerate(zip(logits, sizes, strict=True)):
        rows, columns = (
            [int((i + 0.5) * n / m) for i in range(m)] for n, m in zip((12, 8), size, strict=True)
        )
        y = masks[:, :, rows][..., columns].float()
        bce = torch.nn.functional.binary_cross_entropy_with_logits(x, y)
        total += 0.5**level * float(bce) / 1.75
    assert math.isclose(float(loss(logits, masks, known, loss.weights(known))), total, rel_tol=1e-5)
