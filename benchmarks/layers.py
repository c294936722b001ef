"""One layer as it runs inside a network: its input pending, its output left pending."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

import fastfilm
from fastfilm.ops import backends, spec

from .blocks import SLOPE, Block, Tensors, make
from .graphs import CaptureFailed, capture
from .roofline import DTYPES

Scope = Callable[[], AbstractContextManager[object]]

STAGES = ("prologue", "moments", "film")
"""What a variant of a layer may leave out: the pending affine of its input, its norm's statistics, its FiLM."""


def steady(call: Callable[[], object], device: str) -> tuple[Callable[[], object], str]:
    """A call whose time is the device's alone, and how: replayed from a CUDA graph, or as it is.

    On a GPU the host needs longer to launch a small layer than the device to run it.
    """
    if device != "cuda":
        return call, "call"
    try:
        return capture(call).replay, "graph"
    except CaptureFailed:
        return call, "call"


class LayerStep:
    """A layer's forward pass (inference) or forward and backward pass (training), ready to be timed.

    In training an affine and an activation are pending on the input, and on the output: what is timed is what the
    layer adds to a step of its network.

    Args:
        block: layer, batch, norm, activation and order.
        scope: context in which every call runs (a forced backend).
        without: stages to leave out, of ``STAGES``: the difference to the whole layer is their time.
    """

    def __init__(
        self,
        block: Block,
        device: str,
        dtype: str,
        mode: str,
        scope: Scope = contextlib.nullcontext,
        without: tuple[str, ...] = (),
    ) -> None:
        unknown = set(without) - set(STAGES)
        if unknown:
            raise ValueError(f"without must be of {', '.join(STAGES)}, got {sorted(unknown)}")
        self.block, self.training, self.scope, self.without = (
            block,
            mode == "training",
            scope,
            without,
        )
        storage = DTYPES[dtype]
        self.t: Tensors = make(block, device, storage).to(
            storage, "channels-last", grad=self.training
        )
        n, ci = block.batch, block.layer.cin
        coef = torch.zeros(spec.COEF_ROWS, n, ci, device=device)
        coef[[spec.A, spec.G]] = 1.0
        coef[spec.A] += 0.1 * torch.randn(n, ci, device=device)
        coef[spec.B] = 0.1
        if block.act == "leaky_relu":
            coef[spec.SLOPE] = SLOPE
        self.coef = coef.requires_grad_(self.training)
        co = block.layer.cout
        self.running = torch.zeros(co, device=device), torch.ones(co, device=device)
        self.upstream: tuple[Tensor, ...] | None = None

    def _input(self) -> object:
        first = not self.block.layer.input_grad
        if not self.training or first or "prologue" in self.without:
            return self.t.x
        device, dtype = self.t.x.device.type, self.t.x.dtype
        one = (1,) * len(self.block.layer.size)
        with self.scope():
            plan = backends.choose(backends.Request(device, dtype, len(one), one, one, one))
        return fastfilm.DeferredMap(self.t.x, self.coef, self.block.act, plan)

    def forward(self) -> tuple[Tensor, ...]:
        """The output, or the raw output and what is pending on it."""
        b, t, layer = self.block, self.t, self.block.layer
        norm = None if "moments" in self.without else b.norm
        film = "film" not in self.without
        running = self.running if norm == "batch" and not self.training else (None, None)
        with self.scope(), torch.set_grad_enabled(self.training):
            out = fastfilm.conv_norm_film(
                self._input(),  # type: ignore[arg-type]
                t.weight,
                t.bias,
                stride=layer.stride,
                padding=0 if layer.transposed else (layer.kernel - 1) // 2,
                transposed=layer.transposed,
                norm=norm,
                norm_weight=t.norm_weight if norm else None,
                norm_bias=t.norm_bias if norm else None,
                running_mean=running[0],
                running_var=running[1],
                num_groups=8 if norm == "group" else None,
                training=self.training,
                activation=b.act,
                slope=SLOPE if b.act == "leaky_relu" else None,
                gamma=t.gamma if film else None,
                beta=t.beta if film else None,
                order=b.order,
                deferred=self.training,
            )
        if isinstance(out, Tensor):
            return (out,)
        assert isinstance(out, fastfilm.DeferredMap)
        return (out.raw,) if out.coef is None else (out.raw, out.coef)

    def __call__(self) -> list[Tensor | None]:
        """The output, or the output and the gradients."""
        out = self.forward()
        if not self.training:
            return list(out)
        if self.upstream is None:
            self.upstream = tuple(torch.randn_like(o) for o in out)
        leaves = [leaf for leaf in (*self.t.leaves(), self.coef) if leaf.requires_grad]
        with self.scope():
            grads = torch.autograd.grad(out, leaves, self.upstream, allow_unused=True)
        return [*(o.detach() for o in out), *grads]
