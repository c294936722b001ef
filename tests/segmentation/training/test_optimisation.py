"""Learning rates, early stopping and the moving average, against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.sections import Training
from fastfilm.segmentation.training.optimisation import (
    Average,
    Progress,
    learning_rate,
    make_optimizer,
)


def rates(steps: int = 110, **options: Any) -> list[float]:
    config = Training(learning_rate=2.0, warmup_steps=10, **options)
    return [learning_rate(config, Progress(step=s, reductions=3), steps) for s in range(steps)]


def test_the_rate_rises_in_equal_parts_to_its_full_value_in_the_last_step_of_the_warm_up() -> None:
    for schedule in ("cosine", "poly", "constant", "plateau"):
        found = rates(schedule=schedule)
        assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
        assert found[10] == pytest.approx(2.0 if schedule != "plateau" else 2 / 8)


def test_schedules_run_from_the_end_of_the_warm_up_to_the_last_step() -> None:
    cosine = rates(schedule="cosine")
    assert cosine[35] == pytest.approx(1 + math.sqrt(0.5))  # a quarter of the way: π / 4
    assert cosine[60] == pytest.approx(1) and cosine[109] == pytest.approx(0, abs=1e-3)
    poly = rates(schedule="poly", poly_power=2.0)
    assert poly[60] == pytest.approx(2 / 4) and poly[85] == pytest.approx(2 / 16)
    assert rates(schedule="plateau", plateau_factor=0.1)[50] == pytest.approx(2e-3)
    assert set(rates(schedule="constant")[10:]) == {2.0}


def waits(dice: list[float], **options: Any) -> tuple[list[int], Progress]:
    """Epochs waited after each validation."""
    progress, found = Progress(), []
    for value in dice:
        progress.epoch += options.get("validate_every", 1)
        progress.validated(value, Training(**options))
        found.append(progress.waited)
    return found, progress


def test_early_stopping_measures_from_the_last_dice_that_was_clearly_better() -> None:
    # 0.004 an epoch: every third one is better by 0.01 than the one that was so last
    creeping = [0.5 + 0.004 * i for i in range(8)]
    found, progress = waits(creeping, min_delta=0.01)
    assert found == [0, 1, 2, 0, 1, 2, 0, 1] and progress.mark == creeping[6]
    assert (progress.best, progress.best_epoch) == (creeping[7], 8)
    # a fall and a way back below the mark are not better
    assert waits([0.5, 0.2, 0.4, 0.5, 0.52], min_delta=0.01)[0] == [0, 1, 2, 3, 0]
    assert waits([0.0, 0.0, 0.0], min_delta=0.01)[0] == [0, 1, 2]


def test_waiting_counts_epochs_however_rarely_they_are_validated() -> None:
    found, progress = waits([0.5, 0.4, 0.5, 0.3], validate_every=3, plateau_patience=6)
    assert found == [0, 3, 6, 9]
    assert (progress.reductions, progress.stale, progress.best_epoch) == (1, 3, 3)


def test_the_average_is_that_of_its_formula_with_a_start_that_is_soon_forgotten() -> None:
    """decay min(d, (1 + t) / (10 + t)) in step t; a weight of two modules is averaged once, buffers are copied."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    net[1].weight = net[0].weight
    with torch.no_grad():
        net[0].weight.fill_(100.0)
    average, expected = Average(net, 0.8), 100.0
    for step in range(60):
        with torch.no_grad():
            net[0].weight.fill_(float(step % 7))
        net[2].num_batches_tracked.fill_(step)
        average.update(net, step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (step % 7)
        for name in ("0.weight", "1.weight"):
            assert float(average.state[name]) == pytest.approx(expected, rel=1e-5)
        assert int(average.state["2.num_batches_tracked"]) == step
        if step == 1:
            assert expected < 3, "of the first 100 little is left"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_nesterovs_steps(momentum: float) -> None:
    """On a parabola, with decay added to the gradient; biases do not decay."""
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0), net.bias.fill_(1.0)
    config = Training(optimizer="sgd", learning_rate=0.1, momentum=momentum, weight_decay=0.5)
    optimizer = make_optimizer(net, config)
    weights, speeds = [1.0, 1.0], [0.0, 0.0]
    for step in range(4):
        optimizer.zero_grad()
        (net.weight.square().sum() + net.bias.square().sum()).backward()
        optimizer.step()
        for i, decay in enumerate((0.5, 0.0)):
            gradient = 2 * weights[i] + decay * weights[i]
            speeds[i] = momentum * speeds[i] + gradient if step else gradient
            weights[i] -= 0.1 * (gradient + momentum * speeds[i])
        assert [float(net.weight.detach()), float(net.bias.detach())] == pytest.approx(weights)
