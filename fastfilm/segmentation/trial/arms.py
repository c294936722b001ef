"""What each arm of a trial trains: the plan as it is, but for how the metadata reach the network."""

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
"""Case -> the values that training feeds instead of the case's own."""

STREAM = 0x7219
"""Of random numbers: which case's metadata a case of the shuffled arm gets."""

MODIFIED_SWITCHES = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
"""Modified3DUNet's FiLM layers: on in the context levels and the fifth one, off behind them."""


def arm_plan(plan: PlanFolder, run: Run) -> PlanFolder:
    """The plan that a run trains: with the run's seed, and the network of its arm."""
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

    A row is what the network gets of one case. It moves as a whole, so that values which go together stay
    together, and the values' frequencies stay what they are. Held-out cases keep their own.
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
    """FiLM in the encoder, its deepest level included."""
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
