"""Optimiser, learning rate and moving average; all their state is tensors and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.sections import Training
from ..models.network import generator_parameters


def make_optimizer(network: nn.Module, config: Training) -> torch.optim.Optimizer:
    """AdamW or SGD with three groups: weights, the generators' weights, and what never decays (biases, norms)."""
    generator = {id(p) for p in generator_parameters(network)}
    weights: list[nn.Parameter] = []
    film: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for p in network.parameters():
        if not p.requires_grad:
            continue
        (plain if p.ndim < 2 else film if id(p) in generator else weights).append(p)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": film, "weight_decay": config.generator_weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=config.learning_rate)


@dataclass
class Progress:
    """Where training is, beside the tensors; plain JSON.

    Attributes:
        step: optimiser steps done.
        epoch: epochs done.
        best: highest validation Dice; best_epoch: when.
        waited: epochs since the Dice was better by ``min_delta`` than ``mark``, for early stopping.
        stale: the same since the last reduction of the plateau schedule.
        reductions: of the plateau schedule.
        loss_sum, loss_steps: of the epoch that is under way.
        finished: training has ended.
    """

    step: int = 0
    epoch: int = 0
    best: float | None = None
    best_epoch: int = 0
    mark: float = -math.inf
    waited: int = 0
    stale: int = 0
    reductions: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    finished: bool = False

    def validated(self, dice: float, config: Training) -> bool:
        """Takes note of a validation's Dice; True if it is the best so far."""
        better = self.best is None or dice > self.best
        if better:
            self.best, self.best_epoch = dice, self.epoch
        if dice > self.mark + config.min_delta or self.mark == -math.inf:
            self.mark, self.waited, self.stale = dice, 0, 0
        else:
            self.waited += config.validate_every
            self.stale += config.validate_every
        if self.stale >= config.plateau_patience:
            self.reductions += 1
            self.stale = 0
        return better

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; inverse of ``from_json``."""
        value = dict(vars(self))
        value["mark"] = None if self.mark == -math.inf else self.mark
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """The progress in ``to_json``'s value."""
        return cls(**{**value, "mark": -math.inf if value["mark"] is None else value["mark"]})


def learning_rate(config: Training, progress: Progress, steps: int) -> float:
    """The rate of step ``progress.step`` of ``steps``: a function of the progress alone."""
    base, step = config.learning_rate, progress.step
    if step < config.warmup_steps:
        return base * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "poly":
        return float(base * (1 - done) ** config.poly_power)
    if config.schedule == "plateau":
        return float(base * config.plateau_factor**progress.reductions)
    return base


class Average:
    """Exponential moving average of a network's weights (buffers are copied)."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """After step number ``step`` (from 0); the first steps count more, so that the start is forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for k, v in network.state_dict().items():
            if v.is_floating_point():
                self.state[k].lerp_(v, 1 - decay)
            else:
                self.state[k].copy_(v)


def optimizer_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's state, ``parameter name/entry`` -> tensor."""
    for name, p in network.named_parameters():
        for entry, value in optimizer.state.get(p, {}).items():
            if value is not None:
                yield f"{name}/{entry}", torch.as_tensor(value)


def load_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Inverse of ``optimizer_tensors``; memory layout and device as the optimiser would have made them."""
    for name, p in network.named_parameters():
        for key, value in tensors.items():
            owner, _, entry = key.rpartition("/")
            if owner == name:
                like = torch.empty_like(p) if value.shape == p.shape else value.clone()
                optimizer.state[p][entry] = like.copy_(value)
