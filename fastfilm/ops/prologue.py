"""Convolutions that read what nobody has written: pooled, resized and concatenated maps, and the raw gradient.

    y = conv(v) + bias,    v[:, c0:c1] = view(g * (act(a * (x - p) + b) - q) + s) of each source x

``assemble`` writes v for kernels that read maps only. Where a backend's convolutions read sources themselves
(``covers``), forward is one kernel and backward two, and neither v nor the gradient at y is in memory. Where that
gradient goes through a resizing it is written as the convolution sees the source, and led back from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import assemble, conv, higher, reference, spec, views
from .assemble import Source
from .backends import BACKENDS, forced
from .library import recalling
from .operands import Gradient, Output


def kernels_of(plan: str) -> ModuleType | None:
    """The launchers of a plan if its convolutions read sources; else None."""
    name, _, route = plan.partition("/")
    if route != "fused":
        return None
    kernels = BACKENDS[name].kernels()
    return kernels if hasattr(kernels, "covers_sources") else None


def covers(sources: Sequence[Source], plan: str) -> bool:
    """Whether the convolutions of a plan read such sources."""
    kernels = kernels_of(plan)
    return kernels is not None and kernels.covers_sources(sources)


def _readable(sources: Sequence[Source]) -> list[Source]:
    return [s._replace(raw=spec.channels_last(s.raw)) for s in sources]


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
    reads = coef is not None or view is not None
    return Output(raw.shape[1], raw if reads else None, coef, act, view, into)


def _gradients(
    gradient: Gradient,
    weight: Tensor,
    sources: Sequence[Source],
    wanted: Sequence[bool],
    need_weight: bool,
    sums: bool,
    geometry: tuple[Any, ...],
    kernels: ModuleType,
) -> tuple[list[tuple[Tensor | None, Tensor | None]], Tensor | None, Tensor | None]:
    """(draw, dcoef) of each source that is wanted, dW, and with ``sums`` (and ``need_weight``) dpre [2, Co]."""
    stride, padding, size = tuple(geometry[0]), tuple(geometry[1]), sources[0].size
    outputs = [_output(s, want) for s, want in zip(sources, wanted, strict=True)]
    found: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(sources)
    dweight = dpre = None
    both = any(wanted) and need_weight
    if both and kernels.covers_joint(gradient.dy, weight, size, stride, padding):
        found, dweight, dpre = kernels.joint_sources(
            gradient, weight, outputs, sources, stride, padding, sums
        )
    else:
        if any(wanted):
            found = kernels.dgrad_sources(gradient, weight, outputs, size, stride, padding)
        if need_weight:
            dweight, dpre = kernels.wgrad_sources(gradient, sources, weight, stride, padding, sums)
    grads = []
    for source, want, output, (draw, dcoef) in zip(sources, wanted, outputs, found, strict=True):
        if want and not _windows(source):
            assert draw is not None
            ((draw, dcoef),) = assemble.write_backward(draw, [source], kernels, [True])
        if want and source.ledger is not None:
            source.ledger.came(output.into is not None)
        grads.append((draw, dcoef))
    return grads, None if dweight is None else conv.laid_out_like(dweight, weight), dpre


def _sum(e: Tensor) -> Tensor:
    return e.sum((0, *range(2, e.dim())), dtype=torch.float32)


def _saved(ctx: Any, how: tuple[Any, ...], sources: Sequence[Source], bias: Tensor | None) -> None:
    """What both functions below keep beside tensors."""
    ctx.how, ctx.forced = how, forced()[:2]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.static = tuple((s.act, s.view) for s in sources)
    ctx.ledgers = [s.ledger for s in sources]


def _restored(
    ctx: Any, tensors: Sequence[Tensor | None], first: int
) -> tuple[list[Source], list[bool]]:
    """The sources, and which of them are wanted; their tensors are inputs from number ``first`` on."""
    sources = _readable(assemble.sources_of(ctx.static, tensors))
    sources = [s._replace(ledger=a) for s, a in zip(sources, ctx.ledgers, strict=True)]
    needs, middle = ctx.needs_input_grad, first + len(sources)
    return sources, [a or b for a, b in zip(needs[first:middle], needs[middle:], strict=True)]


class _Read(torch.autograd.Function):
    """y and the moments of it."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Any, ...],
        sources: Sequence[Source],
        weight: Tensor,
        bias: Tensor | None,
        pre: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, stats = _forward(how, sources, weight, bias, pre)
        kept = (y, stats) if how[2] else (None, None)
        ctx.save_for_backward(weight, pre, *kept, *tensors)
        _saved(ctx, how, sources, bias)
        return y, stats

    @staticmethod
    @recalling
    def backward(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, None, *assemble.convolved_gradients(ctx, dy, dstats)
        weight, pre, y, stats, *tensors = ctx.saved_tensors
        pre_act, geometry, _, plan = ctx.how
        kernels = BACKENDS[plan.split("/")[0]].kernels()
        sources, wanted = _restored(ctx, tensors, 5)
        gradient, dpre = Gradient(spec.channels_last(dy), y, stats, dstats, pre, pre_act), None
        if y is None:
            gradient = Gradient(gradient.dy)
        elif pre is not None and not needs[2] and (needs[3] or needs[4]):
            # what sums the gradient is the kernel of the weight's
            e, dpre = kernels.moments_backward(gradient.dy, dstats, y, stats, pre, pre_act)
            gradient = Gradient(e)
        sums = needs[2] and (needs[3] or (y is not None and pre is not None))
        grads, dweight, summed = _gradients(
            gradient, weight, sources, wanted, needs[2], sums, geometry, kernels
        )
        dpre = summed if sums else dpre
        if needs[3] and dpre is None:
            dpre = _sum(gradient.dy).unsqueeze(0)
        return (
            None,
            None,
            dweight,
            None if dpre is None or not needs[3] else dpre[0].to(ctx.bias_dtype),
            dpre if needs[4] and pre is not None else None,
            *(g[0] for g in grads),
            *(g[1] for g in grads),
        )


class _Finished(torch.autograd.Function):
    """v = g * (a * (y - p) + b - q) + s where the coefficients do not depend on y; both are written at once."""

    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Any, ...],
        sources: Sequence[Source],
        weight: Tensor,
        bias: Tensor | None,
        out_coef: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        geometry, plan = how
        kernels = BACKENDS[plan.split("/")[0]].kernels()
        stride, padding = tuple(geometry[0]), tuple(geometry[1])
        v: Tensor
        v, y = kernels.fprop_finished(
            _readable(sources), weight, bias, out_coef, "none", stride, padding
        )
        ctx.save_for_backward(weight, bias, out_coef, y, *tensors)
        _saved(ctx, how, sources, bias)
        return v

    @staticmethod
    @recalling
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, out_coef, y, *tensors = ctx.saved_tensors
        geometry, plan = ctx.how
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():

            def defined(
                weight: Tensor, bias: Tensor | None, coef: Tensor, *given: Tensor
            ) -> Tensor:
                v = assemble.defined(ctx.static, given)
                y = higher.convolution(v, weight, bias, *geometry)
                return reference.materialise(y, coef, "none")

            given = (weight, bias, out_coef, *tensors)
            return None, None, *higher.pull(defined, given, dv)
        kernels = BACKENDS[plan.split("/")[0]].kernels()
        sources, wanted = _restored(ctx, tensors, 5)
        dv = spec.channels_last(dv)
        dcoef = kernels.coefficients_backward(dv, y, out_coef, "none") if needs[4] else None
        scale = out_coef[0] * out_coef[2]
        gradient = Gradient(dv, scale=scale)
        grads, dweight, dpre = _gradients(
            gradient, weight, sources, wanted, needs[2], needs[2] and needs[3], geometry, kernels
        )
        dbias = None
        if needs[3]:
            if dpre is None:
                dpre = _sum(dv * scale[(...,) + (None,) * (dv.dim() - 2)]).unsqueeze(0)
            dbias = dpre[0].to(ctx.bias_dtype)
        return None, None, dweight, dbias, dcoef, *(g[0] for g in grads), *(g[1] for g in grads)


def _forward(
    how: tuple[Any, ...],
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pre_act, geometry, moments, plan = how
    kernels = BACKENDS[plan.split("/")[0]].kernels()
    tail = (None, "none", tuple(geometry[0]), tuple(geometry[1]), moments)
    y, stats = kernels.fprop_sources(_readable(sources), weight, bias, pre, pre_act, *tail)
    return y, stats


# callers have made sure that no functorch transform is active
_read = super(torch.autograd.Function, _Read).apply
_finished = super(torch.autograd.Function, _Finished).apply


def convolved(
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    pre_act: str,
    geometry: tuple[Any, ...],
    moments: bool,
    plan: str,
) -> tuple[Tensor, Tensor]:
    """``assemble.convolved`` of sources that ``covers`` allows: y [N, Co, *T] and its moments [2, N, Co]."""
    how = pre_act, geometry, moments, plan
    if not torch.is_grad_enabled():
        return _forward(how, sources, weight, bias, pre)
    flat = (*(s.raw for s in sources), *(s.coef for s in sources))
    y, stats = _read(how, tuple(sources), weight, bias, pre, *flat)
    return y, stats


def finished(
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    out_coef: Tensor,
    out_act: str,
    geometry: tuple[Any, ...],
    plan: str,
) -> Tensor:
    """The finished block [N, Co, *T] where the coefficients of its output are known.

    With gradients ``out_act`` is "none": the gradient of another one needs a pass over the unfinished output.
    """
    if torch.is_grad_enabled():
        assert out_act == "none"
        flat = (*(s.raw for s in sources), *(s.coef for s in sources))
        done: Tensor = _finished((geometry, plan), tuple(sources), weight, bias, out_coef, *flat)
        return done
    kernels = BACKENDS[plan.split("/")[0]].kernels()
    tail = (out_coef, out_act, tuple(geometry[0]), tuple(geometry[1]), False)
    v: Tensor = kernels.fprop_sources(_readable(sources), weight, bias, None, "none", *tail)[0]
    return v
