"""Whole FiLMed U-Nets on patches of a volume or of the phantom: inference and training step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import fastfilm

from .. import providers, volume
from ..networks import NETWORKS, Network
from ..roofline import DTYPES, work, yardstick
from ..session import Case, Provider, Results, Session
from ..step import Step

METADATA = 3


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


def run(session: Session) -> None:
    """Measures every network in every dtype and mode."""
    if session.volume is None:
        voxels, source = volume.phantom(), volume.phantoms_source()
    else:
        voxels, source = volume.load(session.volume), "volume"
    for network in networks(session):
        torch.manual_seed(0)
        if network.dims == 2:
            image = volume.slices(voxels, network.batch, (network.size[0], network.size[1]))
        else:
            x, y, z = network.size
            image = volume.patches(voxels, network.batch, (x, y, z))
        image = image.to(session.device)
        model = network.build().to(session.device)
        initialise(model)
        with torch.no_grad():  # running statistics that are not those of a fresh network
            model.train()(image, one_hot(network.batch, session.device))
        for dtype in session.dtypes:
            for mode in ("inference", "training"):
                if session.budget.spent():
                    return
                _case(session, network, model, image, dtype, mode, source)


def _case(
    session: Session,
    network: Network,
    model: nn.Module,
    image: Tensor,
    dtype: str,
    mode: str,
    source: str,
) -> None:
    layers = network.layers()
    case = Case(
        "model",
        network.case,
        mode,
        dtype,
        work(layers.elements(), network.batch, dtype, mode, session.ceilings),
        {"filters": network.widths[0], "depth": len(network.widths), "image": source},
    )
    metadata = one_hot(network.batch, session.device)
    upstream = torch.randn(network.batch, network.classes, *network.size).to(session.device)
    batch = (image, metadata, upstream)
    step = partial(Step, mode=mode, dtype=dtype)
    names = [n for n, _ in model.named_parameters()]
    expanded = network.build("expanded").to(session.device)
    expanded.load_state_dict(model.state_dict())
    make = partial(step, model, *batch, layout="channels-last")
    candidates: dict[str, Provider] = {
        "eager": step(model, *batch).provider(names),
        "eager-channels-last": make().provider(names),
        "paper": step(expanded, *batch).provider(names),
    }
    skipped = compile_into(session, candidates, make, names)
    usable, missing = providers.backends(session.device)
    skipped += [(f"fastfilm-{name}", reason) for name, reason in missing]
    ours = twin(model).to(session.device)
    if session.device == "cuda":
        # the automatic choice, which may mix backends and routes
        candidates["fastfilm"] = step(ours, *batch, layout="channels-last").provider(names)
    for name in usable:
        scope = partial(fastfilm.backend, name)
        candidates[f"fastfilm-{name}"] = step(
            ours, *batch, layout="channels-last", scope=scope
        ).provider(names)
    session.measure(case, candidates, partial(truth, model, batch, mode, dtype, names), pooled=True)
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
    session: Session, candidates: dict[str, Provider], make: partial[Step], names: list[str] | None
) -> list[tuple[str, str]]:
    """Adds the compiled variants of a step to ``candidates``; (name, reason) of the others."""
    skipped = []
    for name, kind in providers.compile_modes(session.device).items():
        reason = providers.why_not_compile(session.device, session.quick)
        reason = reason or session.why_not(name)
        if name in session.slow_to_compile:
            reason = "not tried again: an earlier case took too long to compile"
        if reason is None:
            step = make()

            def first(function: object, step: Step = step) -> None:
                step.call = function  # type: ignore[assignment]
                step()

            session.say(f"compiling for {name}")
            seconds = min(session.compile_seconds, session.budget.left())
            function, reason = providers.compiled(step.model, kind, first, seconds)
            if function is not None:
                candidates[name] = step.provider(names)
                continue
            if "took longer" in reason:
                session.slow_to_compile.add(name)
        skipped.append((name, reason))
    return skipped
