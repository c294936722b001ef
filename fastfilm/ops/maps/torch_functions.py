"""Concatenation, pooling and resizing of maps, which stay unwritten where kernels can show them to a consumer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import choice
from ..spec import direct, subclasses, views
from .deferred import DeferredMap, Joined, Map, defer, deferrable, plain, readable


def join(parts: Sequence[Map]) -> Map:
    """Maps [N, Ci, *S] one behind another along the channels, unwritten where that is possible.

    Raises:
        RuntimeError: as ``torch.cat``, where sizes do not fit.
    """
    found = _join(parts, 1)
    return torch.cat([plain(p) for p in parts], 1) if found is None else found


def max_pool(x: Map, kernel_size: int) -> Map:
    """``torch.nn.functional.max_pool2d`` or ``3d``, unwritten where that is possible."""
    dims = len(x.shape) - 2
    found = _max_pool(dims)(unwritten(x), kernel_size)
    if found is not None:
        return found
    pool = F.max_pool2d if dims == 2 else F.max_pool3d
    pooled: Tensor = pool(plain(x), kernel_size)
    return pooled


def interpolate(x: Map, **options: Any) -> Map:
    """``torch.nn.functional.interpolate``, unwritten where that is possible."""
    found = _interpolate(unwritten(x), **options)
    return F.interpolate(plain(x), **options) if found is None else found


def unwritten(x: Map) -> Map:
    """A tensor as a map with nothing pending where no gradient is asked for and kernels can show it."""
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or not direct(x) or x.numel() == 0:
        return x
    plan = choice.for_pass(x)
    return x if plan.route == "eager" else DeferredMap(x, None, "none", plan)


def _join(tensors: Sequence[Any], dim: int = 0) -> Joined | None:
    parts: list[DeferredMap | Tensor] = []
    for t in tensors:
        parts += t.parts if isinstance(t, Joined) else [readable(t)]
    deferred = [p for p in parts if isinstance(p, DeferredMap) and p._tensor is None]
    if not deferred or dim not in (1, 1 - len(deferred[0].shape)):
        return None
    first, plan = deferred[0], deferred[0].plan
    for p in parts:
        same = (
            p.dtype == first.dtype and p.device == first.device and len(p.shape) == len(first.shape)
        )
        if not same or (p.shape[0], *p.shape[2:]) != (first.shape[0], *first.shape[2:]):
            return None
        if isinstance(p, DeferredMap) and _backend(p) != _backend(first):
            return None
    written = [subclasses.stripped(p) for p in parts if isinstance(p, Tensor)]
    if plan is None or not deferrable(first.raw, plan, *written):
        return None
    # a map that was written for another consumer is read as it is
    return Joined(
        [p._tensor if isinstance(p, DeferredMap) and p._tensor is not None else p for p in parts],
        plan,
    )


def _backend(x: DeferredMap) -> str | None:
    return None if x.plan is None else x.plan.backend


def _tuple(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _pooled(
    kind: str, x: Any, kernel_size: Any, stride: Any, padding: Any, include: bool, dims: int
) -> DeferredMap | None:
    if not isinstance(x, DeferredMap) or len(x.shape) != dims + 2:
        return None
    kernel, spread = _tuple(kernel_size, dims), _tuple(padding, dims)
    step = kernel if stride is None or stride == [] else _tuple(stride, dims)
    size = tuple(x.raw.shape[2:])
    return x.seen(views.pooling(kind, size, kernel, step, spread, include))


def _avg_pool(dims: int) -> Callable[..., DeferredMap | None]:
    def pool(
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> DeferredMap | None:
        if ceil_mode or divisor_override is not None:
            return None
        return _pooled("avg", x, kernel_size, stride, padding, count_include_pad, dims)

    return pool


def _max_pool(dims: int) -> Callable[..., DeferredMap | None]:
    def pool(
        x: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> DeferredMap | None:
        if ceil_mode or return_indices or _tuple(dilation, dims) != (1,) * dims:
            return None
        return _pooled("max", x, kernel_size, stride, padding, True, dims)

    return pool


def _interpolate(
    x: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> DeferredMap | None:
    if not isinstance(x, DeferredMap) or recompute_scale_factor or antialias:
        return None
    dims = len(x.shape) - 2
    if mode in ("linear", "bilinear", "trilinear") and mode != ("bilinear", "trilinear")[dims - 2]:
        return None
    if mode.startswith("nearest") and align_corners is not None:
        return None
    out = None if size is None else _tuple(size, dims)
    if scale_factor is None:
        scales = None
    else:
        scales = (
            (float(scale_factor),) * dims
            if isinstance(scale_factor, (int, float))
            else tuple(float(s) for s in scale_factor)
        )
    return x.seen(views.resizing(mode, tuple(x.raw.shape[2:]), out, scales, bool(align_corners)))


defer(_interpolate, F.interpolate)
defer(_join, torch.cat, torch.concat)
defer(_avg_pool(2), F.avg_pool2d)
defer(_avg_pool(3), F.avg_pool3d)
defer(_max_pool(2), torch.max_pool2d, F.max_pool2d)
defer(_max_pool(3), torch.max_pool3d, F.max_pool3d)
