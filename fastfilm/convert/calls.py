"""Functions that a rewritten graph calls: blocks and sums with fixed arguments, masks, checkpoints, layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastfilm.ops import add_act, maps
from fastfilm.ops.block import Call, Moving, PreparedWeight, run
from fastfilm.ops.maps import DeferredMap, Map
from fastfilm.ops.spec import Geometry, Options, TailTensors

_WEIGHTS = 16
"""Weights of which one block keeps prepared forms."""


class Block:
    """One group as a function of its tensors, in the order of ``conv_norm_film``.

    Args:
        geometry: of the convolution; None: the group is one of an existing map.
        deferred: what it gives is handed on unwritten.
        prepares: the weight is a parameter, of which inference may keep a prepared form.
    """

    __name__ = "fastfilm_block"

    def __init__(
        self,
        geometry: Geometry | None,
        options: Options,
        deferred: bool | str = False,
        prepares: bool = False,
    ) -> None:
        self.geometry, self.options = geometry, options
        self.deferred, self.prepares = deferred, prepares
        # one graph may serve several modules, each with its own weight; a prepared weight compares the bytes
        self.prepared: dict[int, PreparedWeight] = {}

    def __call__(
        self,
        x: Map,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        *tensors: Tensor | None,
    ) -> Tensor | DeferredMap:
        """The group's output [N, C, *S], a map for the next call if ``deferred``."""
        kept = None
        if self.prepares and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            kept = self.prepared.get(id(weight))
            if kept is None:
                if len(self.prepared) == _WEIGHTS:
                    self.prepared.clear()
                kept = self.prepared[id(weight)] = PreparedWeight()
        norm_weight, norm_bias, mean, var, *rest = tensors
        tail = TailTensors(mean, var, None, norm_weight, norm_bias, bias, *rest)
        moving, deferred = Moving(momentum), self.deferred
        if self.geometry is None:
            x, deferred = maps.plain(x), bool(deferred)
        return run(x, Call(weight, self.geometry, self.options, tail, moving, deferred, kept))


class Sum:
    """activation(x + residual) in one pass.

    Args:
        activation: of the sum; "none" for none.
        slope: its number.
    """

    __name__ = "fastfilm_sum"

    def __init__(self, activation: str, slope: float | None) -> None:
        self.activation, self.slope = activation, slope

    def __call__(self, x: Map, residual: Map, slope: Tensor | None = None) -> Tensor:
        return add_act(x, residual, self.activation, self.slope if slope is None else slope)


def draw_channel_mask(x: Map, channels: int, p: float, dtype: torch.dtype) -> Tensor:
    """The mask [N, C] of a channel dropout, divided by 1 − p, drawn as ``F.dropout2d`` draws it.

    Args:
        x: any map of the batch. dtype: of the map that the mask is for.
    """
    keep = 1 - p
    noise = torch.empty((x.shape[0], channels), dtype=dtype, device=x.device)
    noise = noise.bernoulli_(keep).div_(keep)
    return noise if noise.dtype == torch.float64 else noise.float()


def checkpointed(
    body: Callable[..., Any],
    given: Sequence[Any],
    is_input: Sequence[bool],
    options: dict[str, Any],
) -> Any:
    """``torch.utils.checkpoint.checkpoint`` of a body that TorchDynamo made of a function and its closure.

    Args:
        given: arguments of ``body``. is_input: which of them count as inputs; the function closes over the others.
        options: of the original call.
    """

    def again(*inputs: Any) -> Any:
        own = iter(inputs)
        return body(*(next(own) if i else g for g, i in zip(given, is_input, strict=True)))

    inputs = [g for g, i in zip(given, is_input, strict=True) if i]
    return checkpoint(again, *inputs, **options)


def in_layout(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """``x`` with dense memory in which dimension ``order[0]`` is the slowest and ``order[-1]`` the fastest."""
    inverse = [order.index(i) for i in range(len(order))]
    return x.permute(order).contiguous().permute(inverse)
