"""Launchers of the C++ kernels: pointwise passes and moments of channels-last maps in host memory.

The maths is that of ``reference.materialise`` and ``reference.moments``.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# after torch: the extension then finds torch's own OpenMP runtime loaded and asks it, not another, for its places
from fastfilm import _C

from . import layout, views
from .cpu_arguments import DTYPES, FORMATS, address_of, call_of, feature_map, map_like, numbers_of
from .cpu_convolution import (
    convolve,
    convolve_dgrad,
    convolve_wgrad,
    covers_convolution,
    covers_gradients,
)
from .views import View

__all__ = [
    "apply",
    "apply_backward",
    "block_coefficients",
    "block_coefficients_backward",
    "convolve",
    "convolve_dgrad",
    "convolve_wgrad",
    "covers_block",
    "covers_convolution",
    "covers_gradients",
    "gather",
    "gather_backward",
    "moments",
    "moments_backward",
    "residual",
    "residual_backward",
    "workspace",
]

_NORMS = {"none": 0, "batch": 1, "instance": 2, "group": 3, "layer": 3}
_ORDERS = {"conv-norm-film-act": 0, "conv-norm-act-film": 1, "conv-act-norm-film": 2}
_POSITIONS = {"end": 0, "film": 1, "norm": 2}


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
    y = feature_map("y", y)
    coef = numbers_of("coef", coef, y, 7, y.shape[0], y.shape[1])
    v = y if in_place else torch.empty_like(y, memory_format=FORMATS[y.dim()])
    _C.apply(y.data_ptr(), coef.data_ptr(), v.data_ptr(), *call_of(y, act))
    return v


def apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``apply`` at ``y`` ([N, C, *S]; in dv's memory if ``in_place``) and at ``coef``."""
    y = feature_map("y", y)
    dv = map_like("dv", dv, y)
    coef = numbers_of("coef", coef, y, 7, y.shape[0], y.shape[1])
    dy = dv if in_place else torch.empty_like(y, memory_format=FORMATS[y.dim()])
    dcoef = torch.empty_like(coef)
    _C.apply_backward(
        dv.data_ptr(),
        y.data_ptr(),
        coef.data_ptr(),
        dy.data_ptr(),
        dcoef.data_ptr(),
        *call_of(y, act),
    )
    return dy, dcoef


def moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """Mean and biased variance over space of u = act(y + shift; slope).

    Args:
        y: [N, C, *S], channels-last.
        pre: [2, C], shift and slope; None: the moments of ``y`` itself, whatever ``act`` is.
        act: activation name.

    Returns:
        [2, N, C], float32 (float64 for a float64 ``y``).
    """
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
    """Gradients of ``moments`` at ``y``, added to ``dy``, and at ``pre``.

    Args:
        dy: gradient that reached ``y`` by other ways, or None.
        dstats: gradient [2, N, C] at the moments.
        y: what the moments were taken of.
        stats: the moments [2, N, C].
        pre: as in ``moments``.
        act: as in ``moments``.

    Returns:
        e [N, C, *S] in y's dtype, and dpre [2, C] (None without ``pre``), whose first row is the sum of
        e: the gradient of the shift, and of a bias that y already has.
    """
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
    _C.moments_backward(
        0 if dy is None else dy.data_ptr(),
        dstats.data_ptr(),
        y.data_ptr(),
        stats.data_ptr(),
        0 if pre is None else pre.data_ptr(),
        e.data_ptr(),
        0 if dpre is None else dpre.data_ptr(),
        *call_of(y, act),
    )
    return e, dpre


def residual(
    y: Tensor,
    coef: Tensor | None,
    act: str,
    other: Tensor,
    other_coef: Tensor | None,
    slope: Tensor | None,
    outer: str,
) -> Tensor:
    """v = outer(M(y; coef, act) + M(other; other_coef); slope), see ``reference.residual``.

    Args:
        y, other: [N, C, *S] of one dtype.
        coef, other_coef: [7, N, C] each; None: nothing is pending.
        act, outer: activations, one of them "none".
        slope: [C], of ``outer``; None: 0.
    """
    y, other, coef, other_coef, slope = _summands(y, coef, other, other_coef, slope)
    v = torch.empty_like(y, memory_format=FORMATS[y.dim()])
    inside, call = _side(y, act, outer)
    _C.residual(
        y.data_ptr(),
        address_of(coef),
        other.data_ptr(),
        address_of(other_coef),
        address_of(slope),
        inside,
        v.data_ptr(),
        *call,
    )
    return v


def residual_backward(
    dv: Tensor,
    y: Tensor,
    coef: Tensor | None,
    act: str,
    other: Tensor,
    other_coef: Tensor | None,
    slope: Tensor | None,
    outer: str,
    at_other: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``residual`` at y, coef, other (None unless ``at_other``), other_coef and slope."""
    y, other, coef, other_coef, slope = _summands(y, coef, other, other_coef, slope)
    dv = map_like("dv", dv, y)
    dy = torch.empty_like(y, memory_format=FORMATS[y.dim()])
    dother = torch.empty_like(dy) if at_other else None
    dcoef, dother_coef = (None if c is None else torch.empty_like(c) for c in (coef, other_coef))
    dslope = None if slope is None else torch.empty(y.shape[:2], dtype=slope.dtype)
    inside, call = _side(y, act, outer)
    _C.residual_backward(
        dv.data_ptr(),
        y.data_ptr(),
        address_of(coef),
        other.data_ptr(),
        address_of(other_coef),
        address_of(slope),
        inside,
        dy.data_ptr(),
        address_of(dcoef),
        address_of(dother),
        address_of(dother_coef),
        address_of(dslope),
        *call,
    )
    return dy, dcoef, dother, dother_coef, None if dslope is None else dslope.sum(0)


def _summands(
    y: Tensor, coef: Tensor | None, other: Tensor, other_coef: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    y = feature_map("y", y)
    other = map_like("other", other, y)
    n, c = y.shape[:2]
    coefs = [None if t is None else numbers_of("coef", t, y, 7, n, c) for t in (coef, other_coef)]
    return y, other, coefs[0], coefs[1], None if slope is None else numbers_of("slope", slope, y, c)


def _side(y: Tensor, act: str, outer: str) -> tuple[bool, tuple[int, ...]]:
    """Whether the activation is that of the sum, and the trailing arguments."""
    if act != "none" and outer != "none":
        raise ValueError(f"act or outer must be 'none', got {act!r} and {outer!r}")
    return act == "none", call_of(y, outer if act == "none" else act)


@functools.lru_cache(maxsize=4096)
def _algebra(kind: Any) -> _C.Coefficients:
    return _C.Coefficients(
        wide=kind.wide,
        norm=_NORMS[kind.norm],
        order=_ORDERS[kind.order],
        position=_POSITIONS[kind.dropout_position],
        use_input=kind.uses_input,
        update=kind.update,
        n=kind.batch,
        c=kind.channels,
        groups=kind.groups,
        count=kind.count,
        eps=kind.eps,
        slope=kind.slope,
    )


def _readable(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Dense, with their values in their memory."""
    return [
        t
        if t is None or (t.is_contiguous() and not t.is_neg() and not t._is_zerotensor())
        else layout.contiguous(t.detach())
        for t in tensors
    ]


def _rows(t: Tensor | None) -> int:
    """Rows of γ, β or a dropout mask: [C] and [1, C] have one."""
    return t.shape[0] if t is not None and t.dim() == 2 else 1


def _arguments(tensors: Sequence[Tensor | None]) -> tuple[list[int], int, tuple[int, ...]]:
    """Addresses, types (four bits each) and rows, as ``_C.Coefficients`` takes them."""
    addresses, types = [], 0
    for i, t in enumerate(tensors):
        if t is None:
            addresses.append(0)
        else:
            addresses.append(t.data_ptr())
            types |= DTYPES[t.dtype] << 4 * i
    gamma, beta, mask, slope = tensors[6:]
    rows = (_rows(gamma), _rows(beta), _rows(mask), 1 if slope is None else slope.numel())
    return addresses, types, rows


def covers_block(kind: Any) -> bool:
    """Whether ``block_coefficients`` serves such a block: it serves all."""
    return True


def block_coefficients(
    kind: Any, momentum: float, tensors: Sequence[Tensor | None], device: torch.device
) -> Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C]; see ``fused_coefficients`` and ``Tail.coefficients``."""
    dtype = torch.float64 if kind.wide else torch.float32
    coef = torch.empty((7, kind.batch, kind.channels), dtype=dtype, device=device)
    readable = _readable(tensors)
    _algebra(kind).forward(momentum, *_arguments(readable), coef.data_ptr())
    if kind.update:
        written = []
        for theirs, ours in zip(tensors[:2], readable[:2], strict=True):
            assert theirs is not None and ours is not None
            if ours is not theirs:
                theirs.copy_(ours)
            elif not theirs.is_inference():
                written.append(theirs)  # behind PyTorch's back
        torch.autograd.graph.increment_version(written)
    return coef


def block_coefficients_backward(
    kind: Any, tensors: Sequence[Tensor | None], dcoef: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``block_coefficients`` at the ``wanted`` of its tensors, in their dtypes."""
    grads: list[Tensor | None] = [
        torch.empty(t.shape, dtype=t.dtype) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    dcoef = layout.contiguous(dcoef.to(torch.float64 if kind.wide else torch.float32))
    addresses = [0 if t is None else t.data_ptr() for t in grads]
    readable = _readable(tensors)  # held by name: the call gets addresses only
    _algebra(kind).backward(*_arguments(readable), dcoef.data_ptr(), addresses)
    return grads


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


# arrays whose addresses are out: never freed, a few kilobytes a size
_axes_held: list[tuple[views.Axis, ...]] = []


def _element(t: Tensor, channel: int) -> int:
    """Address of channel ``channel`` of the first position of a channels-last map."""
    return t.data_ptr() + channel * t.element_size()


def gather(
    raw: Tensor, coef: Tensor | None, act: str, view: View | None, out: Tensor, at: int
) -> None:
    """Writes a map, behind its coefficients and as ``view`` shows it, into channels of a wider one.

    Args:
        raw: [N, C, *S], channels-last.
        coef: [7, N, C]; None: the map as it is.
        out: [N, K, *T], channels-last, of raw's dtype; channels ``at`` to ``at + C`` are written.
    """
    raw = feature_map("raw", raw)
    n, c, *size = raw.shape
    if coef is not None:
        coef = numbers_of("coef", coef, raw, 7, n, c)
    dtype, code, *_, threads = call_of(raw, act if coef is not None else "none")
    _C.gather(
        raw.data_ptr(),
        c,
        0 if coef is None else coef.data_ptr(),
        _element(out, at),
        out.shape[1],
        dtype,
        code,
        n,
        c,
        threads,
        view is not None and view.kind == "max",
        _axes(view, tuple(size), False),
    )


def gather_backward(
    dv: Tensor, at: int, raw: Tensor, coef: Tensor | None, act: str, view: View | None
) -> Tensor:
    """Gradient at the map that ``gather`` saw, [N, C, *S], from channels ``at`` to ``at + C`` of ``dv``."""
    raw, dv = (
        feature_map("raw", raw),
        feature_map("dv", dv if dv.dtype == raw.dtype else dv.to(raw.dtype)),
    )
    n, c, *size = raw.shape
    dtype, code, *_, threads = call_of(raw, act if coef is not None else "none")
    if view is not None and view.kind == "max":
        if coef is not None:
            coef = numbers_of("coef", coef, raw, 7, n, c)
        du = torch.zeros_like(raw)
        _C.maximum_backward(
            raw.data_ptr(),
            0 if coef is None else coef.data_ptr(),
            _element(dv, at),
            dv.shape[1],
            du.data_ptr(),
            dtype,
            code,
            n,
            c,
            threads,
            _axes(view, tuple(size), False),
        )
        return du
    du = torch.empty_like(raw)
    _C.gather(
        _element(dv, at),
        dv.shape[1],
        0,
        du.data_ptr(),
        c,
        dtype,
        0,
        n,
        c,
        threads,
        False,
        _axes(view, tuple(size), True),
    )
    return du
