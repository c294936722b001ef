"""The fused route: convolutions with the pending affine of their input in front and the moments of y behind.

Triton's kernels read one raw map and what is pending on it, the CUDA kernels one or two joined maps
(``covers_sources``). A pooled or resized map is written first, since its taps would be gathered anew for every
tile that reads them; its gradient is written as the convolution sees it, and led back from there. The CUDA kernels
compute the gradient at y where they read it (``reads_sources``): it is not in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..spec import (
    Behind,
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
    behind: Behind | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As ``composed.forward``; nothing is kept of the weight. ``behind``: ``FusedKernels.fprop``."""
    read, _ = _readable(kernels, sources)
    more = {} if behind is None else {"behind": behind}
    y, stats = kernels.fprop(read, weight, bias, geometry, norm_input, **more)
    return y, None if norm_input is None else stats


def finished(
    kernels: Any,
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    finish: Pending,
    geometry: Geometry,
    keep: Keep | None = None,
    behind: Behind | None = None,
) -> Tensor:
    """As ``composed.finished``. ``behind``: ``FusedKernels.fprop``."""
    read, _ = _readable(kernels, sources)
    more = {} if behind is None else {"behind": behind}
    done: Tensor = kernels.fprop(read, weight, bias, geometry, finish=finish, **more)[0]
    return done


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
        # otherwise the kernel of the weight's gradient sums dpre
        e, dpre = kernels.moments_backward(dy, dstats, y, stats, pre, act)
        gradient = Gradient(e)
    read, written = _readable(kernels, sources)
    apart = len(read) == len(sources)
    at_read = wanted.sources if apart else [any(wanted.sources)]
    found, dweight, summed = _gradients(
        kernels, gradient, read, weight, geometry, wanted._replace(sources=at_read)
    )
    del read
    if not apart:
        ((dv, _),) = found
        found = [(None, None)] * len(sources)
        if dv is not None:
            found = composed.write_backward(kernels, dv, sources, wanted.sources)
    elif any(written):
        found = [
            _led_back(kernels, s, dv) if seen and dv is not None else (dv, dcoef)
            for s, seen, (dv, dcoef) in zip(sources, written, found, strict=True)
        ]
    return found, dweight, summed if dpre is None else dpre


def _led_back(kernels: Any, source: Source, dv: Tensor) -> SourceGradient:
    """Gradients at a source that was written, from the one at what was written."""
    ((draw, dcoef),) = composed.write_backward(kernels, dv, [source], [True])
    if source.ledger is not None:
        source.ledger.came(False)
    return draw, dcoef


def _readable(kernels: Any, sources: Sequence[Source]) -> tuple[list[Source], list[bool]]:
    """Sources that the kernels read, and which of them were written.

    They are read as they are, or each pooled or resized one is written, or all of them as one map.
    """
    views = [s.view is not None for s in sources]
    if not kernels.covers_sources([s._replace(view=None) for s in sources]):
        return [Source(composed.write(kernels, sources, passing=True))], [True]
    alone = len(sources) == 1  # the memory that the thread keeps has room for one map
    read = [
        Source(composed.write(kernels, [s], passing=alone))
        if s.view is not None
        else s._replace(raw=channels_last(s.raw))
        for s in sources
    ]
    return read, views


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
    if at_sources and wanted.weight and kernels.reads_sources:
        given = gradient, weight, outputs, sources, size, geometry, sums
        found, dweight, dpre = kernels.gradients(*given)
    else:
        if at_sources:
            found = kernels.dgrad(gradient, weight, outputs, size, geometry)
        if wanted.weight:
            dweight, dpre = kernels.wgrad(gradient, sources, weight, geometry, sums)
    for source, output in zip(sources, outputs, strict=True):
        if output.wanted and source.ledger is not None:
            source.ledger.came(output.into is not None)
    return found, None if dweight is None else laid_out_like(dweight, weight), dpre


def _output(source: Source, wanted: bool) -> Output:
    raw, coef, act, _, ledger = source
    if not wanted:
        return Output(raw.shape[1], wanted=False)
    into = None if ledger is None else ledger.rest()
    if into is not None and (into.shape != raw.shape or into.dtype != raw.dtype):
        into = None
    return Output(raw.shape[1], raw, coef, act, into)
