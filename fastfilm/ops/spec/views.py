"""Views of a feature map: pooling and resizing as taps along each axis, which a consumer applies while it reads.

A view of a map is, along each axis, a list of taps for every position: an index into the map and a weight. The
result at a position is the weighted sum (resizing, average pooling) or the maximum over all combinations of
taps. Semantics are those of ``torch.nn.functional.interpolate`` and its pooling functions.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from . import capture

RESIZE = {"nearest", "nearest-exact", "linear", "bilinear", "trilinear"}
MOST_TAPS = 1024
"""Taps that one position may have, all axes together."""


class View(NamedTuple):
    """A pooled or resized view.

    Attributes:
        kind: "max", "avg", "nearest", "nearest-exact" or "linear" (of any number of dimensions).
        size: spatial size of the result.
        kernel, stride, padding: of pooling, one number a dimension; else empty.
        count_include_pad: of average pooling.
        align_corners: of linear resizing.
        scales: factors where the caller gave some, else None: positions are then those of the factor.
    """

    kind: str
    size: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    count_include_pad: bool = True
    align_corners: bool = False
    scales: tuple[float, ...] | None = None


class Axis(NamedTuple):
    """Taps of one axis: position x reads ``taps[start[x]:start[x + 1]]``, with ``weight``."""

    length: int
    start: NDArray[np.int64]
    taps: NDArray[np.int64]
    weight: NDArray[np.float64]

    @property
    def positions(self) -> int:
        """Positions of the result."""
        return len(self.start) - 1


def pooling(
    kind: str,
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    count_include_pad: bool = True,
) -> View | None:
    """View of a pooling over a map of ``size``; None where PyTorch would refuse it (let it say why)."""
    out = tuple(
        (i + 2 * p - k) // s + 1 for i, k, s, p in zip(size, kernel, stride, padding, strict=True)
    )
    odd = any(2 * p > k for k, p in zip(kernel, padding, strict=True))
    odd = odd or any(k > i for k, i in zip(kernel, size, strict=True))
    if min(out) < 1 or odd or math.prod(kernel) > MOST_TAPS:
        return None
    return View(kind, out, kernel, stride, padding, count_include_pad)


def resizing(
    mode: str,
    size: tuple[int, ...],
    out: tuple[int, ...] | None,
    scales: tuple[float, ...] | None,
    align_corners: bool,
) -> View | None:
    """View of ``interpolate``; None where it is not covered."""
    kind = mode if mode.startswith("nearest") else "linear"
    if mode not in RESIZE or (out is None) == (scales is None) or min(size) < 1:
        return None
    if out is None:
        assert scales is not None
        out = tuple(math.floor(float(i) * s) for i, s in zip(size, scales, strict=True))
    if min(out) < 1:
        return None
    return View(kind, out, align_corners=align_corners, scales=scales)


@functools.lru_cache(maxsize=1024)
def axes(view: View | None, size: tuple[int, ...]) -> tuple[Axis, ...]:
    """The axes of a view of a map of ``size``: three, the first trivial in 2D."""
    dims = len(size)
    found = [_identity(1)] * (3 - dims)
    for d, length in enumerate(size):
        if view is None:
            found.append(_identity(length))
        elif view.kernel:
            found.append(_pooled(view, d, length))
        else:
            found.append(_resized(view, d, length))
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def transposed_axes(view: View | None, size: tuple[int, ...]) -> tuple[Axis, ...]:
    """The adjoint of ``axes``: for each position of the map, who reads it."""
    return tuple(_transposed(axis) for axis in axes(view, size))


Table = tuple[tuple[Tensor, Tensor], ...]
"""Index int32 and weight float32 [positions, T] of each axis, padded with weight 0."""


def taps(view: View | None, size: tuple[int, ...], transposed: bool, device: torch.device) -> Table:
    """The taps of a view of a map of ``size``, or their adjoint, on a device.

    Raises:
        RuntimeError: the first call for a view is inside the capture of a CUDA graph, where nothing can be copied.
    """
    found = _table(view, size, transposed, device)
    if capture.capturing():
        capture.hold(*(t for pair in found for t in pair))
    return found


@functools.lru_cache(maxsize=1024)
def _table(
    view: View | None, size: tuple[int, ...], transposed: bool, device: torch.device
) -> Table:
    if capture.capturing():
        raise capture.refusal("a map is pooled, resized or concatenated for the first time")
    found = []
    for axis in transposed_axes(view, size) if transposed else axes(view, size):
        counts = np.diff(axis.start)
        width = max(int(counts.max(initial=0)), 1)
        index = np.zeros((axis.positions, width), np.int32)
        weight = np.zeros((axis.positions, width), np.float32)
        filled = np.arange(width) < counts[:, None]
        index[filled], weight[filled] = axis.taps, axis.weight
        found.append((torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device)))
    return tuple(found)


def disjoint(view: View | None) -> bool:
    """Whether no two positions see the same one of the map; of pooling and no view at all."""
    return view is None or (
        bool(view.kernel) and all(k <= s for k, s in zip(view.kernel, view.stride, strict=True))
    )


def seen(v: Tensor, view: View | None) -> Tensor:
    """The view of a tensor [N, C, *S] in PyTorch: the definition."""
    if view is None:
        return v
    dims = v.dim() - 2
    if view.kind == "max":
        pool = F.max_pool2d if dims == 2 else F.max_pool3d
        pooled: Tensor = pool(v, view.kernel, view.stride, view.padding)
        return pooled
    if view.kind == "avg":
        average = F.avg_pool2d if dims == 2 else F.avg_pool3d
        return average(
            v,
            view.kernel,
            view.stride,
            view.padding,
            count_include_pad=view.count_include_pad,
        )
    linear = view.kind == "linear"
    return F.interpolate(
        v,
        size=None if view.scales else list(view.size),
        scale_factor=list(view.scales) if view.scales else None,
        mode=("bilinear" if dims == 2 else "trilinear") if linear else view.kind,
        align_corners=view.align_corners if linear else None,
    )


def _axis(length: int, taps: list[list[tuple[int, float]]]) -> Axis:
    start = np.zeros(len(taps) + 1, np.int64)
    np.cumsum([len(t) for t in taps], out=start[1:])
    flat = [tap for position in taps for tap in position]
    return Axis(
        length,
        start,
        np.array([i for i, _ in flat], np.int64),
        np.array([w for _, w in flat], np.float64),
    )


def _identity(length: int) -> Axis:
    return _axis(length, [[(i, 1.0)] for i in range(length)])


def _pooled(view: View, d: int, length: int) -> Axis:
    kernel, stride, padding = view.kernel[d], view.stride[d], view.padding[d]
    taps = []
    for x in range(view.size[d]):
        first = x * stride - padding
        inside = range(max(first, 0), min(first + kernel, length))
        count = kernel if view.count_include_pad else len(inside)
        taps.append([(i, 1.0 if view.kind == "max" else 1.0 / count) for i in inside])
    return _axis(length, taps)


def _resized(view: View, d: int, length: int) -> Axis:
    out = view.size[d]
    step = length / out if view.scales is None else 1.0 / view.scales[d]
    taps = []
    for x in range(out):
        if view.kind != "linear":
            # in float32, as PyTorch does: where a position falls on a border, rounding decides
            shift = np.float32(0.5 if view.kind == "nearest-exact" else 0.0)
            at = int(np.floor((np.float32(x) + shift) * np.float32(step)))
            taps.append([(min(at, length - 1), 1.0)])
            continue
        if view.align_corners:
            place = x * (length - 1) / (out - 1) if out > 1 else 0.0
        else:
            place = max((x + 0.5) * step - 0.5, 0.0)
        low = min(int(place), length - 1)
        part = min(place - low, 1.0) if low + 1 < length else 0.0
        pair = [(low, 1.0 - part), (low + 1, part)]
        taps.append([(i, w) for i, w in pair if w > 0])
    return _axis(length, taps)


def _transposed(axis: Axis) -> Axis:
    readers: list[list[tuple[int, float]]] = [[] for _ in range(axis.length)]
    for x in range(axis.positions):
        for t in range(axis.start[x], axis.start[x + 1]):
            readers[axis.taps[t]].append((x, float(axis.weight[t])))
    return _axis(axis.positions, readers)


@functools.lru_cache(maxsize=1024)
def covered(view: View | None, size: tuple[int, ...]) -> bool:
    """Whether no position has too many taps, either way."""
    for found in (axes(view, size), transposed_axes(view, size)):
        if math.prod(int(np.diff(a.start).max(initial=0)) for a in found) > MOST_TAPS:
            return False
    return True
