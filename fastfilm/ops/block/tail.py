"""The part of a block behind its convolution: bias, moments, coefficients, or all of it in eager PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..spec import Kind, NormInput, Plan, TailTensors, accumulate_dtype


class Moving(NamedTuple):
    """The update of running statistics: ``momentum``, and the processes that share a batch norm's batch."""

    momentum: float = 0.0
    group: dist.ProcessGroup | None = None


_RAW = NormInput()


def prepared(
    kind: Kind, plan: Plan, tensors: TailTensors, raw: Tensor
) -> tuple[Tensor | None, NormInput | None, TailTensors]:
    """The bias that the convolution adds, what the norm's moments see of y, and the tensors of the coefficients.

    The moments are None where the norm takes none. Where the plan's convolutions add no bias it is there for its
    gradient alone, which the operator gives.

    Args:
        raw: a tensor on the map's device and of its type.
    """
    if not kind.activation_first and (tensors.bias is None or kind.norm != "none"):
        # the norm sees the raw map, and the bias is pending behind it
        return None, _RAW if kind.uses_input else None, tensors
    tensors = widened(kind, tensors)
    added, rest = _split(kind, plan, tensors.bias, raw)
    tensors = tensors._replace(bias=rest)
    return added, norm_input(kind, tensors, raw, added is not None), tensors


def widened(kind: Kind, tensors: TailTensors) -> TailTensors:
    """``tensors`` with a learned slope in the coefficients' type, where moments and coefficients both take it.

    The gradients by both ways may nearly cancel, and must not be rounded to the parameter's type before they are
    added.
    """
    slope = tensors.slope
    if slope is None or not kind.activation_first:
        return tensors
    return tensors._replace(slope=slope.to(torch.float64 if kind.wide else torch.float32))


def _split(
    kind: Kind, plan: Plan, bias: Tensor | None, raw: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The part of a bias [Co] that is added before the map is rounded, and the part that the coefficients add."""
    if bias is None:
        return None, None
    sees_bias = kind.activation_first and kind.uses_input
    if not plan.adds_bias:
        return (bias.to(raw.dtype), bias.detach()) if sees_bias else (None, bias)
    # added before the raw map is rounded, where a sum near 0 must keep its sign
    added = bias.to(raw.dtype)
    exact = added.dtype == bias.dtype
    if sees_bias:
        # the operator gives the bias its gradient; the coefficients add the part that rounding took
        return added, None if exact else (bias.to(accumulate_dtype(raw)) - added).detach()
    # the bias gets its gradient with the coefficients
    added = added.detach()
    if exact and not torch.is_grad_enabled():
        return added, None
    return added, bias.to(accumulate_dtype(raw)) - added


def norm_input(
    kind: Kind, tensors: TailTensors, like: Tensor, biased: bool = False
) -> NormInput | None:
    """The input of the norm's moments, from a raw map; None where the norm takes none.

    Args:
        tensors: ``bias`` is what the map lacks of the convolution's.
        biased: the map has a bias already, whose gradient comes with the shift's.
    """
    if not kind.uses_input:
        return None
    act, shift, slope = kind.pre_activation, tensors.bias, tensors.slope
    if not kind.activation_first or (act == "none" and shift is None and not biased):
        return NormInput(None, act)
    about: dict[str, Any] = {"dtype": accumulate_dtype(like), "device": like.device}
    if shift is None and slope is None and kind.slope == 0.0:
        return NormInput(torch.zeros((2, kind.channels), **about), act)
    first = torch.zeros(kind.channels, **about) if shift is None else shift.to(about["dtype"])
    if slope is None:
        second = torch.full((kind.channels,), kind.slope, **about)
    else:
        second = slope.to(about["dtype"]).expand(kind.channels)
    return NormInput(torch.stack([first, second]), act)


def eager(kind: Kind, tensors: TailTensors, y: Tensor, moving: Moving) -> Tensor:
    """All of the block behind its convolution, on ``y`` (which has the bias), step by step in PyTorch."""
    if moving.group is not None and kind.norm == "batch" and kind.uses_input:
        given = tensors._replace(bias=None)
        seen = norm_input(kind, given, y) or _RAW
        given = given._replace(stats=reference.moments(y, *seen))
        coef = reference.of_block(kind, given, y.device, *moving)
        return reference.materialise(y, coef, kind.activation)
    return reference.block_tail(y, kind, tensors, moving.momentum)
