"""Whole FiLMed U-Nets on patches of a volume or of the phantom: inference and training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastfilm

from ..counted.inside import float32_products
from ..counted.roofline import DTYPES, check_is_small, work, yardstick
from ..measure import providers, volume
from ..measure.graphs import CaptureFailed
from ..measure.harness import TookTooLong, time_limit, without_search
from ..measure.record import NO_TIME
from ..measure.session import Case, Provider, Results, Session
from ..subjects.networks import NETWORKS, Network
from ..subjects.step import Batch, Step

METADATA = 3
MODES = ("inference", "training")
SMALL_NOTE = "error at half the size, one sample"


def networks(session: Session) -> list[Network]:
    """The networks to run, sized so that a call takes tens of milliseconds."""
    if session.device == "cuda":
        return list(NETWORKS[:2])
    flat, deep = NETWORKS[:2]
    side, cube = (96, 32) if session.quick else (128, 48)
    return [
        replace(flat, batch=2 if session.quick else 4, size=(side, side), widths=(16, 32, 64)),
        replace(deep, batch=2, size=(cube, cube, 16), widths=(8, 16)),
    ]


def one_hot(batch: int, device: str) -> Tensor:
    """Metadata [N, 3] that differs from sample to sample."""
    return torch.eye(METADATA, device=device)[torch.arange(batch) % METADATA]


def twin(model: nn.Module) -> nn.Module:
    """fastfilm's network with the weights of an ``EagerFiLMedUNet``."""
    return fastfilm.FiLMedUNet.from_ivadomed(model.state_dict())


def initialise(model: nn.Module) -> None:
    """He's initialisation, and β near 0: without it the gradient is the noise of dead channels."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.05)
            elif isinstance(module, nn.Linear) and module.in_features == 16:
                module.bias[module.out_features // 2 :] = -2.0


@dataclass(frozen=True)
class Subject:
    """A network with its weights and batches.

    Attributes:
        expanded: the same weights with γ and β repeated to full maps.
        batch: what is timed.
        small: half the size and one sample.
        source: where the images come from.
    """

    network: Network
    model: nn.Module
    expanded: nn.Module
    batch: Batch
    small: Batch
    source: str


def _batch(network: Network, voxels: NDArray[np.float32], device: str) -> Batch:
    if network.dims == 2:
        image = volume.slices(voxels, network.batch, (network.size[0], network.size[1]))
    else:
        x, y, z = network.size
        image = volume.patches(voxels, network.batch, (x, y, z))
    upstream = torch.randn(network.batch, network.classes, *network.size)
    return image.to(device), one_hot(network.batch, device), upstream.to(device)


def subject(session: Session, network: Network) -> Subject:
    """The network on slices or crops of the session's volume."""
    if session.volume is None:
        voxels, source = volume.phantom(), volume.phantoms_source()
    else:
        voxels, source = volume.load(session.volume), "volume"
    torch.manual_seed(0)
    batch = _batch(network, voxels, session.device)
    small = _batch(network.shrunk(2), voxels, session.device)
    model = network.build().to(session.device)
    initialise(model)
    with torch.no_grad(), without_search():  # running statistics not those of a fresh network
        model.train()(*batch[:2])
    expanded = network.build("expanded").to(session.device)
    expanded.load_state_dict(model.state_dict())
    return Subject(network, model, expanded, batch, small, source)


def run(session: Session) -> None:
    """Every network in every dtype and mode; then from CUDA graphs, then compiled."""
    plain(session)
    if session.graphs:
        graphs(session)
    compiled(session)


def _each(
    session: Session, measure: Callable[[Session, Subject, Case], None], who: str = "all"
) -> None:
    """Calls ``measure`` for every dtype, network and mode; names ``who`` where there is no time."""
    subjects: dict[Network, Subject] = {}
    for dtype in session.dtypes:
        for network in networks(session):
            layers = list(network.layers().elements())
            extra = {"filters": network.widths[0], "depth": len(network.widths)}
            for mode in MODES:
                floor = work(layers, network.batch, dtype, mode, session.ceilings)
                case = Case("model", network.case, mode, dtype, floor, dict(extra))
                if session.budget.spent():
                    session.skip(case, who, NO_TIME)
                    continue
                if network not in subjects:
                    subjects[network] = subject(session, network)
                case.extra["image"] = subjects[network].source
                measure(session, subjects[network], case)


def plain(session: Session) -> None:
    """Eager PyTorch, fastfilm, the paper's form, and each backend of fastfilm by itself."""
    _each(session, _plain)


def graphs(session: Session) -> None:
    """Steps replayed from CUDA graphs, timed beside the plain ones."""
    _each(session, _graphs, "graphs")


def compiled(session: Session) -> None:
    """torch.compile, timed beside the plain steps."""
    _each(session, _compiled, "compile")


def _plain(session: Session, subject: Subject, case: Case) -> None:
    model = subject.model
    step = partial(Step, mode=case.mode, dtype=case.dtype)
    names = [n for n, _ in model.named_parameters()]
    on, small, note = subject.batch, None, ""
    if check_is_small(session.device, case.dtype):
        on = small = subject.small
        note = SMALL_NOTE
    provider = partial(Step.provider, names=names, small=small, note=note)
    last = partial(step, layout="channels-last")
    ours = twin(model).to(session.device)
    candidates: dict[str, Provider] = {
        "eager": provider(step(model, *subject.batch)),
        "eager-channels-last": provider(last(model, *subject.batch)),
    }
    if session.device == "cuda":
        # the automatic choice, which may mix backends and routes
        candidates["fastfilm"] = provider(last(ours, *subject.batch))
    candidates["paper"] = provider(step(subject.expanded, *subject.batch))
    usable, missing = providers.backends(session.device)
    for name in usable:
        scope = partial(fastfilm.backend, name)
        candidates[f"fastfilm-{name}"] = provider(last(ours, *subject.batch, scope=scope))
    reference = partial(truth, model, on, case.mode, case.dtype, names)
    session.measure(case, candidates, reference, pooled=True)
    for name, reason in missing:
        session.skip(case, f"fastfilm-{name}", reason)


def _beside(
    session: Session, subject: Subject, case: Case, candidates: dict[str, Provider]
) -> None:
    """Measures further providers of a case; eager is timed once more, so that the ratio is a paired one."""
    if not candidates:
        return
    model, on = subject.model, subject.batch
    step = partial(Step, model, *on, mode=case.mode, dtype=case.dtype)
    names = [n for n, _ in model.named_parameters()]
    eager = {
        "eager": step().provider(names),
        "eager-channels-last": step(layout="channels-last").provider(names),
    }
    reference = None
    if check_is_small(session.device, case.dtype):
        note = "not checked: too large for float64"
        candidates = {n: replace(p, note=note) for n, p in candidates.items()}
    else:
        reference = partial(truth, model, on, case.mode, case.dtype, names)
    session.measure(case, eager | candidates, reference, pooled=True, beside=eager)


def _graphs(session: Session, subject: Subject, case: Case) -> None:
    step = partial(Step, mode=case.mode, dtype=case.dtype, layout="channels-last")
    names = [n for n, _ in subject.model.named_parameters()]
    ours = twin(subject.model).to(session.device)
    candidates = {}
    for name, model in (("eager-channels-last", subject.model), ("fastfilm", ours)):
        if session.budget.spent():
            session.skip(case, f"{name}-graph", NO_TIME)
            continue
        session.running = case, f"{name}-graph"
        try:
            with (
                float32_products(case.dtype == "tf32"),
                time_limit(session.budget.left(), "the capture"),
            ):
                candidates[f"{name}-graph"] = step(model, *subject.batch).captured(names)
        except (CaptureFailed, TookTooLong) as error:
            session.skip(case, f"{name}-graph", f"not captured: {providers.one_line(error)}")
    _beside(session, subject, case, candidates)


def _compiled(session: Session, subject: Subject, case: Case) -> None:
    step = partial(Step, mode=case.mode, dtype=case.dtype, layout="channels-last")
    names = [n for n, _ in subject.model.named_parameters()]
    candidates: dict[str, Provider] = {}
    with float32_products(case.dtype == "tf32"):
        make = partial(step, subject.model, *subject.batch)
        skipped = compile_into(session, candidates, make, names)
    _beside(session, subject, case, candidates)
    for name, reason in skipped:
        session.skip(case, name, reason)


def truth(
    model: nn.Module,
    batch: tuple[Tensor, Tensor | None, Tensor],
    mode: str,
    dtype: str,
    names: list[str],
) -> Results:
    """The network in the yardstick's precision; in inference on rounded weights and image, as the providers."""
    exact = yardstick(batch[0].device.type, dtype)
    image, metadata, upstream = batch
    reference = Step(model, image, metadata, upstream, mode=mode, dtype=exact)
    if mode == "inference":
        storage, wide = DTYPES[dtype], DTYPES[exact]
        reference.model.to(storage).to(wide)
        reference.image = image.to(storage).to(wide)
        if metadata is not None:
            reference.metadata = metadata.to(storage).to(wide)
    return reference.named_results(names)


def compile_into(
    session: Session,
    candidates: dict[str, Provider],
    make: partial[Step],
    names: list[str] | None,
    kinds: Mapping[str, str | None] | None = None,
) -> list[tuple[str, str]]:
    """Adds compiled variants of a step to ``candidates``; (name, reason) of the others.

    Args:
        kinds: provider -> mode of torch.compile; those of the device without it.
    """
    skipped = []
    kinds = providers.compile_modes(session.device) if kinds is None else kinds
    for name, kind in kinds.items():
        reason = session.why_not(name)
        if name in session.slow_to_compile:
            reason = "not tried again: an earlier case took too long to compile"
        if reason is None:
            step = make()
            function, reason = session.compile(name, kind, step.model, step.call_by)
            if function is not None:
                candidates[name] = step.provider(names)
                continue
            if reason.startswith("compiling took longer"):
                session.slow_to_compile.add(name)
        skipped.append((name, reason))
    return skipped
