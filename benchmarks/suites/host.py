"""Time of the host for one layer: modules on maps so small that their arithmetic is nothing.

What is left is Python, dispatch and launches: the part of a network's time that no kernel shortens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastfilm

from ..measure.providers import channels_last
from ..measure.session import Case, Provider, Results, Session
from ..subjects.eager_networks import CONV

CHANNELS, BATCH = 8, 2
SIDE = {2: 8, 3: 4}
"""64 voxels: with 8 in 3D the convolution's arithmetic would be two thirds of its time."""

NORMS = {
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
}
MODES = ("inference", "training, forward", "training")


class Eager(nn.Module):
    """Convolution, norm, ReLU and FiLM as PyTorch's modules."""

    def __init__(self, norm: str, dims: int) -> None:
        super().__init__()
        self.conv = CONV[dims](CHANNELS, CHANNELS, 3, padding=1)
        self.norm = NORMS[norm, dims](CHANNELS, affine=True)
        self.act = nn.ReLU()
        self.tail = (None,) * dims

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """[N, C, *S] -> the same shape."""
        v = self.act(self.norm(self.conv(x)))
        return v * gamma[(..., *self.tail)] + beta[(..., *self.tail)]


def _ours(eager: Eager, norm: str, dims: int) -> nn.Module:
    kind = fastfilm.ConvNormFiLM2d if dims == 2 else fastfilm.ConvNormFiLM3d
    block = kind(CHANNELS, CHANNELS, norm=norm, order="conv-norm-act-film")
    with torch.no_grad():
        block.weight.copy_(eager.conv.weight)
        assert block.bias is not None
        block.bias.copy_(eager.conv.bias)
    return block


def run(session: Session) -> None:
    """Every norm, dimension and mode, float32, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for dims in (2, 3):
            for norm in ("batch", "instance"):
                for mode in MODES:
                    if not session.budget.spent():
                        _case(session, norm, dims, mode)
    finally:
        torch.set_num_threads(threads)


def _case(session: Session, norm: str, dims: int, mode: str) -> None:
    torch.manual_seed(0)
    training = mode != "inference"
    eager = Eager(norm, dims).to(session.device).train(training)
    ours = _ours(eager, norm, dims).to(session.device).train(training)
    x = torch.randn(BATCH, CHANNELS, *[SIDE[dims]] * dims, device=session.device)
    gamma, beta = torch.rand(2, BATCH, CHANNELS, device=session.device).unbind()
    layouts = {"eager": x, "eager-channels-last": channels_last(x)}
    candidates: dict[str, Provider] = {}
    for name, image in layouts.items():
        model = copy.deepcopy(eager)
        if name.endswith("last"):
            layout = torch.channels_last if dims == 2 else torch.channels_last_3d
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
        candidates[name] = _provider(model, image, gamma, beta, mode)
    last = layouts["eager-channels-last"]
    candidates["fastfilm"] = _provider(ours, last, gamma, beta, mode)
    if mode != "training":
        deferred = partial(ours, deferred=True)
        candidates["fastfilm-deferred"] = _provider(deferred, last, gamma, beta, mode)

    def truth() -> Results:
        exact = copy.deepcopy(eager).double()
        return [exact(x.double(), gamma.double(), beta.double()).detach()]

    case = Case("host", f"{dims}D {norm}, {CHANNELS} channels, {SIDE[dims]} wide", mode, "float32")
    session.measure(case, candidates, truth)


def _provider(
    model: Callable[..., Any], x: Tensor, gamma: Tensor, beta: Tensor, mode: str
) -> Provider:
    leaves = [t.detach().requires_grad_(mode != "inference") for t in (x, gamma, beta)]
    upstream = torch.ones_like(x)

    def call() -> Results:
        with torch.set_grad_enabled(mode != "inference"):
            out = model(*leaves)
        if mode == "training":
            torch.autograd.backward(out, upstream)
        return [None]

    def check() -> Results:
        with torch.no_grad():
            out = model(*leaves)
        return [out if isinstance(out, Tensor) else out.tensor()]

    return Provider(call, check=check)
