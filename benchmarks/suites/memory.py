"""Bytes that a FiLMed U-Net keeps for its backward pass, and maps that it moves: the same on every machine."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastfilm

from ..counted import emulated_passes, emulation, traffic
from ..counted.inside import float32_products
from ..measure import providers
from ..measure.harness import TookTooLong, peak_bytes, tensor_peak_bytes, time_limit
from ..measure.record import FAILED, NO_TIME
from ..measure.session import Case, Session
from ..subjects.eager_networks import DoubleConv, FilmForm
from ..subjects.networks import NETWORKS, Network
from ..subjects.step import Step
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


def checkpointed(network: nn.Module, real: bool = False) -> nn.Module:
    """``network`` with each double convolution checkpointed; not ``real``: for counting what is kept."""
    for module in network.modules():
        if isinstance(module, DoubleConv):
            forward, anchor = module.forward, module.conv1.weight
            if real:
                module.forward = partial(checkpoint, forward, use_reentrant=False)
            else:
                module.forward = lambda x, f=forward, a=anchor: _Checkpointed.apply(x, a, f)
    return network


def run(session: Session) -> None:
    """Counts each form of each network."""
    for limit in LIMITS[: 1 if bounded(session) else None]:
        network = limit.network
        extra = {"filters": network.widths[0], "depth": len(network.widths)}
        case = Case("memory", network.case, "training", "float32", extra=extra)
        if session.budget.spent():
            session.skip(case, "all", NO_TIME)
            continue
        session.running = case, "all"
        try:
            with float32_products(False), time_limit(session.budget.left(), "counting"):
                count(session, limit, case)
        except TookTooLong as error:
            session.skip(case, "all", f"{NO_TIME}: {error}")


def bounded(session: Session) -> bool:
    """Whether the run has to end in time: no large network then, and no peaks."""
    return session.quick or session.budget.left() != float("inf")


def peak(step: Step, device: str) -> int | None:
    """Peak bytes of a training step."""
    return peak_bytes(step, device) if device == "cuda" else tensor_peak_bytes(step)


def traffic_of(network: Network, session: Session) -> dict[str, dict[str, float]]:
    """For each form, of forward, backward and inference: maps moved a convolution, their bytes, and kernels.

    In 2D on a map of a quarter of the sides: the maps are the same ones. The channels stay, because which
    kernel PyTorch takes for a convolution depends on them.
    """
    torch.manual_seed(0)
    small = replace(network, size=tuple(s // (4 if network.dims == 2 else 1) for s in network.size))
    model = small.build().to(session.device)
    image = torch.randn(1, 1, *small.size).to(session.device)
    rows = one_hot(1, session.device)
    ours = twin(model).to(session.device)
    forms: dict[str, tuple[nn.Module, str | None]] = {
        name: (small.build(form).to(session.device), None) for name, form in FORMS
    }
    for name in providers.backends(session.device)[0]:
        forms[f"fastfilm-{name}"] = (ours, name)
    convolutions = sum(isinstance(m, nn.Conv2d | nn.Conv3d) for m in model.modules())
    found: dict[str, dict[str, float]] = {}
    for name, (net, backend) in forms.items():
        with fastfilm.backend(backend):
            launches = traffic.of_step(net, image, rows)
        found[name] = {}
        for mode, kernels in launches.items():
            found[name] |= {
                f"{mode}_passes": sum(k.passes for k in kernels) / convolutions,
                f"{mode}_bytes": sum(k.bytes for k in kernels),
                f"{mode}_launches": len(kernels),
            }
    return found


MOST_PASSES = {"forward": 3.2, "backward": 10.5}
"""Maps that the CUDA kernels may move a convolution."""


def emulated(session: Session, case: Case) -> None:
    """A row for the CUDA kernels on the host, where a compiler is: which kernels run, and what they move."""
    name = "fastfilm-cuda-emulated"
    if (
        bounded(session)
        or emulation.compiler() is None
        or importlib.util.find_spec("triton") is None
    ):
        session.skip(case, name, "needs a C++ compiler, Triton and a run without an end in time")
        return
    session.say("memory: building the CUDA kernels for the host")
    with tempfile.TemporaryDirectory() as folder:
        found = emulated_passes.counted(Path(folder))
    text = " + ".join(f"{found[mode]['passes']:.2f}" for mode in MOST_PASSES)
    row = session.row(case, name, note=f"{text} passes a convolution, bfloat16")
    for mode, counts in found.items():
        row.extra |= {f"{mode}_{what}": value for what, value in counts.items()}
    over = [m for m, most in MOST_PASSES.items() if not found[m]["passes"] <= most]
    if over:
        row.status = FAILED
        row.note = f"{row.note}; at most {MOST_PASSES} allowed"
    session.record.add(row)


def count(session: Session, limit: Limit, case: Case) -> None:
    """One forward pass of each form, float32, with saved-tensor hooks."""
    torch.manual_seed(0)
    network = limit.network
    session.say(f"memory: {network.case}")
    image = torch.randn(1, 1, *network.size).to(session.device)
    batch = (image, one_hot(1, session.device), image)
    passes = traffic_of(network, session)
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
    peaks = {}
    if not bounded(session):
        again = step(checkpointed(network.build().to(session.device), real=True), *batch)
        for name, one in (counted | {"eager-checkpointed": again}).items():
            session.say(f"memory: {network.case}, a step of {name}")
            peaks[name] = peak(one, session.device)
    checkpointed(counted["eager"].model)
    kept["eager-checkpointed"] = counted["eager"].saved()
    for name, bytes_kept in kept.items():
        part = bytes_kept / eager_bytes
        row = session.row(case, name, saved_bytes=bytes_kept, note=f"{part:.2f} of eager's")
        row.extra["saved_ratio"] = part
        row.peak_bytes = peaks.get(name)
        row.extra |= passes.get(name, {})
        if name in passes:
            text = " + ".join(f"{passes[name][f'{m}_passes']:.1f}" for m in ("forward", "backward"))
            row.note = f"{row.note}; {text} passes a convolution"
        if name.startswith("fastfilm"):
            out = counted[name].forward()
            row.extra["max_abs_diff"] = float((out - expected).detach().abs().max())
            if name != "fastfilm-reference" and not bytes_kept <= limit.mib * 2**20:
                row.status = FAILED
                row.note = f"{row.note}; at most {limit.mib:g} MiB allowed"
        session.record.add(row)
    for name, reason in missing:
        session.skip(case, f"fastfilm-{name}", reason)
    if limit is LIMITS[0]:
        emulated(session, case)
