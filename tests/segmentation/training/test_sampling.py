"""Sampling, patches and losses: what is drawn how often, and what an unknown label costs."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.sections import Augmentation, Training
from fastfilm.segmentation.data.cache import CachedCase
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.training.augment import Augment
from fastfilm.segmentation.training.dataset import cut
from fastfilm.segmentation.training.losses import KnownLoss
from fastfilm.segmentation.training.optimisation import (
    Average,
    Progress,
    learning_rate,
    make_optimizer,
)
from fastfilm.segmentation.training.sampling import (
    Draw,
    Draws,
    Steps,
    groups_by,
    place,
)

LOSSES = ["dice", "ce", "focal", "tversky", "generalised_dice"]


def case(shape: tuple[int, int, int], where: Any = (), **metadata: Any) -> CachedCase:
    points = np.array(where, np.int16).reshape(-1, 4)
    made = Case("c", "c", (Path("x"),), {}, metadata)
    return CachedCase(made, Path("x"), (True, True), points, shape, (1.0, 1.0, 1.0))


def test_every_case_comes_once_before_any_comes_again_in_another_order_each_time() -> None:
    draws = Draws([[True]] * 7, seed=3)
    rounds = [[draws(n).case for n in range(7 * r, 7 * r + 7)] for r in range(4)]
    assert all(sorted(r) == list(range(7)) for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_sample_n_is_the_same_whatever_was_asked_before() -> None:
    a, b = Draws([[True, True]] * 5, tasks=True), Draws([[True, True]] * 5, tasks=True)
    forward = [(d.case, d.task, d.rng.random()) for d in (a(n) for n in range(200))]
    backward = [(d.case, d.task, d.rng.random()) for d in (b(n) for n in reversed(range(200)))]
    assert forward == backward[::-1]


def test_balancing_draws_every_value_equally_often_and_every_case_of_a_value() -> None:
    cases = [case((1, 1, 1), kind="a" if i < 9 else "b") for i in range(12)]
    draws = Draws([[True]] * 12, groups=groups_by(cases, "kind"))
    count = Counter(draws(n).case for n in range(360))
    assert sum(count[i] for i in range(9)) == sum(count[i] for i in range(9, 12)) == 180
    assert {count[i] for i in range(9)} == {20} and {count[i] for i in range(9, 12)} == {60}


def test_annotated_tasks_of_a_case_take_turns() -> None:
    draws = Draws([[True, True, False], [False, True, True]], tasks=True)
    seen = Counter((d.case, d.task) for d in (draws(n) for n in range(40)))
    assert seen == {(0, 0): 10, (0, 1): 10, (1, 1): 10, (1, 2): 10}
    together = Draws([[True, True]] * 3, tasks=True, together=True)
    pairs = [(together(2 * n), together(2 * n + 1)) for n in range(30)]
    assert all(a.case == b.case and {a.task, b.task} == {0, 1} for a, b in pairs)


def test_processes_share_each_global_batch() -> None:
    whole = list(Steps(3, 9, 6))
    shares = [list(Steps(3, 9, 6, rank, 2)) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == whole
    assert whole[0] == list(range(18, 24)) and len(Steps(3, 9, 6)) == len(whole) == 6


def test_foreground_patches_hold_a_voxel_of_the_label_and_every_place_is_reached() -> None:
    c = case((20, 30, 40), [[0, 3, 3, 3], [1, 19, 29, 0]])
    for n in range(200):
        corner = place(Draw(0, 1, np.random.default_rng(n)), c, (8, 8, 8), 1.0)
        assert all(a <= p < a + 8 for a, p in zip(corner, (19, 29, 0), strict=True))
        assert all(0 <= a <= s - 8 for a, s in zip(corner, c.shape, strict=True))
    free = [place(Draw(0, None, np.random.default_rng(n)), c, (8, 8, 8), 0.0) for n in range(900)]
    assert {f[0] for f in free} == set(range(13))
    either = [
        place(Draw(0, None, np.random.default_rng(n)), c, (1, 8, 8), 1.0)[0] for n in range(60)
    ]
    assert {3, 19} == set(either)


def test_a_case_smaller_than_the_patch_is_padded_evenly_with_zeros() -> None:
    c = case((3, 8, 5))
    corner = place(Draw(0, None, np.random.default_rng(0)), c, (8, 8, 8), 0.5)
    array = np.ones((2, 3, 8, 5), np.float32)
    out = cut(array, corner, (8, 8, 8))
    assert out.shape == (2, 8, 8, 8) and out.sum() == array.size
    assert not out[:, :2].any() and not out[:, 6:].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_augmentation_depends_on_the_seed_alone_and_moves_image_and_mask_alike(dims: int) -> None:
    options = dict.fromkeys(
        ("affine", "elastic", "noise", "blur", "brightness", "gamma", "low_resolution"), 1.0
    )
    augment = Augment(Augmentation(**options, flip=["sagittal"]), spatial_dims=dims, slice_axis=2)
    image = torch.zeros(1, *(16,) * dims)
    image[(0, *(slice(3, 10),) * dims)] = 1.0
    a, b, c = (augment(image, image.byte(), s) for s in (5, 5, 6))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1])
    assert a[1].dtype == torch.uint8 and set(a[1].unique().tolist()) == {0, 1}
    moved = Augment(Augmentation(affine=1.0, rotation=90, noise=0, blur=0, brightness=0, gamma=0),
                    spatial_dims=dims, slice_axis=2)  # fmt: skip
    x, y = moved(image, image.byte(), 3)
    assert not torch.equal(y.float(), image) and ((x > 0.5) == (y == 1)).float().mean() > 0.97


def test_a_flip_is_across_the_plane_that_is_named() -> None:
    for axis, order in ((2, (2, 0, 1)), (0, (0, 1, 2))):
        flip = Augment(
            Augmentation(affine=0, noise=0, blur=0, brightness=0, gamma=0, flip=["sagittal"]),
            spatial_dims=3,
            slice_axis=axis,
        )
        image = torch.rand(1, 4, 5, 6)
        expected = image.flip(1 + order.index(0))
        results = [flip(image, image.byte(), s)[0] for s in range(20)]
        assert all(torch.equal(r, image) or torch.equal(r, expected) for r in results)
        assert any(torch.equal(r, expected) for r in results)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("exclusive", [False, True])
def test_an_unknown_label_costs_nothing_and_gets_no_gradient(name: Any, exclusive: bool) -> None:
    torch.manual_seed(0)
    loss = KnownLoss(Training(loss=[name]), exclusive)
    logits = torch.randn(3, 2 + exclusive, 6, 6, dtype=torch.float64, requires_grad=True)
    masks = torch.zeros(3, 2, 6, 6, dtype=torch.uint8)
    masks[:, 0, :3], masks[:, 1, 4:] = 1, 1
    known = torch.tensor([[True, True], [True, False], [False, False]])

    def value(m: torch.Tensor) -> torch.Tensor:
        return loss(logits, m, known, loss.weights(known))

    changed = masks.clone()
    changed[1, 1], changed[2] = 1, 1
    assert value(masks) > 0 and torch.equal(value(masks), value(changed))
    value(masks).backward()
    assert logits.grad is not None
    assert not logits.grad[2].any() and logits.grad[0, -1].any()
    if not exclusive:
        assert not logits.grad[1, 1].any()
    else:
        # voxels that are labelled background may be of the class that is not known
        sums = logits.grad[1, [0, 2]].reshape(2, -1)
        share = torch.softmax(logits.detach()[1, [0, 2]], 0).reshape(2, -1)
        torch.testing.assert_close(sums, sums.sum(0) * share, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("exclusive", [False, True])
def test_parts_of_a_batch_add_up_to_the_whole(name: Any, exclusive: bool) -> None:
    torch.manual_seed(0)
    loss = KnownLoss(Training(loss=[name]), exclusive)
    logits = torch.randn(4, 2 + exclusive, 5, 5)
    masks = (torch.rand(4, 2, 5, 5) > 0.7).byte()
    masks[:, 1] *= 1 - masks[:, 0]
    known = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    totals = loss.weights(known)
    parts = [slice(0, 1), slice(1, 4)]
    summed = sum(loss(logits[p], masks[p], known[p], totals) for p in parts)
    torch.testing.assert_close(summed, loss(logits, masks, known, totals))


@pytest.mark.parametrize("exclusive", [False, True])
def test_losses_are_those_of_their_formulas(exclusive: bool) -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 1 + exclusive, 8, 8, dtype=torch.float64)
    masks = (torch.rand(2, 1, 8, 8) > 0.5).byte()
    known = torch.ones(2, 1, dtype=torch.bool)
    p = torch.softmax(logits, 1)[:, 1:] if exclusive else torch.sigmoid(logits)
    p, y = p.flatten(1), masks.flatten(1).double()
    tp, fp, fn = (p * y).sum(1), (p * (1 - y)).sum(1), ((1 - p) * y).sum(1)
    right = torch.where(y == 1, p, 1 - p)
    expected: dict[Any, torch.Tensor] = {
        "dice": (1 - 2 * tp / (2 * tp + fp + fn)).mean(),
        "ce": -right.log().mean(),
        "tversky": (1 - tp / (tp + 0.3 * fp + 0.7 * fn)).mean(),
    }
    for name, value in expected.items():
        loss = KnownLoss(Training(loss=[name]), exclusive)
        found = loss(logits, masks, known, loss.weights(known))
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)


def test_deep_supervision_weighs_coarser_levels_less() -> None:
    loss = KnownLoss(Training(loss=["ce"]), False)
    known, masks = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    x = [torch.full((1, 1, 8 // 2**i, 8 // 2**i), float(i)) for i in range(3)]
    each = [
        float(loss(v, masks[..., : v.shape[-1], : v.shape[-1]], known, loss.weights(known)))
        for v in x
    ]
    expected = (4 * each[0] + 2 * each[1] + each[2]) / 7
    assert float(loss(x, masks, known, loss.weights(known))) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "poly", "constant"])
def test_the_learning_rate_warms_up_and_falls(schedule: Any) -> None:
    config = Training(schedule=schedule, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, Progress(step=s), 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.03


def test_the_plateau_schedule_falls_after_epochs_without_a_better_dice() -> None:
    config = Training(schedule="plateau", warmup_steps=0, learning_rate=1.0, plateau_patience=2)
    progress, rates = Progress(step=9), []
    for epoch, dice in enumerate((0.3, 0.3, 0.5, 0.4, 0.5, 0.6, 0.6, 0.6), start=1):
        progress.epoch = epoch
        progress.validated(dice, config)
        rates.append(learning_rate(config, progress, 100))
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25]
    assert (progress.best, progress.best_epoch, progress.waited) == (0.6, 6, 2)
    assert Progress.from_json(progress.to_json()) == progress


def test_weight_decay_spares_biases_and_has_a_value_of_its_own_for_generators() -> None:
    import fastfilm

    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=2, metadata_size=3)
    config = Training(weight_decay=0.1, generator_weight_decay=0.2)
    groups = make_optimizer(net, config).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(decay) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        expected = 0.0 if p.ndim < 2 else 0.2 if name.startswith("film.") else 0.1
        assert decay[id(p)] == expected, name


def test_the_average_forgets_its_start_and_keeps_shared_weights_equal() -> None:
    import fastfilm

    net = fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=2, metadata_size=3)
    average = Average(net, 0.9)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(1.0)
    for step in range(200):
        average.update(net, step)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(average.state[name], value, rtol=1e-4, atol=1e-5)
    shared = [v for k, v in average.state.items() if k.endswith("hidden.0.weight")]
    assert all(torch.equal(shared[0], v) for v in shared)
