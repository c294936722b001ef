"""nnU-Net's and MONAI's networks as they ship, and after ``fastfilm.convert``: inference and training step.

Where a package is not installed, the same network in plain PyTorch (``networks.py``) stands for it, and the row
says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

import fastfilm

from ..counted.inside import float32_products
from ..counted.roofline import check_is_small, work
from ..measure.record import NO_TIME
from ..measure.session import Case, Provider, Session
from ..subjects.networks import NETWORKS, Network
from ..subjects.step import Batch, Step
from .model import SMALL_NOTE, compile_into, truth

COMPILED = {"compile-contiguous": None}
"""nnU-Net's own default: the contiguous network compiled."""

MODES = ("training", "inference")
STAGED = [n for n in NETWORKS if n.kind in ("resenc", "dynunet")]


class Unconditioned(nn.Module):
    """A network without metadata, called as the conditioned ones are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, metadata: Tensor | None = None) -> Tensor:
        """Its output; the first one of several."""
        out = self.network(image)
        return out[0] if isinstance(out, (list, tuple)) else out


def _resenc(n: Network) -> nn.Module:
    architectures = importlib.import_module("dynamic_network_architectures.architectures.unet")
    stages = len(n.widths)
    made: nn.Module = architectures.ResidualEncoderUNet(
        n.channels,
        stages,
        n.widths,
        nn.Conv3d,
        3,
        [1] + [2] * (stages - 1),
        n.blocks,
        n.classes,
        [1] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return made


def _dynunet(n: Network) -> nn.Module:
    nets = importlib.import_module("monai.networks.nets")
    stages = len(n.widths)
    strides = [1] + [2] * (stages - 1)
    made: nn.Module = nets.DynUNet(
        3, n.channels, n.classes, [3] * stages, strides, strides[1:], filters=n.widths
    )
    return made


PACKAGES: dict[str, tuple[str, Callable[[Network], nn.Module]]] = {
    "resenc": ("dynamic-network-architectures", _resenc),
    "dynunet": ("MONAI", _dynunet),
}


def build(network: Network) -> tuple[nn.Module, str]:
    """The network as its package makes it, or in plain PyTorch; and which of them it is."""
    package, make = PACKAGES[network.kind]
    try:
        return Unconditioned(make(network)), f"as {package} ships it"
    except ImportError:
        return network.build(), f"in plain PyTorch: {package} is not installed"


def networks(session: Session) -> list[Network]:
    """At their usual patch; on a CPU tiny ones."""
    if session.device == "cuda":
        return STAGED
    widths = (4, 8, 16) if session.quick else (16, 32, 64)
    few = [
        replace(n, widths=widths, batch=1, size=(16,) * 3 if session.quick else (32,) * 3)
        for n in STAGED
    ]
    return [replace(n, blocks=None if n.blocks is None else n.blocks[: len(widths)]) for n in few]


def run(session: Session) -> None:
    """Every network in every mode, the 16-bit types first."""
    for network in networks(session):
        torch.manual_seed(0)
        model, origin = build(network)
        model = model.to(session.device)
        for dtype in session.dtypes:
            for mode in MODES:
                _case(session, network, model, origin, dtype, mode)


def _case(
    session: Session, network: Network, model: nn.Module, origin: str, dtype: str, mode: str
) -> None:
    case = Case(
        "converted",
        network.case,
        mode,
        dtype,
        work(network.layers().elements(), network.batch, dtype, mode, session.ceilings),
        {"origin": origin},
    )
    if session.budget.spent():
        session.skip(case, "all", NO_TIME)
        return
    batch = on = _batch(network, session.device)
    step = partial(Step, mode=mode, dtype=dtype)
    names = [n for n, _ in model.named_parameters()]
    small, notes = None, [origin]
    if check_is_small(session.device, dtype):
        on = small = _batch(network.shrunk(2), session.device)
        notes.append(SMALL_NOTE)
    provider = partial(Step.provider, names=names, small=small)
    ours = fastfilm.convert(model, copy=True, verbose=False)
    candidates: dict[str, Provider] = {
        "eager": provider(step(model, *batch)),
        "eager-channels-last": provider(step(model, *batch, layout="channels-last")),
        "fastfilm": provider(step(ours, *batch, layout="channels-last"), note="; ".join(notes)),
    }
    skipped = []
    if small is None:
        with float32_products(dtype == "tf32"):
            make = partial(step, model, *batch)
            skipped = compile_into(session, candidates, make, names, COMPILED)
    else:
        skipped.append(("compile-contiguous", "its result is not checked at this size in float32"))
    session.measure(case, candidates, partial(truth, model, on, mode, dtype, names), pooled=True)
    for name, reason in skipped:
        session.skip(case, name, reason)


def _batch(network: Network, device: str) -> Batch:
    shape = (network.batch, network.channels, *network.size)
    upstream = torch.randn(network.batch, network.classes, *network.size).to(device)
    return torch.randn(shape).to(device), None, upstream
