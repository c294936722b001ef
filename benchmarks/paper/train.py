"""Trains and tests one unit: the paper's network, loss and optimiser on slices that are in memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfilm
from fastfilm.segmentation.config.sections import Training
from fastfilm.segmentation.training.losses import KnownLoss

from .data import LAYOUTS, load
from .designs import BACKGROUND, LONGER, Design, Item, Unit, design

BATCH = 8
FUSED, EAGER = (None, None), ("reference", "eager")
"""Arguments of ``fastfilm.backend``."""


@dataclass(frozen=True)
class Size:
    """How much is computed.

    Attributes:
        splits: of the subjects.
        filters, depth: of the network.
        steps, few_steps, phantom_steps: optimiser steps at most: in general, in experiment 3, on the phantom.
        steps_per_epoch: of an epoch.
        patience: epochs without a validation Dice better by 0.001; 0: all steps, without validation.
        learning_rate: of Adam at the start.
        loss: added up.
        network: of ``fastfilm.FiLMedUNet``; at full size its defaults, which are the paper's.
    """

    splits: int
    filters: int
    depth: int
    steps: int
    few_steps: int
    phantom_steps: int
    steps_per_epoch: int
    patience: int
    learning_rate: float
    loss: tuple[str, ...]
    network: tuple[tuple[str, Any], ...] = ()

    @property
    def base(self) -> dict[str, Any]:
        """Order and generator."""
        paper = {"order": "conv-act-norm-film", "generator": "paper"}
        return {k: dict(self.network).get(k, v) for k, v in paper.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "batch": BATCH, "optimiser": "Adam, cosine annealing"}


# A few hundred steps do not suffice for sigmoid generators and running statistics to settle: the small size starts
# the generators at the identity and normalises each sample by itself.
_QUICK = (
    ("generator", "identity"),
    ("norm", "instance"),
    ("order", "conv-norm-film-act"),
    ("activation", "leaky_relu"),
)

SIZES = {
    "small": Size(3, 8, 3, 300, 200, 900, 300, 0, 3e-3, ("dice", "ce"), _QUICK),
    "full": Size(10, 64, 4, 40_000, 40_000, 40_000, 200, 50, 1e-3, ("dice",)),
    "test": Size(2, 4, 2, 2, 2, 2, 1, 1, 1e-3, ("dice", "ce"), _QUICK),
}
"""Named sizes; "test" shows in seconds that everything runs."""


def run(unit: Unit, size_name: str, root: Path | None, device: str) -> dict[str, Any]:
    """Trains and tests a unit.

    Returns:
        The unit, seconds of training, and for each tested case and label Dice (None where the label is absent).
    """
    size = SIZES[size_name]
    small = size_name != "full"
    data = load(unit.data, root, small)
    plan = design(unit, data)
    # the same start and the same draws for every condition of a split
    seed = unit.split + plan.seed
    torch.manual_seed(seed)
    net = _network(plan, size).to(device)
    with fastfilm.backend(*(EAGER if plan.eager else FUSED)):
        begin = time.perf_counter()
        steps, best = _train(net, plan, size, _steps(unit, size, len(data.labels)), seed, device)
        seconds = time.perf_counter() - begin
        cases = [
            {
                "case": item.case.id,
                "subject": item.case.subject,
                "label": data.labels[label],
                "true": item.case.values.get(unit.key, "") if unit.key != "contrast" else item.fed,
                "fed": item.fed,
                "dice": dice,
            }
            for item in plan.test
            for label, dice in _dice(net, plan, item, device)
        ]
    return {
        "unit": asdict(unit),
        "steps": steps,
        "seconds": round(seconds, 2),
        "validation_dice": best,
        "trained_on": len(plan.train),
        "cases": cases,
    }


def _network(plan: Design, size: Size) -> nn.Module:
    options: dict[str, Any] = {**dict(size.network), **plan.network}
    where = options.pop("film", None)
    if where is not None:
        inside, outside = size.depth + 1, size.depth + 1
        options["film_layers"] = [int(where == "encoder")] * inside + [
            int(where == "decoder")
        ] * outside
    metadata = 0 if plan.concatenate else plan.metadata
    return fastfilm.FiLMedUNet(
        plan.channels + (plan.metadata if plan.concatenate else 0),
        plan.outputs,
        base_filters=size.filters,
        depth=size.depth,
        metadata_size=metadata,
        **options,
    )


class Sampler:
    """Batches of slices: groups in turn, half of the slices with a known label in them."""

    def __init__(self, plan: Design, seed: int, device: str) -> None:
        self.plan, self.device = plan, device
        self.rng = np.random.default_rng(seed)
        groups = sorted({i.group for i in plan.train})
        self.groups = [[i for i in plan.train if i.group == g] for g in groups]
        self.turn = 0
        self.full: dict[Item, NDArray[np.int64]] = {}

    def slices(self, item: Item) -> NDArray[np.int64]:
        """Those with a known label in them."""
        if item not in self.full:
            self.full[item] = np.flatnonzero(target(item).any((1, 2, 3)))
        return self.full[item]

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Images, masks, what is known, metadata."""
        images, masks, known, rows = [], [], [], []
        for _ in range(BATCH):
            group = self.groups[self.turn % len(self.groups)]
            self.turn += 1
            item = group[int(self.rng.integers(len(group)))]
            image, full = seen(item), self.slices(item)
            slices = full if len(full) and self.rng.random() < 0.5 else np.arange(len(image))
            at = int(slices[int(self.rng.integers(len(slices)))])
            scale, shift = self.rng.uniform(0.9, 1.1), self.rng.uniform(-0.1, 0.1)
            images.append(image[at] * np.float32(scale) + np.float32(shift))
            masks.append(target(item, at)[0])
            known.append([t is not None for t in item.targets])
            rows.append(self._row(item))
        return (
            *self._inputs(np.stack(images), rows),
            torch.from_numpy(np.stack(masks)).to(self.device),
            torch.tensor(known),
        )  # type: ignore[return-value]

    def _row(self, item: Item) -> NDArray[np.float32] | None:
        if item.row is not None and self.plan.hidden and self.rng.random() < self.plan.hidden:
            return np.zeros_like(item.row)
        return item.row

    def _inputs(
        self, images: NDArray[np.float32], rows: Sequence[Any]
    ) -> tuple[Tensor, Tensor | None]:
        return inputs(self.plan, images, rows, self.device)


def seen(item: Item) -> NDArray[np.float32]:
    """The slices [D, C, H, W] that the network is shown."""
    image = item.case.image
    return image if item.contrast is None else image[:, item.contrast : item.contrast + 1]


def target(item: Item, at: int | None = None) -> NDArray[np.bool_]:
    """The truth [D, outputs, H, W]; empty where a label is not known or counts as background.

    Args:
        at: one slice only (D = 1).
    """
    masks = item.case.masks if at is None else item.case.masks[at : at + 1]
    empty = np.zeros_like(masks[:, 0])
    return np.stack(
        [empty if t is None or t == BACKGROUND else masks[:, t] for t in item.targets], 1
    )


def inputs(
    plan: Design,
    images: NDArray[np.float32],
    rows: Sequence[NDArray[np.float32] | None],
    device: str,
) -> tuple[Tensor, Tensor | None]:
    """Images and metadata; concatenated metadata become constant channels."""
    x = torch.from_numpy(images).to(device)
    if rows[0] is None:
        return x, None
    metadata = torch.from_numpy(np.stack([r for r in rows if r is not None])).to(device)
    if not plan.concatenate:
        return x, metadata
    maps = metadata[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return torch.cat([x, maps], 1), None


def _steps(unit: Unit, size: Size, labels: int) -> int:
    if unit.data == "phantom":
        return size.phantom_steps
    once = size.few_steps if unit.experiment == "3" else size.steps
    if not unit.condition.endswith(LONGER):
        return once
    return once * (2 if unit.experiment == "3" else labels)


def _train(
    net: nn.Module, plan: Design, size: Size, steps: int, seed: int, device: str
) -> tuple[int, float | None]:
    generator = list(net.film.parameters())  # type: ignore[union-attr]
    own = {id(p) for p in generator}
    groups = [
        {"params": [p for p in net.parameters() if id(p) not in own]},
        {"params": generator, "weight_decay": plan.generator_decay},
    ]
    optimiser = torch.optim.Adam([g for g in groups if g["params"]], lr=size.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    loss = KnownLoss(Training(loss=list(size.loss)), exclusive=False)
    sampler = Sampler(plan, seed, device)
    best, kept, waited, step = None, None, 0, 0
    while step < steps:
        net.train()
        for _ in range(min(size.steps_per_epoch, steps - step)):
            x, metadata, masks, known = sampler.batch()
            optimiser.zero_grad(set_to_none=True)
            value = loss(net(x, metadata), masks, known, loss.weights(known))
            value.backward()
            optimiser.step()
            schedule.step()
            step += 1
        if not size.patience:
            continue
        found = [
            d for i in plan.validation for _, d in _dice(net, plan, i, device) if d is not None
        ]
        dice = float(np.mean(found)) if found else 0.0
        if best is None or dice > best + 1e-3:
            best, kept, waited = dice, copy.deepcopy(net.state_dict()), 0
        else:
            waited += 1
        if waited >= size.patience:
            break
    if kept is not None:
        net.load_state_dict(kept)
    return step, best


def _dice(
    net: nn.Module, plan: Design, item: Item, device: str
) -> Iterator[tuple[int, float | None]]:
    """(label, Dice over the volume) for each label that the item asks for."""
    net.eval()
    images, truth = seen(item), target(item)
    found = []
    with torch.no_grad():
        for i in range(0, len(images), 32):
            part = images[i : i + 32]
            x, metadata = inputs(plan, part, [item.row] * len(part), device)
            found.append((net(x, metadata) > 0).cpu().numpy())
    mask = np.concatenate(found)
    for j, label in enumerate(item.targets):
        if label is None or label == BACKGROUND:
            continue
        a, b = mask[:, j], truth[:, j]
        if b.any():
            yield label, float(2 * (a & b).sum() / (a.sum() + b.sum()))
        else:
            yield label, None


def eager_ratio(size_name: str, device: str, rounds: int = 15, steps: int = 4) -> dict[str, Any]:
    """Wall-clock of training steps through plain PyTorch over that through the fused path, on the phantom.

    Both take turns in one process, so that what else the machine does meets both.

    Returns:
        Median of the rounds' ratios, its quartiles, rounds, and steps a round.
    """
    size = SIZES[size_name]
    unit = Unit("1", "phantom", "true", 0, "tumor_type")
    plan = design(unit, load(unit.data, None, size_name != "full"))
    loss = KnownLoss(Training(loss=list(size.loss)), exclusive=False)
    routes, nets = {"fused": FUSED, "eager": EAGER}, {}
    for name in routes:
        torch.manual_seed(0)
        net = _network(plan, size).to(device)
        nets[name] = net, torch.optim.Adam(net.parameters()), Sampler(plan, 0, device)

    def run(name: str, count: int) -> float:
        net, optimiser, sampler = nets[name]
        batches = [sampler.batch() for _ in range(count)]
        with fastfilm.backend(*routes[name]):
            begin = time.perf_counter()
            for x, metadata, masks, known in batches:
                optimiser.zero_grad(set_to_none=True)
                loss(net(x, metadata), masks, known, loss.weights(known)).backward()
                optimiser.step()
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            return time.perf_counter() - begin

    for name in routes:
        run(name, 2)
    ratios = [run("eager", steps) / run("fused", steps) for _ in range(rounds)]
    low, middle, high = (round(float(q), 3) for q in np.quantile(ratios, (0.25, 0.5, 0.75)))
    return {"median": middle, "quartiles": [low, high], "rounds": rounds, "steps": steps}


def labels() -> dict[str, int]:
    """Number of labels of each set."""
    return {name: len(layout.labels) for name, layout in LAYOUTS.items()}
