"""The composed route: the input is written, PyTorch's convolution reads it, and a pass sums the output's moments.

    v[:, c0:c1] = view(g * (act(a * (y - p) + b) - q) + s)       for each source y, one channel range after another

v lives as long as the convolution that reads it, and is made again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import vendor
from ..spec import (
    FORMATS,
    Geometry,
    Gradient,
    Keep,
    NormInput,
    Pending,
    Source,
    SourceGradient,
    Wanted,
    channels_last,
    laid_out_like,
    raw_like,
)


def forward(
    kernels: Any,
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    norm_input: NormInput | None,
    geometry: Geometry,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y [N, Co, *T], channels-last, and the moments [2, N, Co] of its ``norm_input`` (None: not wanted).

    Args:
        keep: where the form of the weight is kept that a convolution wants; it is made anew otherwise.
    """
    v = write(kernels, sources, passing=True)
    if kernels.convolves:
        y: Tensor = kernels.convolution(v, weight, bias, geometry, keep)
    else:
        y = channels_last(vendor.convolution(v, weight, bias, geometry, keep))
    return y, None if norm_input is None else kernels.moments(y, *norm_input)


def finished(
    kernels: Any,
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    finish: Pending,
    geometry: Geometry,
    keep: Keep | None = None,
) -> Tensor:
    """The finished block [N, Co, *T] where what is pending on its output is known beforehand."""
    v = write(kernels, sources, passing=True)
    if kernels.convolves:
        return kernels.convolution(v, weight, bias, geometry, keep, finish)
    y = channels_last(vendor.convolution(v, weight, bias, geometry, keep))
    return kernels.apply(y, *finish, in_place=True)


def backward(
    kernels: Any,
    gradient: Gradient,
    sources: Sequence[Source],
    weight: Tensor,
    geometry: Geometry,
    wanted: Wanted,
) -> tuple[Sequence[SourceGradient], Tensor | None, Tensor | None]:
    """Gradients at each source, at the weight, and dpre [2, Co], whose first row is Σ e (None without ``pre``)."""
    dy, y, stats, dstats, pre, act, _ = gradient
    e, dpre = channels_last(dy), None
    if y is not None:
        e, dpre = kernels.moments_backward(e, dstats, y, stats, pre, act)
    needs = any(wanted.sources), wanted.weight
    if not any(needs):
        return [(None, None)] * len(sources), None, dpre
    v = write(kernels, sources, passing=True)
    gradients: Any = (
        kernels.convolution_gradients if kernels.convolves else vendor.convolution_backward
    )
    dv, dweight = gradients(e, v, weight, geometry, needs)
    # both are freed before the gradients at the sources are allocated
    del v, e
    found: Sequence[SourceGradient] = [(None, None)] * len(sources)
    if needs[0]:
        found = write_backward(kernels, channels_last(dv), sources, wanted.sources)
    return found, laid_out_like(dweight, weight) if needs[1] else None, dpre


def write(kernels: Any, sources: Sequence[Source], passing: bool = False) -> Tensor:
    """v [N, ΣC, *S], channels-last.

    Args:
        passing: v is read before anything else is written, and not afterwards.
    """
    first = sources[0]
    raw = first.raw
    if len(sources) == 1 and first.view is None:
        raw = raw.contiguous(memory_format=FORMATS[raw.dim()])
        return raw if first.coef is None else kernels.apply(raw, first.coef, first.act)
    shape = (raw.shape[0], sum(s.raw.shape[1] for s in sources), *first.size)
    v: Tensor = kernels.workspace(raw, shape) if passing else raw_like(raw, shape)
    at = 0
    for s in sources:
        kernels.gather(s._replace(raw=channels_last(s.raw)), v, at)
        at += s.raw.shape[1]
    return v


def write_backward(
    kernels: Any, dv: Tensor, sources: Sequence[Source], wanted: Sequence[bool]
) -> list[SourceGradient]:
    """Gradients at each source that is wanted, from that at v; ``dv`` may be overwritten."""
    grads: list[SourceGradient] = []
    at = 0
    for s, want in zip(sources, wanted, strict=True):
        draw: Tensor | None = None
        dcoef: Tensor | None = None
        if want:
            s = s._replace(raw=channels_last(s.raw))
            if len(sources) == 1 and s.view is None:
                draw = dv
            else:
                draw, dcoef = kernels.gather_backward(dv, at, s)
            if s.coef is not None and dcoef is None:
                draw, dcoef = kernels.apply_backward(draw, s.raw, s.coef, s.act, in_place=True)
        grads.append((draw, dcoef))
        at += s.raw.shape[1]
    return grads
