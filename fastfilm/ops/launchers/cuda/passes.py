"""Passes of the CUDA kernels over channels-last maps in GPU memory: affine and moments.

``interface.Kernels`` says what each takes and gives. Each map is read and written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import activation_code, addresses
from . import _CUDA
from .arguments import DTYPES, empty_map, feature_map, numbers, on_device, stream_of


def _call(y: Tensor, act: str) -> tuple[int, ...]:
    """Trailing arguments of a pass: dtype, activation, N, S, C, stream."""
    n, c = y.shape[:2]
    return DTYPES[y.dtype], activation_code(act), n, y[0, 0].numel(), c, stream_of(y)


def _workspace(y: Tensor) -> Tensor:
    n, c = y.shape[:2]
    count = _CUDA.reduction_workspace(DTYPES[y.dtype], n, y[0, 0].numel(), c)
    return torch.empty(count, dtype=torch.float32, device=y.device)


def apply(y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
    """``Kernels.apply``."""
    y = feature_map("y", y)
    coef = numbers("coef", coef, 7, *y.shape[:2])
    v = y if in_place else empty_map(y)
    with on_device(y):
        _CUDA.apply(*addresses(y, coef, v), *_call(y, act))
    return v


def apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """``Kernels.apply_backward``."""
    y, dv = feature_map("y", y), feature_map("dv", dv, y)
    coef = numbers("coef", coef, 7, *y.shape[:2])
    dy = dv if in_place else empty_map(y)
    dcoef, work = torch.empty_like(coef), _workspace(y)
    with on_device(y):
        _CUDA.apply_backward(*addresses(dv, y, coef, dy, dcoef, work), *_call(y, act))
    return dy, dcoef


def coefficients_backward(dv: Tensor, y: Tensor, coef: Tensor, act: str) -> Tensor:
    """Gradient of ``apply`` at ``coef`` alone, [7, N, C]."""
    y, dv = feature_map("y", y), feature_map("dv", dv, y)
    coef = numbers("coef", coef, 7, *y.shape[:2])
    dcoef, work = torch.empty_like(coef), _workspace(y)
    with on_device(y):
        _CUDA.apply_backward(*addresses(dv, y, coef, None, dcoef, work), *_call(y, act))
    return dcoef


def moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """``Kernels.moments``."""
    y = feature_map("y", y)
    n, c = y.shape[:2]
    pre = None if pre is None else numbers("pre", pre, 2, c)
    stats, work = torch.empty((2, n, c), dtype=torch.float32, device=y.device), _workspace(y)
    with on_device(y):
        _CUDA.moments(*addresses(y, pre, stats, work), *_call(y, act))
    return stats


def moments_backward(
    dy: Tensor | None, dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None]:
    """``Kernels.moments_backward``."""
    y = feature_map("y", y)
    n, c = y.shape[:2]
    dy = None if dy is None else feature_map("dy", dy, y)
    dstats, stats = numbers("dstats", dstats, 2, n, c), numbers("stats", stats, 2, n, c)
    pre = None if pre is None else numbers("pre", pre, 2, c)
    dpre = None if pre is None else torch.empty_like(pre)
    e, work = empty_map(y), _workspace(y)
    with on_device(y):
        given = addresses(dy, dstats, y, stats, pre, e, dpre, work)
        _CUDA.moments_backward(*given, *_call(y, act))
    return e, dpre
