"""Passes of the C++ kernels over channels-last maps in host memory: affine, moments and residual sums.

``interface.Kernels`` says what each takes and gives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import Addends

# imported after torch, the extension finds torch's OpenMP runtime loaded and asks it for its places
from ..arguments import addresses
from . import _C
from .arguments import FORMATS, call_of, feature_map, map_like, numbers_of


def apply(y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
    """``Kernels.apply``."""
    y = feature_map("y", y)
    coef = numbers_of("coef", coef, y, 7, y.shape[0], y.shape[1])
    v = y if in_place else torch.empty_like(y, memory_format=FORMATS[y.dim()])
    _C.apply(y.data_ptr(), coef.data_ptr(), v.data_ptr(), *call_of(y, act))
    return v


def apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """``Kernels.apply_backward``."""
    y = feature_map("y", y)
    dv = map_like("dv", dv, y)
    coef = numbers_of("coef", coef, y, 7, y.shape[0], y.shape[1])
    dy = dv if in_place else torch.empty_like(y, memory_format=FORMATS[y.dim()])
    dcoef = torch.empty_like(coef)
    _C.apply_backward(*addresses(dv, y, coef, dy, dcoef), *call_of(y, act))
    return dy, dcoef


def moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """``Kernels.moments``."""
    y = feature_map("y", y)
    if pre is not None:
        pre = numbers_of("pre", pre, y, 2, y.shape[1])
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    stats = torch.empty((2, y.shape[0], y.shape[1]), dtype=dtype)
    _C.moments(
        y.data_ptr(), 0 if pre is None else pre.data_ptr(), stats.data_ptr(), *call_of(y, act)
    )
    return stats


def moments_backward(
    dy: Tensor | None, dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None]:
    """``Kernels.moments_backward``."""
    y = feature_map("y", y)
    if dy is not None:
        dy = map_like("dy", dy, y)
    dstats = numbers_of("dstats", dstats, y, 2, y.shape[0], y.shape[1])
    stats = numbers_of("stats", stats, y, 2, y.shape[0], y.shape[1])
    dpre = None
    if pre is not None:
        pre = numbers_of("pre", pre, y, 2, y.shape[1])
        dpre = torch.empty_like(pre)
    e = torch.empty_like(y, memory_format=FORMATS[y.dim()])
    _C.moments_backward(*addresses(dy, dstats, y, stats, pre, e, dpre), *call_of(y, act))
    return e, dpre


def residual(addends: Addends) -> Tensor:
    """``Kernels.residual``."""
    read, (y, *_), (inside, call) = _addends(addends)
    v = torch.empty_like(y, memory_format=FORMATS[y.dim()])
    _C.residual(*addresses(*read), *(inside, v.data_ptr(), *call))
    return v


def residual_backward(
    dv: Tensor, addends: Addends, at_other: bool = True
) -> tuple[Tensor | None, ...]:
    """``Kernels.residual_backward``."""
    read, (y, coef, other_coef, slope), (inside, call) = _addends(addends)
    dv = map_like("dv", dv, y)
    dy = torch.empty_like(y, memory_format=FORMATS[y.dim()])
    dother = torch.empty_like(dy) if at_other else None
    dcoef, dother_coef = (None if c is None else torch.empty_like(c) for c in (coef, other_coef))
    dslope = None if slope is None else torch.empty(y.shape[:2], dtype=slope.dtype)
    made = addresses(dy, dcoef, dother, dother_coef, dslope)
    _C.residual_backward(*addresses(dv, *read), *(inside, *made, *call))
    return dy, dcoef, dother, dother_coef, None if dslope is None else dslope.sum(0)


def _addends(addends: Addends) -> tuple[list[Any], tuple[Any, ...], tuple[bool, tuple[Any, ...]]]:
    """The kernels' arguments in their order; y and the numbers; the result of ``_side``."""
    y = feature_map("y", addends.y)
    other = map_like("other", addends.other, y)
    n, c = y.shape[:2]
    coef, other_coef = (
        None if t is None else numbers_of("coef", t, y, 7, n, c)
        for t in (addends.coef, addends.other_coef)
    )
    slope = None if addends.slope is None else numbers_of("slope", addends.slope, y, c)
    read = [y, coef, other, other_coef, slope]
    return read, (y, coef, other_coef, slope), _side(y, addends.act, addends.outer)


def _side(y: Tensor, act: str, outer: str) -> tuple[bool, tuple[int, ...]]:
    """Whether the activation is that of the sum, and the trailing arguments."""
    if act != "none" and outer != "none":
        raise ValueError(f"act or outer must be 'none', got {act!r} and {outer!r}")
    return act == "none", call_of(y, outer if act == "none" else act)
