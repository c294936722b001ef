"""Residual addition: the sum of two maps with what is pending on them, and its activation, in one pass each way.

    v = outer(M(y; coef, act) + M(other; other_coef); slope)

M is ``materialise``. One of act and outer is none: where a block has both, its map is written first. Kept for the
backward pass are the raw maps alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import choice, reference, spec
from ..operators.residual import eager_residual
from ..spec import Plan, accumulate_dtype, capture, direct, subclasses
from . import deferred
from .deferred import DeferredMap, Map, plain


@subclasses.unwrapping
def add_act(
    x: Map,
    residual: Map,
    activation: str | None = None,
    slope: float | Tensor | None = None,
) -> Tensor:
    """activation(x + residual), as the end of a residual block (He et al. 2016), in one pass over each map.

    Args:
        x, residual: feature maps [N, C, *S] of one shape, each a tensor or a map with something pending.
        activation: None or a member of ``spec.ACTIVATIONS``, of the sum.
        slope: its parameter: a number, or a tensor [1] or [C].

    Returns:
        [N, C, *S], channels-last where a kernel wrote it.

    Raises:
        TypeError: no feature maps. ValueError: another shape or device, an unknown activation, a bad slope.

    Example:
        >>> import torch, fastfilm
        >>> block = fastfilm.ConvNormFiLM2d(4, 4, norm="instance", activation=None)
        >>> x = torch.randn(2, 4, 8, 8)
        >>> fastfilm.ops.add_act(block(x, deferred=True), x, "relu").shape
        torch.Size([2, 4, 8, 8])
    """
    for name, value in (("x", x), ("residual", residual)):
        if not isinstance(value, (Tensor, deferred.Lazy)):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if x.shape != residual.shape:
        raise ValueError(
            f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if x.device != residual.device:
        raise ValueError(f"residual is on {residual.device} but x is on {x.device}")
    outer = spec.choice("activation", activation, spec.ACTIVATIONS)
    number = spec.check_slope(outer, slope, x.shape[1])
    first, second = _summand(x), _summand(residual)
    if first.act == "none" and second.act != "none":
        first, second = second, first
    if second.act != "none":
        second = _written(second)
    if first.act != "none" and outer != "none":
        first = _written(first)
    raw, other = first.raw, second.raw
    plan = _plan(first, second)
    if plan is None:
        total = plain(x) + plain(residual)
        if isinstance(slope, Tensor):
            return reference.activation(
                total, outer, reference.spread(slope.to(total.dtype), total.dim())
            )
        return reference.activation(total, outer, number)
    parameter = None
    if outer in spec.DEFAULT_SLOPE:
        dtype = accumulate_dtype(raw)
        if isinstance(slope, Tensor):
            parameter = slope.to(dtype).expand(raw.shape[1])
        else:
            parameter = _slope(number, raw.shape[1], dtype, raw)
    plain_ones = direct(raw, other, first.coef, second.coef, parameter)
    op = eager_residual if plain_ones else torch.ops.fastfilm.residual
    sides = raw, first.coef, first.act, other, second.coef
    v: Tensor = op(*sides, parameter, outer, str(plan))
    return v


def _summand(x: Map) -> DeferredMap:
    """``x`` as a map without a view; nothing is pending on a tensor."""
    if isinstance(x, DeferredMap) and x.view is None and x._tensor is None:
        return x
    return DeferredMap(plain(x), None, "none", None)


def _written(x: DeferredMap) -> DeferredMap:
    return DeferredMap(x.tensor(), None, "none", None)


def _plan(first: DeferredMap, second: DeferredMap) -> Plan | None:
    """The plan whose kernels add these; None where PyTorch does."""
    raw, other = first.raw, second.raw
    if raw.dtype != other.dtype or raw.dim() not in (4, 5) or raw.numel() == 0:
        return None
    if raw.dtype not in spec.FLOAT_DTYPES:
        return None
    plan = first.plan or second.plan or choice.for_pass(raw)
    return None if plan.route == "eager" else plan


def _slope(value: float, channels: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    if direct(like) and not torch.is_inference_mode_enabled() and not capture.capturing():
        return _kept_slope(value, channels, dtype, str(like.device))
    return torch.full((channels,), value, dtype=dtype, device=like.device)


@functools.lru_cache(maxsize=256)
def _kept_slope(value: float, channels: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.full((channels,), value, dtype=dtype, device=device)


class Sum(deferred.Lazy):
    """The sum of two maps before it is written: an activation of it joins in."""

    def __init__(self, x: DeferredMap, residual: Tensor | DeferredMap) -> None:
        self.x, self.residual = x, residual
        self._like = x
        self.origin = subclasses.among((x, residual))

    def _write(self) -> Tensor:
        return add_act(self.x, subclasses.stripped(self.residual))

    def __repr__(self) -> str:
        return f"Sum({tuple(self.shape)}, {self.dtype})"


def _add(x: Any, other: Any, **options: Any) -> Sum | None:
    if options or not isinstance(other, (Tensor, DeferredMap)):
        return None
    if not isinstance(x, DeferredMap):
        x, other = other, x
    if not isinstance(x, DeferredMap) or not isinstance(other, (Tensor, DeferredMap)):
        return None
    same = x.shape == other.shape and x.dtype == other.dtype and x.device == other.device
    written = x.view is not None or x._tensor is not None or not deferred.deferrable(x.raw, x.plan)
    return None if written or not same else Sum(x, other)


def _activated(name: str, parameter: str = "") -> Callable[..., Tensor | None]:
    def activate(x: Any, *given: Any, **options: Any) -> Tensor | None:
        options.pop("inplace", None)
        if given and parameter:
            options[parameter] = given[0]
        if not isinstance(x, Sum) or x._tensor is not None or set(options) - {parameter}:
            return None
        return add_act(x.x, x.residual, name, options.get(parameter))

    return activate


def _gelu(x: Any, approximate: str = "none") -> Tensor | None:
    if not isinstance(x, Sum) or x._tensor is not None:
        return None
    return add_act(x.x, x.residual, "gelu_tanh" if approximate == "tanh" else "gelu")


deferred.defer(_add, torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
deferred.defer(_activated("relu"), F.relu, torch.relu, torch.relu_)
deferred.defer(_activated("leaky_relu", "negative_slope"), F.leaky_relu)
deferred.defer(_activated("elu", "alpha"), F.elu)
deferred.defer(_activated("silu"), F.silu)
deferred.defer(_activated("prelu", "weight"), F.prelu, torch.prelu)
deferred.defer(_gelu, F.gelu)
