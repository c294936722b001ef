"""Networks and layers called for the sake of their launches, by name: what binaries are made of beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import fastfilm

from ..counted.deciding_layers import SUBJECTS, Block
from ..counted.inside import calls_of_check
from ..counted.roofline import Layer
from ..subjects.layers import LayerStep
from ..subjects.networks import NETWORKS
from ..subjects.step import Step
from ..suites.model import METADATA, twin
from ..suites.routes import CHECKED, DIRECTIONS, step_of

Calls = Iterator[Callable[[], object]]

ROUTES = ("fused", "composed")


def _networks(*routes: str | None) -> Calls:
    """FiLMed U-Nets in bfloat16, training and inference, by the automatic choice or by one route throughout."""
    for network in NETWORKS[:2]:
        model = twin(network.build())
        image = torch.empty(network.batch, network.channels, *network.size)
        upstream = torch.empty(network.batch, network.classes, *network.size)
        metadata = torch.zeros(network.batch, METADATA)
        for mode in ("inference", "training"):
            for route in routes:
                scope = partial(fastfilm.backend, "triton", route)
                yield Step(
                    model, image, metadata, upstream,
                    mode=mode, dtype="bfloat16", layout="channels-last", scope=scope,
                )  # fmt: skip


def _layers() -> Calls:
    """The suite ``routes`` in bfloat16: each layer and the crop of it that is compared, in every direction."""
    for subject in SUBJECTS:
        for sized in (subject, subject.sized(CHECKED[subject.dims])):
            for route in ROUTES:
                for wanted in DIRECTIONS.values():
                    if subject.block.layer.input_grad or "input" not in wanted or len(wanted) > 2:
                        yield step_of(sized, "cpu", "bfloat16", f"triton/{route}", wanted)


def _proof() -> Calls:
    """One small layer by each route, forward."""
    for route in ROUTES:
        scope = partial(fastfilm.backend, "triton", route)
        yield LayerStep(
            Block(Layer(16, 16, (8, 8)), 2), "cpu", "bfloat16", "training", scope
        ).forward


WORKLOADS: dict[str, Callable[[], Calls]] = {
    "proof": _proof,
    "networks": partial(_networks, None),
    "layers": _layers,
    "check": calls_of_check,
    "routes": partial(_networks, *ROUTES),
}
"""By name, the most important first."""
