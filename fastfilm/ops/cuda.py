"""Launchers of the CUDA kernels on channels-last maps in GPU memory.

The maths is that of ``reference``; each map is read and written once, sums have one writer a slot.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastfilm import _CUDA

_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "prelu": 2,
    "elu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _map(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` [N, C, *S], checked: its type, its layout and, with ``like``, that map's shape and type."""
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {t.dtype}")
    if t.dim() not in _FORMATS:
        raise ValueError(f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {tuple(t.shape)}")
    if not t.is_contiguous(memory_format=_FORMATS[t.dim()]):
        raise ValueError(
            f"{name} must be dense in channels-last order, got shape {tuple(t.shape)} with strides {t.stride()}"
        )
    if like is not None and (t.shape != like.shape or t.dtype != like.dtype):
        raise ValueError(
            f"{name} must be {tuple(like.shape)} of {like.dtype}, got {tuple(t.shape)} of {t.dtype}"
        )
    return t


def _numbers(name: str, t: Tensor, *shape: int) -> Tensor:
    """``t`` float32 and contiguous; ValueError unless it has ``shape``."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    return t.float().contiguous()


def _code(act: str) -> int:
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, got {act!r}")
    return _ACTIVATIONS[act]


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _guard(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one for a launch."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _call(y: Tensor, act: str) -> tuple[int, ...]:
    """Trailing arguments of a pass: dtype, activation, N, S, C, stream."""
    n, c = y.shape[:2]
    return _DTYPES[y.dtype], _code(act), n, y[0, 0].numel(), c, _stream(y)


def _empty_map(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=_FORMATS[y.dim()])


def _workspace(y: Tensor) -> Tensor:
    n, c = y.shape[:2]
    count = _CUDA.reduction_workspace(_DTYPES[y.dtype], n, y[0, 0].numel(), c)
    return torch.empty(count, dtype=torch.float32, device=y.device)


def apply(y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
    """v = g * (act(a * (y - p) + b; slope) - q) + s.

    Args:
        y: [N, C, *S], channels-last.
        coef: [7, N, C], rows a, b, g, s, p, q, slope.
        act: activation name.
        in_place: overwrite ``y``.

    Returns:
        v [N, C, *S] in y's dtype, channels-last.
    """
    y = _map("y", y)
    coef = _numbers("coef", coef, 7, *y.shape[:2])
    v = y if in_place else _empty_map(y)
    with _guard(y):
        _CUDA.apply(y.data_ptr(), coef.data_ptr(), v.data_ptr(), *_call(y, act))
    return v


def apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``apply`` at ``y`` ([N, C, *S]; in dv's memory if ``in_place``) and at ``coef``."""
    y, dv = _map("y", y), _map("dv", dv, y)
    coef = _numbers("coef", coef, 7, *y.shape[:2])
    dy = dv if in_place else _empty_map(y)
    dcoef, work = torch.empty_like(coef), _workspace(y)
    with _guard(y):
        _CUDA.apply_backward(
            *(t.data_ptr() for t in (dv, y, coef, dy, dcoef, work)), *_call(y, act)
        )
    return dy, dcoef


def moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """Mean and biased variance over space of u = act(y + shift; slope), [2, N, C] float32.

    Args:
        y: [N, C, *S], channels-last.
        pre: [2, C], shift and slope; None: the moments of ``y`` itself, whatever ``act`` is.
        act: activation name.
    """
    y = _map("y", y)
    n, c = y.shape[:2]
    pre = None if pre is None else _numbers("pre", pre, 2, c)
    stats, work = torch.empty((2, n, c), dtype=torch.float32, device=y.device), _workspace(y)
    with _guard(y):
        _CUDA.moments(
            y.data_ptr(), _address(pre), stats.data_ptr(), work.data_ptr(), *_call(y, act)
        )
    return stats


def moments_backward(
    dy: Tensor | None, dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``moments`` at ``y``, added to ``dy``, and at ``pre``.

    Returns:
        e [N, C, *S] in y's dtype, and dpre [2, C] (None without ``pre``), whose first row is the sum of
        e: the gradient of the shift, and of a bias that y already has.
    """
    y = _map("y", y)
    n, c = y.shape[:2]
    dy = None if dy is None else _map("dy", dy, y)
    dstats, stats = _numbers("dstats", dstats, 2, n, c), _numbers("stats", stats, 2, n, c)
    pre = None if pre is None else _numbers("pre", pre, 2, c)
    dpre = None if pre is None else torch.empty_like(pre)
    e, work = _empty_map(y), _workspace(y)
    with _guard(y):
        _CUDA.moments_backward(
            _address(dy),
            dstats.data_ptr(),
            y.data_ptr(),
            stats.data_ptr(),
            _address(pre),
            e.data_ptr(),
            _address(dpre),
            work.data_ptr(),
            *_call(y, act),
        )
    return e, dpre


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
