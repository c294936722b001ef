"""One layer as it runs inside a network: its input pending, its output left pending."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

import fastfilm

from ..counted.deciding_layers import Block
from ..counted.inside import Map, joined, pending, pending_coefficients
from ..counted.roofline import DTYPES
from ..measure.graphs import CaptureFailed, capture
from ..measure.providers import channels_last
from .blocks import SLOPE, Tensors, make

Scope = Callable[[], AbstractContextManager[object]]

STAGES = ("prologue", "moments", "film")
"""What a variant of a layer may leave out: the pending affine of its input, its norm's statistics, its FiLM."""

WANTED = ("input", "weight", "tail")
"""Groups of gradients: of the input and what is pending on it; of weight and bias; of the norm, γ and β."""


def steady(
    call: Callable[..., object], device: str, before: Callable[[], object] | None = None
) -> tuple[Callable[[], object], str]:
    """A call whose time is the device's alone, and how: replayed from a CUDA graph, or as it is.

    On a GPU the host needs longer to launch a small layer than the device to run it.

    Args:
        before: runs once; ``call`` takes its result. Autograd runs a backward pass on the stream of its forward
            pass, so a forward pass that is not to be timed belongs here.
    """
    if device != "cuda":
        return (call if before is None else partial(call, before())), "call"
    try:
        return capture(call, before).replay, "graph"
    except CaptureFailed:
        return (call if before is None else partial(call, before())), "call"


def sources_of(x: Tensor, resized: int) -> list[Tensor]:
    """``x`` [N, C, *S]; or two maps to concatenate: every other place of ``resized`` channels, and the rest."""
    if not resized:
        return [x]
    coarse = (slice(None), slice(resized), *(slice(None, None, 2),) * (x.dim() - 2))
    return [channels_last(t) for t in (x[coarse], x[:, resized:])]


class LayerStep:
    """A layer's forward pass (inference) or forward and backward pass (training), ready to be timed.

    In training an affine and an activation are pending on the input, and on the output: what is timed is what the
    layer adds to a step of its network.

    Args:
        block: layer, batch, norm, activation and order.
        scope: context in which every call runs (a forced backend).
        backward: the same of the gradients alone, where that is another one.
        without: stages to leave out, of ``STAGES``: the difference to the whole layer is their time.
        resized: channels of the input that are a map of half the size, upsampled linearly and concatenated with
            the others, as in a U-Net's decoder.
        wanted: gradients of a training step, of ``WANTED``; everything else is a constant.
    """

    def __init__(
        self,
        block: Block,
        device: str,
        dtype: str,
        mode: str,
        scope: Scope = contextlib.nullcontext,
        without: tuple[str, ...] = (),
        resized: int = 0,
        wanted: tuple[str, ...] = WANTED,
        backward: Scope | None = None,
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
        self.backward = backward or scope
        storage = DTYPES[dtype]
        t = make(block, device, storage).to(storage, "channels-last", grad=False)
        self.t: Tensors = t
        self.raws = sources_of(t.x, resized)
        slope = SLOPE if block.act == "leaky_relu" else None
        self.coefs = [pending_coefficients(raw, slope) for raw in self.raws]
        groups: dict[str, list[Tensor | None]] = {
            "input": [*self.raws, *self.coefs] if block.layer.input_grad else [],
            "weight": [t.weight, t.bias],
            "tail": [t.norm_weight, t.norm_bias, t.gamma, t.beta],
        }
        chosen = [leaf for name in WANTED if name in wanted for leaf in groups[name]]
        self.leaves = [leaf for leaf in chosen if leaf is not None] if self.training else []
        for leaf in self.leaves:
            leaf.requires_grad_()
        co = block.layer.cout
        self.running = torch.zeros(co, device=device), torch.ones(co, device=device)
        self.upstream: tuple[Tensor, ...] | None = None

    def _input(self) -> Map:
        first = not self.block.layer.input_grad
        if not self.training or first or "prologue" in self.without:
            return joined([*self.raws])
        return joined(pending(self.t.x, self.raws, self.coefs, self.block.act))

    def output(self) -> Tensor | fastfilm.DeferredMap:
        """The finished map, or in training the one with what is pending on it."""
        b, t, layer = self.block, self.t, self.block.layer
        norm = None if "moments" in self.without else b.norm
        film = "film" not in self.without
        running = self.running if norm == "batch" and not self.training else (None, None)
        with self.scope(), torch.set_grad_enabled(self.training):
            return fastfilm.conv_norm_film(
                self._input(),
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

    def forward(self) -> tuple[Tensor, ...]:
        """The output, or the raw output and what is pending on it."""
        out = self.output()
        if isinstance(out, Tensor):
            return (out,)
        return (out.raw,) if out.coef is None else (out.raw, out.coef)

    def gradients(self, out: tuple[Tensor, ...], again: bool = True) -> tuple[Tensor | None, ...]:
        """Of what is wanted, from random ones at ``out``, a result of ``forward``.

        Args:
            again: whether there will be another call for the same ``out``.
        """
        if self.upstream is None:
            self.upstream = tuple(torch.randn_like(o) for o in out)
        with self.backward():
            return torch.autograd.grad(
                out, self.leaves, self.upstream, retain_graph=again, allow_unused=True
            )

    def __call__(self) -> list[Tensor | None]:
        """The output, or the output and the gradients."""
        out = self.forward()
        if not self.training:
            return list(out)
        return [*(o.detach() for o in out), *self.gradients(out, again=False)]
