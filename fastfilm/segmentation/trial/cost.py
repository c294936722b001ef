"""How long a trial takes on this machine, from a few steps of its network on random numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.plan import PlanFolder
from ..models.network import call
from ..prediction.one_case import Options
from ..support.devices import choose
from ..support.files import read_json
from ..training.fold import Start, describe
from ..training.loop import MOST_STEPS
from ..training.losses import KnownLoss
from ..training.optimisation import make_optimizer
from .arms import arm_plan
from .design import Run
from .nnunet_data import ARMS
from .scoring import MOST_VALUES

STEPS = 3
"""That are timed, after one that is not."""


@dataclass(frozen=True)
class Cost:
    """What one run of the conditioned arm costs.

    Attributes:
        steps: of training.
        step, window: seconds of a training step, and of one window's (2D: slice's) prediction.
        training, validation, scoring: seconds of a run.
    """

    steps: int
    step: float
    window: float
    training: float
    validation: float
    scoring: float

    @property
    def seconds(self) -> float:
        """Of a run."""
        return self.training + self.validation + self.scoring


def measure(plan: PlanFolder, run: Run, steps: int, device: str | None) -> Cost:
    """Times the network of a run; loading and augmenting of images is not in it.

    Args:
        plan: of the arm.
        steps: of a training.
    """
    config = plan.config.training
    where = choose(device)
    cases = plan.cases_of(run.fold, "train")
    info, network = describe(Start(plan, run.fold, plan.path), cases)
    network = network.to(where)
    rng = torch.Generator().manual_seed(0)
    batch = plan.plan.batch_size
    image = torch.randn(batch, info.in_channels, *info.patch_size, generator=rng).to(where)
    labels = 1 if info.output == "task" else len(info.labels)
    masks = torch.zeros(batch, labels, *info.patch_size, dtype=torch.uint8)
    masks[..., : max(1, info.patch_size[-1] // 2)] = 1
    masks, known = masks.to(where), torch.ones(batch, labels, dtype=torch.bool)
    rows = torch.zeros(batch, info.metadata.size).to(where)
    loss = KnownLoss(config, exclusive=info.output == "classes")
    optimizer = make_optimizer(network, config)
    totals = {k: v.to(where) for k, v in loss.weights(known).items()}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(call(network, image, rows), masks, known, totals).backward()
        optimizer.step()

    each = _timed(step, where)
    network.eval()

    def window() -> None:
        with torch.no_grad():
            call(network, image[:1], rows[:1])

    once = _timed(window, where)
    tasks = len(info.labels) if info.output == "task" else 1
    windows = np.mean([_windows(shape, info.patch_size) for shape in _shapes(plan)]) * tasks
    validated = len(plan.cases_of(run.fold, "val"))
    scored = len(plan.cases_of(run.fold, plan.held_out))
    times = math.ceil(config.epochs / config.validate_every)
    swaps = 1 + sum(min(MOST_VALUES, k.known_width) + k.unknown for k in info.metadata.keys)
    return Cost(
        steps=steps,
        step=each,
        window=once,
        training=each * steps,
        validation=float(once * windows * validated * times),
        scoring=float(once * windows * scored * (swaps if run.arm == "conditioned" else 1)),
    )


def cost_of(plan: PlanFolder, runs: Sequence[Run], device: str | None) -> dict[str, Cost]:
    """Arm -> the cost of one of its runs, of the arms among ``runs``; those of nnU-Net are not measured."""
    found: dict[str, Cost] = {}
    for run in runs:
        if run.arm not in found and run.arm not in ARMS:
            found[run.arm] = measure(arm_plan(plan, run), run, steps_of(plan, run), device)
    return found


def said(costs: dict[str, Cost], runs: Sequence[Run]) -> list[str]:
    """The costs in lines of text."""
    lines = []
    counted = [run for run in runs if run.arm in costs]
    total = sum(costs[run.arm].seconds for run in counted)
    for arm, c in costs.items():
        lines.append(
            f"{arm}: {c.steps} steps of {c.step:.3g} s, {c.validation:.0f} s of validation, {c.scoring:.0f} s of"
            f" scoring: {c.seconds / 60:.3g} minutes a network"
        )
    if counted:
        lines.append(
            f"{len(counted)} networks on this device: about {total / 3600:.2g} hours, and what reading and"
            " augmenting images add; several processes with the same folder share them"
        )
    if len(counted) < len(runs):
        lines.append(
            f"{len(runs) - len(counted)} networks of nnU-Net: their cost is not estimated; its log says how long"
            " an epoch takes"
        )
    return lines


def steps_of(plan: PlanFolder, run: Run) -> int:
    """Optimiser steps of a training; where ``training.steps_per_epoch`` is not set, by the files' shapes."""
    config = plan.config.training
    if config.steps_per_epoch is not None:
        return config.steps_per_epoch * config.epochs
    cases = plan.cases_of(run.fold, "train")
    each = np.mean([s[0] for s in _shapes(plan)]) if plan.plan.spatial_dims == 2 else 1.0
    tasks = len(plan.config.data.labels) if plan.config.output.mode == "task" else 1
    samples = int(each * tasks * len(cases))
    return min(MOST_STEPS, max(1, samples // plan.plan.batch_size)) * config.epochs


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """The median of ``STEPS``, in seconds."""
    seconds = []
    for _ in range(STEPS + 1):
        begun = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - begun)
    return float(np.median(seconds[1:]))


def _shapes(plan: PlanFolder) -> list[list[int]]:
    """Of the cases on the network's grid, before zeros around them are cut off; in network order."""
    preprocessing = plan.plan.preprocessing
    axis = preprocessing.slice_axis
    order = [axis, *(a for a in range(3) if a != axis)]
    shapes = []
    for case in read_json(plan.path / "fingerprint.json")["cases"]:
        size = [
            n if target is None else max(1, round(n * spacing / target))
            for n, spacing, target in zip(
                case["shape"], case["spacing"], preprocessing.spacing, strict=True
            )
        ]
        shapes.append([size[a] for a in order])
    return shapes


def _windows(shape: list[int], patch: list[int]) -> int:
    """Of a case: slices times windows in them, or windows in space, at the overlap of ``predict``."""
    size = [1, *patch] if len(patch) == 2 else patch
    stride = 1 - Options().overlap
    counts = [
        1 if n <= p else math.ceil((n - p) / max(1, p * stride)) + 1
        for n, p in zip(shape, size, strict=True)
    ]
    return math.prod(counts)
