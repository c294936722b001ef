"""The fused route: convolutions with the pending affine of their input in front and the moments of y behind.

Triton's kernels read one raw map and what is pending on it; what else there is (pooled, resized, concatenated)
is written first. The CUDA kernels read sources as they are (``reads_sources``): forward is one kernel and backward
one or two, and neither v nor the gradient at y is in memory. Where that gradient goes through a resizing it is
written as the convolution sees the source, and led back from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..spec import (
    Geometry,
    Gradient,
    Keep,
    NormInput,
    Output,
    Pending,
    Source,
    SourceGradient,
    Wanted,
    channels_last,
    laid_out_like,
    views,
)
from . import composed


def forward(
    kernels: Any,
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    norm_input: NormInput | None,
    geometry: Geometry,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``composed.forward``; nothing is kept of the weight."""
    read = _readable(kernels, sources)
    y, stats = kernels.fprop(read, weight, bias, geometry, norm_input)
    return y, None if norm_input is None else stats


def finished(
    kernels: Any,
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    finish: Pending,
    geometry: Geometry,
    keep: Keep | None = None,
) -> Tensor:
    """As ``composed.finished``."""
    read = _readable(kernels, sources)
    return kernels.fprop(read, weight, bias, geometry, finish=finish)[0]


def backward(
    kernels: Any,
    gradient: Gradient,
    sources: Sequence[Source],
    weight: Tensor,
    geometry: Geometry,
    wanted: Wanted,
) -> tuple[Sequence[SourceGradient], Tensor | None, Tensor | None]:
    """As ``composed.backward``; kernels that read sources give dpre with the weight's gradient in any case."""
    gradient = gradient._replace(dy=channels_last(gradient.dy))
    dy, y, stats, dstats, pre, act, _ = gradient
    dpre = None
    needless = wanted.weight or pre is None or not wanted.sums
    if y is not None and not (kernels.reads_sources and needless):
        # otherwise the weight's kernel sums what dpre needs
        e, dpre = kernels.moments_backward(dy, dstats, y, stats, pre, act)
        gradient = Gradient(e)
    read = _readable(kernels, sources)
    if not kernels.covers_sources(sources):
        at_written = wanted._replace(sources=[any(wanted.sources)])
        ((dv, _),), dweight, summed = _gradients(
            kernels, gradient, read, weight, geometry, at_written
        )
        found: Sequence[SourceGradient] = [(None, None)] * len(sources)
        del read
        if dv is not None:
            found = composed.write_backward(kernels, dv, sources, wanted.sources)
    else:
        found, dweight, summed = _gradients(kernels, gradient, read, weight, geometry, wanted)
    return found, dweight, summed if dpre is None else dpre


def _readable(kernels: Any, sources: Sequence[Source]) -> list[Source]:
    """Sources that the kernels read: as they are, or what is seen of them written as one map."""
    if kernels.covers_sources(sources):
        return [s._replace(raw=channels_last(s.raw)) for s in sources]
    return [Source(composed.write(kernels, sources, passing=True))]


def _gradients(
    kernels: Any,
    gradient: Gradient,
    sources: Sequence[Source],
    weight: Tensor,
    geometry: Geometry,
    wanted: Wanted,
) -> tuple[Sequence[SourceGradient], Tensor | None, Tensor | None]:
    """Gradients at sources that the kernels read, at the weight, and dpre [2, Co] if the kernels sum it."""
    outputs = [_output(s, want) for s, want in zip(sources, wanted.sources, strict=True)]
    found: Sequence[SourceGradient] = [(None, None)] * len(sources)
    dweight = dpre = None
    size, at_sources = sources[0].size, any(wanted.sources)
    sums = kernels.reads_sources and (wanted.sums or gradient.pre is not None)
    if at_sources and wanted.weight and kernels.covers_joint(gradient.dy, weight, size, geometry):
        given = gradient, weight, outputs, sources, geometry, sums
        found, dweight, dpre = kernels.joint(*given)
    else:
        if at_sources:
            found = kernels.dgrad(gradient, weight, outputs, size, geometry)
        if wanted.weight:
            dweight, dpre = kernels.wgrad(gradient, sources, weight, geometry, sums)
    grads: list[SourceGradient] = []
    for source, output, (draw, dcoef) in zip(sources, outputs, found, strict=True):
        if output.wanted and not _windows(source):
            assert draw is not None
            ((draw, dcoef),) = composed.write_backward(kernels, draw, [source], [True])
        if output.wanted and source.ledger is not None:
            source.ledger.came(output.into is not None)
        grads.append((draw, dcoef))
    return grads, None if dweight is None else laid_out_like(dweight, weight), dpre


def _windows(source: Source) -> bool:
    """Whether the gradient reaches the raw map in the kernel itself."""
    view = source.view
    if view is None:
        return True
    return view.kind == "max" and views.disjoint(view) and not any(view.padding)


def _output(source: Source, wanted: bool) -> Output:
    raw, coef, act, view, ledger = source
    if not wanted or not _windows(source):
        return Output(raw.shape[1], wanted=wanted)
    into = None if ledger is None else ledger.rest()
    if into is not None and (into.shape != raw.shape or into.dtype != raw.dtype):
        into = None
    return Output(raw.shape[1], raw, coef, act, view, into)
