"""Bytes a FiLMed U-Net keeps for its backward pass: a count, the same on every machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastfilm

from .. import providers
from ..eager import DoubleConv, FilmForm
from ..networks import NETWORKS, Network
from ..record import FAILED
from ..session import Case, Session
from ..step import Step
from .model import one_hot, twin


@dataclass(frozen=True)
class Limit:
    """A network and the most MiB that fastfilm may keep for it."""

    network: Network
    mib: float


LIMITS = (
    Limit(replace(NETWORKS[0], batch=1), 170),
    Limit(
        replace(NETWORKS[0], batch=1, size=(512, 512), widths=(64, 128, 256, 512, 1024)),
        560,
    ),
    # the share of the first
    Limit(replace(NETWORKS[1], batch=1, size=(64, 64, 64)), 190),
)
"""The first is counted in every run, the others where the run has no end in time."""

FORMS: tuple[tuple[str, FilmForm], ...] = (
    ("eager", "broadcast"),
    ("paper", "expanded"),
    ("eager-no-film", "none"),
)


class _Checkpointed(torch.autograd.Function):
    """What activation checkpointing keeps of a module: its input. For counting only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, function: Any) -> Tensor:
        ctx.save_for_backward(x)
        out: Tensor = function(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("this graph is for counting only")


def checkpointed(network: nn.Module) -> nn.Module:
    """``network`` with each double convolution checkpointed."""
    for module in network.modules():
        if isinstance(module, DoubleConv):
            forward, anchor = module.forward, module.conv1.weight
            module.forward = lambda x, f=forward, a=anchor: _Checkpointed.apply(x, a, f)
    return network


def run(session: Session) -> None:
    """Counts each form of each network."""
    bounded = session.quick or session.budget.left() != float("inf")
    for limit in LIMITS[: 1 if bounded else None]:
        if not session.budget.spent():
            count(session, limit)


def count(session: Session, limit: Limit) -> None:
    """One forward pass of each form, float32, with saved-tensor hooks."""
    torch.manual_seed(0)
    network = limit.network
    extra = {"filters": network.widths[0], "depth": len(network.widths)}
    case = Case("memory", network.case, "training", "float32", extra=extra)
    session.say(f"memory: {network.case}")
    image = torch.randn(1, 1, *network.size).to(session.device)
    batch = (image, one_hot(1, session.device), image)
    model = network.build().to(session.device)
    step = partial(Step, mode="training", dtype="float32")
    counted: dict[str, Step] = {}
    for name, form in FORMS:
        built = model if form == "broadcast" else network.build(form).to(session.device)
        if form == "expanded":
            built.load_state_dict(model.state_dict())
        counted[name] = step(built, *batch)
    usable, missing = providers.backends(session.device)
    ours = twin(model).to(session.device)
    for name in usable:
        scope = partial(fastfilm.backend, name)
        counted[f"fastfilm-{name}"] = step(ours, *batch, layout="channels-last", scope=scope)
    eager_bytes = counted["eager"].saved()
    expected = counted["eager"].forward().detach()
    kept = {name: one.saved() for name, one in counted.items()}
    checkpointed(counted["eager"].model)
    kept["eager-checkpointed"] = counted["eager"].saved()
    for name, bytes_kept in kept.items():
        part = bytes_kept / eager_bytes
        row = session.row(case, name, saved_bytes=bytes_kept, note=f"{part:.2f} of eager's")
        row.extra["saved_ratio"] = part
        if name.startswith("fastfilm"):
            out = counted[name].forward()
            row.extra["max_abs_diff"] = float((out - expected).detach().abs().max())
            if name != "fastfilm-reference" and not bytes_kept <= limit.mib * 2**20:
                row.status = FAILED
                row.note = f"{row.note}; at most {limit.mib:g} MiB allowed"
        session.record.add(row)
    for name, reason in missing:
        session.skip(case, f"fastfilm-{name}", reason)
