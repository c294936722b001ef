"""The arms of a trial: the same plan, with metadata reaching the network in different ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..config.schema import Config
from ..config.sections import NetworkConfig
from ..data.decisions import Plan
from ..data.plan import PlanFolder
from ..support.errors import UserError
from .design import Run

Fed = dict[str, dict[str, Any]]
"""Case -> metadata for training in place of its own."""

STREAM = 0x7219
"""Stream of random numbers that permutes the metadata of the shuffled arm."""

MODIFIED_SWITCHES = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
"""Modified3DUNet's FiLM layers for FiLM in the encoder: on in the first five levels, off behind them."""


def arm_plan(plan: PlanFolder, run: Run) -> PlanFolder:
    """The plan of a run, with its seed and the network of its arm."""
    config: Config = plan.config.model_copy(deep=True)
    config.training.seed = run.seed
    network = plan.plan.network
    if run.arm == "unconditioned":
        for key in config.metadata.values():
            key.input = False
        network = _changed(network, conditioning="film", film_layers=None, where=None)
    elif run.arm == "channels":
        network = _changed(network, conditioning="channels", film_layers=None, where=None)
    elif run.arm == "encoder":
        network = _encoder(network)
    config.network = network
    made: Plan = plan.plan.model_copy(update={"network": network})
    return replace(plan, config=config, plan=made)


def fed_metadata(plan: PlanFolder, run: Run) -> Fed | None:
    """The shuffled arm's metadata: rows permuted over the fold's training cases; None in the other arms.

    A row has all values of one case that condition the network. It moves as a whole, which keeps associations
    between values, and their frequencies. Held-out cases keep their own metadata.
    """
    if run.arm != "shuffled":
        return None
    names = [name for name, key in plan.config.metadata.items() if key.input]
    cases = plan.cases_of(run.fold, "train")
    rows: list[Mapping[str, Any]] = [c.metadata for c in cases]
    order = np.random.default_rng([STREAM, run.seed, run.fold]).permutation(len(cases))
    return {
        case.id: {name: rows[i].get(name) for name in names}
        for case, i in zip(cases, order, strict=True)
    }


def _encoder(network: NetworkConfig) -> NetworkConfig:
    """The network with FiLM in the encoder only, including its deepest level."""
    if network.name == "condition":
        return _changed(network, where="encoder")
    if network.name == "Modified3DUNet":
        return _changed(network, film_layers=MODIFIED_SWITCHES)
    if network.depth is None:
        raise UserError("network.depth is not known, so neither are the encoder's FiLM layers")
    on = network.depth + 1
    return _changed(network, film_layers=[1] * on + [0] * on)


def _changed(network: NetworkConfig, **update: Any) -> NetworkConfig:
    return NetworkConfig.model_validate({**network.model_dump(), **update})
