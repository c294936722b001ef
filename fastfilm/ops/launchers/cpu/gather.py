"""Maps assembled in host memory: pooled, resized or copied into the channels of a wider map, and back."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...spec import Source, SourceGradient, views
from ...spec.views import View
from ..arguments import address
from . import _C
from .arguments import FORMATS, call_of, feature_map, numbers_of


@functools.lru_cache(maxsize=1024)
def _axes(view: View | None, size: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """Axes of a view as ``_C.gather`` takes them; the arrays live in the cache of ``views``."""
    found = views.transposed_axes(view, size) if transposed else views.axes(view, size)
    _axes_held.append(found)
    numbers: list[int] = []
    for axis in found:
        numbers += [axis.length, axis.positions]
        numbers += [a.ctypes.data for a in (axis.start, axis.taps, axis.weight)]
    return tuple(numbers)


_KEPT = 64 << 20
"""Most bytes of one thread's workspace."""

_workspaces = threading.local()


def workspace(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised channels-last map of ``shape`` in memory that the thread keeps for the next call.

    For maps that are read once and dropped before that: fresh memory of some megabytes costs more than writing it.
    Maps of more than 64 MiB are fresh.
    """
    made = torch.empty(shape, dtype=like.dtype, memory_format=FORMATS[len(shape)], device="meta")
    size = made.numel() * made.element_size()
    if size > _KEPT:
        return torch.empty(shape, dtype=like.dtype, memory_format=FORMATS[len(shape)])
    kept: torch.UntypedStorage | None = getattr(_workspaces, "kept", None)
    if kept is None or kept.nbytes() < size:
        _workspaces.kept = None  # freed before the larger one is taken
        _workspaces.kept = kept = torch.UntypedStorage(size)
    return torch.empty(0, dtype=like.dtype).set_(kept, 0, made.shape, made.stride())


# arrays that were handed out by address: never freed, a few kilobytes a size
_axes_held: list[tuple[views.Axis, ...]] = []


def _element(t: Tensor, channel: int) -> int:
    """Address of channel ``channel`` of the first position of a channels-last map."""
    return t.data_ptr() + channel * t.element_size()


def gather(source: Source, out: Tensor, first: int) -> None:
    """Writes a source, behind its coefficients and as its view shows it, into channels of a wider map.

    Args:
        source: its raw map [N, C, *S] is channels-last.
        out: [N, K, *T], channels-last, of raw's dtype; channels ``first`` to ``first + C`` are written.
    """
    raw, coef, act, view, _ = source
    raw, coef, (dtype, code, *_, threads) = _read(raw, coef, act)
    n, c, *size = raw.shape
    read = raw.data_ptr(), c, address(coef)
    about = dtype, code, n, c, threads
    axes = _axes(view, tuple(size), False)
    _C.gather(*read, _element(out, first), out.shape[1], *about, _is_maximum(view), axes)


def gather_backward(dv: Tensor, first: int, source: Source) -> SourceGradient:
    """Gradient at the map that ``gather`` saw, [N, C, *S], from channels ``first`` to ``first + C`` of ``dv``.

    It is that behind the coefficients; ``apply_backward`` leads it on to the raw map.
    """
    raw, coef, act, view, _ = source
    dv = feature_map("dv", dv if dv.dtype == raw.dtype else dv.to(raw.dtype))
    raw, coef, (dtype, code, *_, threads) = _read(raw, coef, act)
    n, c, *size = raw.shape
    if _is_maximum(view):
        du = torch.zeros_like(raw)
        axes, about = _axes(view, tuple(size), False), (dtype, code, n, c, threads)
        read = raw.data_ptr(), address(coef), _element(dv, first), dv.shape[1]
        _C.maximum_backward(*read, du.data_ptr(), *about, axes)
        return du, None
    du = torch.empty_like(raw)
    axes, plain = _axes(view, tuple(size), True), (dtype, 0, n, c, threads)
    _C.gather(_element(dv, first), dv.shape[1], 0, du.data_ptr(), c, *plain, False, axes)
    return du, None


def _is_maximum(view: View | None) -> bool:
    return view is not None and view.kind == "max"


def _read(
    raw: Tensor, coef: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
    """Map and coefficients as the kernels read them, and the trailing arguments of a pass."""
    raw = feature_map("raw", raw)
    if coef is None:
        return raw, None, call_of(raw, "none")
    return raw, numbers_of("coef", coef, raw, 7, *raw.shape[:2]), call_of(raw, act)
