"""What the peers reach today: whole networks, then their layers from the heaviest to the lightest.

Needs no kernel of fastfilm. A layer's convolution is timed alone (forward, dgrad, wgrad), then with
its norm, activation and FiLM (forward, backward).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..counted import roofline
from ..counted.deciding_layers import Block
from ..counted.roofline import DTYPES, Layer, work
from ..measure import providers
from ..measure.harness import Effort
from ..measure.session import Case, Provider, Results, Session
from ..subjects import blocks
from ..subjects.blocks import Tensors
from ..subjects.networks import NETWORKS, Network
from ..subjects.step import Step
from .model import compile_into, one_hot

SHRINK_ON_CPU, SHRINK_QUICK = 4, 8
LAYOUTS = {"eager": "contiguous", "eager-channels-last": "channels-last"}
QUICK_LAYER = Effort(min_rounds=3, max_rounds=9, seconds=0.1, window=1e-3)
KINDS = ("forward", "dgrad", "wgrad")


def networks(session: Session) -> list[Network]:
    """The networks at their usual sizes; on a CPU with batch 1 and small patches."""
    if session.device == "cuda":
        return list(NETWORKS)
    return [n.shrunk(SHRINK_QUICK if session.quick else SHRINK_ON_CPU) for n in NETWORKS]


def ranked(nets: list[Network]) -> list[tuple[Layer, Network, dict[str, int]]]:
    """Distinct layers, the largest share of its network's arithmetic first.

    Returns:
        (layer, the network in which its share is largest, {case of a network: how often}).
    """
    found: dict[tuple[Layer, int, str], dict[str, Any]] = {}
    for net in nets:
        layers = net.layers()
        flops = {
            layer: count * roofline.convolution(layer, net.batch, "float32").flops
            for layer, count in layers.items()
        }
        for layer, count in layers.items():
            entry = found.setdefault(
                (layer, net.batch, net.norm), {"share": 0.0, "net": net, "in": {}}
            )
            share = flops[layer] / sum(flops.values())
            entry["in"][net.case] = count
            if share > entry["share"]:
                entry["share"], entry["net"] = share, net
    order = sorted(found.items(), key=lambda item: -item[1]["share"])
    return [(key[0], entry["net"], entry["in"]) for key, entry in order]


def run(session: Session) -> None:
    """Networks first, then layer by layer, until the time budget is used up."""
    nets = networks(session)
    for dtype in session.dtypes:
        for mode in ("training", "inference"):
            for net in nets:
                if session.budget.spent():
                    return
                _network(session, net, dtype, mode)
    if session.quick:
        session = replace(session, effort=QUICK_LAYER)
    for layer, net, counts in ranked(nets):
        for dtype in session.dtypes:
            _layer(session, layer, net, counts, dtype)
            if session.budget.spent():
                return


def _layer(
    session: Session, layer: Layer, net: Network, counts: dict[str, int], dtype: str
) -> None:
    for kind in KINDS:
        if kind != "dgrad" or layer.input_grad:
            _convolution(session, layer, net, counts, dtype, kind)
    if layer.transposed or layer.kernel == 1 or layer.cout == net.classes:
        return  # no norm behind these
    for mode in ("forward", "backward"):
        if not session.budget.spent():
            _block(session, layer, net, counts, dtype, mode)


def _network(session: Session, net: Network, dtype: str, mode: str) -> None:
    torch.manual_seed(0)
    case = Case(
        "peers",
        net.case,
        mode,
        dtype,
        work(net.layers().elements(), net.batch, dtype, mode, session.ceilings),
        {"kind": "network", "network": net.case, "layers": len(net.layers())},
    )
    image = torch.randn(net.batch, net.channels, *net.size).to(session.device)
    upstream = torch.randn(net.batch, net.classes, *net.size).to(session.device)
    batch = (image, one_hot(net.batch, session.device), upstream)
    model = net.build().to(session.device)
    step = partial(Step, mode=mode, dtype=dtype)
    candidates = {
        name: step(model, *batch, layout=layout).provider() for name, layout in LAYOUTS.items()
    }
    if net.kind == "film":
        expanded = net.build("expanded").to(session.device)
        expanded.load_state_dict(model.state_dict())
        candidates["paper"] = step(expanded, *batch).provider()
    make = partial(step, model, *batch, layout="channels-last")
    skipped = compile_into(session, candidates, make, None)
    session.measure(case, candidates)
    for name, reason in skipped:
        session.skip(case, name, reason)


def _convolution(
    session: Session, layer: Layer, net: Network, counts: dict[str, int], dtype: str, kind: str
) -> None:
    block = Block(layer, net.batch, net.norm, net.act, net.order)
    source = blocks.make(block, session.device, DTYPES[dtype])
    case = _layer_case(session, layer, net, counts, dtype, kind, "convolution")
    candidates = {}
    for name, layout in LAYOUTS.items():
        tensors = source.to(DTYPES[dtype], layout, grad=False)
        candidates[name] = Provider(partial(convolution, layer, tensors, kind))

    def truth() -> Results:
        return convolution(layer, source.to(torch.float64, grad=False), kind)

    session.measure(case, candidates, truth)


def convolution(layer: Layer, t: Tensors, kind: str) -> list[Tensor | None]:
    """The forward pass of a layer's convolution, or one of the two halves of its backward pass."""
    if kind == "forward":
        return [blocks.convolve(layer, t.x, t.weight)]
    dims = len(layer.size)
    padding = 0 if layer.transposed else (layer.kernel - 1) // 2
    mask = [kind == "dgrad", kind == "wgrad", False]
    gradients = torch.ops.aten.convolution_backward(
        t.upstream,
        t.x,
        t.weight,
        None,
        [layer.stride] * dims,
        [padding] * dims,
        [1] * dims,
        layer.transposed,
        [0] * dims,
        1,
        mask,
    )
    return [gradients[0] if kind == "dgrad" else gradients[1]]


def _block(
    session: Session, layer: Layer, net: Network, counts: dict[str, int], dtype: str, mode: str
) -> None:
    block = Block(layer, net.batch, net.norm, net.act, net.order)
    storage = DTYPES[dtype]
    source = blocks.make(block, session.device, storage)
    case = _layer_case(session, layer, net, counts, dtype, mode, "block")
    eager = partial(blocks.eager, block)
    last = source.to(storage, "channels-last")
    plain = source.to(storage)
    candidates = {
        "eager": Provider(half(eager, plain, mode)),
        "eager-channels-last": Provider(half(eager, last, mode)),
        "paper": Provider(half(partial(blocks.eager, block, expanded=True), plain, mode)),
    }
    skipped = []
    for name, kind in providers.compile_modes(session.device).items():
        reason = session.why_not(name)
        if reason is None:
            first = partial(_run_half, t=last, mode=mode)
            function, reason = session.compile(name, kind, eager, first)
            if function is not None:
                candidates[name] = Provider(half(function, last, mode))
                continue
        skipped.append((name, reason))

    def truth() -> Results:
        return half(partial(blocks.definition, block), source.to(torch.float64), mode)()

    session.measure(case, candidates, truth)
    for name, reason in skipped:
        session.skip(case, name, reason)


def half(
    function: Callable[[Tensors], Tensor], t: Tensors, mode: str
) -> Callable[[], list[Tensor | None]]:
    """The forward pass with its graph, or the backward pass alone."""
    if mode == "forward":
        return lambda: [function(t)]
    out = function(t)
    leaves = t.leaves()
    return lambda: list(torch.autograd.grad(out, leaves, t.upstream, retain_graph=True))


def _run_half(function: Callable[[Tensors], Tensor], t: Tensors, mode: str) -> None:
    half(function, t, mode)()


def _layer_case(
    session: Session,
    layer: Layer,
    net: Network,
    counts: dict[str, int],
    dtype: str,
    mode: str,
    kind: str,
) -> Case:
    name = f"{layer.label} b{net.batch}" + (f" {net.norm}" if kind == "block" else "")
    passes = mode if mode == "backward" else "forward"  # a dgrad or a wgrad is one such pass
    extra = {
        "kind": kind,
        "networks": counts,
        "cin": layer.cin,
        "cout": layer.cout,
        "kernel": layer.kernel,
        "stride": layer.stride,
        "size": list(layer.size),
        "transposed": layer.transposed,
    }
    least = work([layer], net.batch, dtype, passes, session.ceilings)
    return Case("peers", name, mode, dtype, least, extra)
