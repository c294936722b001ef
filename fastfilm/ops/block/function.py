"""One block in eager mode as one autograd function: reading, convolution, moments, coefficients, affine.

    y, stats = conv(v) + bias       v: what the convolution sees of its sources, written or not
    coef     = coefficients(stats, norm, γ, β, …)
    v'       = g * (act(a * (y - p) + b) - q) + s

Kept for the backward pass are the sources' raw maps, y, and numbers of size [N, C]. The first derivative comes
from the backend's kernels, all others from the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launchers, reference, spec
from ..launchers import ROUTES
from ..maps.assembled import Static, sources_of, wanted_of
from ..operators.library import recalling
from ..reference import derivatives
from ..spec import (
    Behind,
    Gradient,
    Keep,
    NormInput,
    Pending,
    Source,
    SourceGradient,
    TailTensors,
    Wanted,
    accumulate_dtype,
    channels_last,
)
from . import tail
from .recipe import Recipe
from .tail import Moving

_COUNT = len(TailTensors._fields)
_STATS, _BIAS, _MASK, _SLOPE = (
    TailTensors._fields.index(n) for n in ("stats", "bias", "dropout_mask", "slope")
)


class Work(NamedTuple):
    """One call of a block, beside its tensors.

    Attributes:
        result: "raw" (y alone: nothing is pending on it), "pending" (y and its coefficients) or "written".
    """

    how: Recipe
    moving: Moving
    result: str


class Local(NamedTuple):
    """The coefficients of a block that no kernel covers, in the graph in which PyTorch computed them."""

    inputs: list[Tensor | None]
    coef: Tensor


Computed = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, NormInput | None, Local | None
]
"""y, the written map, the coefficients, the moments, what they are of, and ``Local``, as far as there are such."""


def values(
    work: Work,
    sources: Sequence[Source],
    weight: Tensor | None,
    tensors: TailTensors,
    needs: Sequence[bool] | None = None,
    keep: Keep | None = None,
) -> Computed:
    """Forward.

    Args:
        weight: of the convolution; None: there is none, and y is the source.
        needs: which of ``tensors`` need gradients, of a call that may have some; None: nothing does.
        keep: where what inference makes of the weight is kept.
    """
    how, result, raw = work.how, work.result, sources[0].raw
    kind, plan, geometry = how.kind, how.plan, how.geometry
    kernels, own = launchers.of(plan.backend), tensors.bias
    added, seen, tensors = tail.prepared(kind, plan, tensors, raw)
    coef = local = stats = v = None
    if weight is None or geometry is None:
        y = channels_last(raw)
        stats = None if seen is None else kernels.moments(y, *seen)
    else:
        # a bare convolution has all of its bias
        bias = own if result == "raw" else added if added is None or plan.adds_bias else None
        more: dict[str, Behind] = {}
        if plan.route == "fused" and kernels.reads_sources:
            behind = _behind(work, kernels, tensors, needs, raw)
            if behind is not None:
                more, coef = {"behind": behind}, behind.coef
        if seen is None and result == "written":
            # the coefficients do not depend on y: the convolution may finish the map
            if coef is None:
                coef, local = _coefficients(work, kernels, tensors, needs, raw.device)
            finish = Pending(coef, kind.activation)
            if needs is None:
                given = sources, weight, bias, finish, geometry, keep
                v = ROUTES[plan.route].finished(kernels, *given, **more)
                return None, v, None, None, None, None
            if _finishes(work, kernels, sources):
                read = [s._replace(raw=channels_last(s.raw)) for s in sources]
                v, y = kernels.fprop(read, weight, bias, geometry, finish=finish, raw=True, **more)
                return y, v, coef, None, None, local
        route = ROUTES[plan.route]
        y, stats = route.forward(kernels, sources, weight, bias, seen, geometry, keep, **more)
    if result == "raw":
        return y, None, None, None, None, None
    if coef is None:
        tensors = TailTensors(*tensors[:2], stats, *tensors[3:])
        coef, local = _coefficients(work, kernels, tensors, needs, raw.device)
    if result == "written":
        v = kernels.apply(y, coef, kind.activation, needs is None and geometry is not None)
    return y, v, coef, stats, seen, local


def _behind(
    work: Work,
    kernels: Any,
    tensors: TailTensors,
    needs: Sequence[bool] | None,
    raw: Tensor,
) -> Behind | None:
    """The coefficients, where the convolution writes them; None: they are a call of their own, or not wanted."""
    kind, (momentum, group) = work.how.kind, work.moving
    if work.result == "raw" or group is not None or (needs and needs[_MASK]):
        return None
    size = 7, kind.batch, kind.channels
    coef = torch.empty(size, dtype=torch.float32, device=raw.device)
    behind = Behind(kind, momentum, tensors, coef)
    return behind if kernels.covers_behind(behind, raw) else None


def _coefficients(
    work: Work,
    kernels: Any,
    tensors: TailTensors,
    needs: Sequence[bool] | None,
    device: torch.device,
) -> tuple[Tensor, Local | None]:
    """Rows a, b, g, s, p, q, slope [7, N, C], by PyTorch where no kernel covers them; running statistics move."""
    kind, moving = work.how.kind, work.moving
    alone = moving.group is None and (needs is None or not needs[_MASK])
    if alone and kernels.covers_block(kind):
        return kernels.block_coefficients(kind, moving.momentum, tensors, device), None
    if needs is None:
        return reference.of_block(kind, tensors, device, *moving), None
    if tensors.bias is None and needs[_BIAS] and not _sees_bias(work):
        # y has the whole bias; its gradient comes with that of the coefficients all the same
        dtype = torch.float64 if kind.wide else torch.float32
        tensors = tensors._replace(bias=torch.zeros(kind.channels, dtype=dtype, device=device))
    with torch.enable_grad():
        inputs = [
            t if t is None else t.detach().requires_grad_(need or i == _STATS)
            for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
        ]
        coef = reference.of_block(kind, TailTensors(*inputs), device, *moving)
    return coef.detach(), Local(inputs, coef)


def _finishes(work: Work, kernels: Any, sources: Sequence[Source]) -> bool:
    """Whether one kernel writes y and the finished map at once."""
    how, _, result = work
    if how.geometry is None or how.kind.uses_input or how.kind.activation != "none":
        return False
    fused = result == "written" and how.plan.route == "fused" and kernels.reads_sources
    return fused and kernels.covers_sources(sources)


class _Saved(NamedTuple):
    """The tensors that backward reads, and the gradients that it is asked for.

    Attributes:
        needs: at each of ``tensors``.
        wanted: of the convolution's, or of the source where there is none.
    """

    sources: list[Source]
    weight: Tensor | None
    tensors: TailTensors
    y: Tensor
    stats: Tensor | None
    coef: Tensor | None
    pre: Tensor | None
    local: Local | None
    needs: Sequence[bool]
    wanted: Wanted


def _sees_bias(work: Work) -> bool:
    """Whether the gradient at the bias is Σ e: it is added to y, or in front of the moments."""
    return work.result == "raw" or (work.how.kind.activation_first and work.how.kind.uses_input)


def _at_output(
    work: Work, kernels: Any, saved: _Saved, grads: Sequence[Tensor]
) -> tuple[Gradient, Tensor | None]:
    """The gradient at y, beside what comes by its moments, and that at the coefficients."""
    if work.result != "written":
        dy, *others = grads
        return Gradient(channels_last(dy)), others[0] if others else None
    dv, coef, act = channels_last(grads[0]), saved.coef, work.how.kind.activation
    assert coef is not None
    if _finishes(work, kernels, saved.sources):
        dcoef = None
        if any(saved.needs):
            dcoef = kernels.coefficients_backward(dv, saved.y, coef, act)
        return Gradient(dv, scale=coef[spec.A] * coef[spec.G]), dcoef
    dy, dcoef = kernels.apply_backward(dv, saved.y, coef, act)
    return Gradient(dy), dcoef


def _at_tensors(
    work: Work, kernels: Any, saved: _Saved, dcoef: Tensor | None
) -> list[Tensor | None]:
    """Gradients at the block's tensors and at the moments, as far as they come from the coefficients."""
    kind = work.how.kind
    sources, at_weight, sums = saved.wanted
    wanted = list(saved.needs)
    wanted[_STATS] = saved.stats is not None and (any(sources) or at_weight or sums)
    wanted[_BIAS] = wanted[_BIAS] and not _sees_bias(work)
    if dcoef is None or not any(wanted):
        return [None] * _COUNT
    if saved.local is not None:
        inputs, coef = saved.local
        given = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
        found = iter(torch.autograd.grad(coef, given, dcoef, retain_graph=True, allow_unused=True))
        return [
            next(found) if want and t is not None else None
            for t, want in zip(inputs, wanted, strict=True)
        ]
    _, _, tensors = tail.prepared(kind, work.how.plan, saved.tensors, saved.y)
    if tensors.bias is None and wanted[_BIAS] and saved.tensors.bias is not None:
        zero = torch.zeros_like(saved.tensors.bias, dtype=accumulate_dtype(saved.y))
        tensors = tensors._replace(bias=zero)
    tensors = tensors._replace(stats=saved.stats)
    grads: list[Tensor | None]
    grads = kernels.block_coefficients_backward(kind, tensors, dcoef, wanted)
    return grads


def _at_input(
    work: Work, kernels: Any, saved: _Saved, gradient: Gradient
) -> tuple[Sequence[SourceGradient], Tensor | None, Tensor | None]:
    """Gradients at the sources and at the weight, and dpre [2, C], whose first row is Σ e."""
    if work.how.geometry is not None and saved.weight is not None:
        given = kernels, gradient, saved.sources, saved.weight, work.how.geometry, saved.wanted
        found, dweight, dpre = ROUTES[work.how.plan.route].backward(*given)
        if saved.wanted.sums and dpre is None:
            space = (0, *range(2, gradient.dy.dim()))
            dpre = gradient.dy.sum(space, dtype=accumulate_dtype(gradient.dy)).unsqueeze(0)
        return found, dweight, dpre
    dy, y, stats, dstats, pre, act, _ = gradient
    if y is None:
        return [(dy, None)], None, None
    e, dpre = kernels.moments_backward(dy, dstats, y, stats, pre, act)
    return [(e, None)], None, dpre


def _gradients(
    work: Work, saved: _Saved, grads: Sequence[Tensor]
) -> tuple[Tensor | None, list[Tensor | None], Sequence[SourceGradient]]:
    """Gradients at the weight, at the block's tensors and at its sources."""
    kernels, kind = launchers.of(work.how.plan.backend), work.how.kind
    gradient, dcoef = _at_output(work, kernels, saved, grads)
    dtensors = _at_tensors(work, kernels, saved, dcoef)
    dstats, dtensors[_STATS] = dtensors[_STATS], None
    found: Sequence[SourceGradient] = [(None, None)] * len(saved.sources)
    dweight = dpre = None
    if any(saved.wanted.sources) or saved.wanted.weight or saved.wanted.sums:
        if saved.stats is not None:
            moments = saved.y, saved.stats, dstats, saved.pre, kind.pre_activation
            gradient = Gradient(gradient.dy, *moments)
        found, dweight, dpre = _at_input(work, kernels, saved, gradient)
    if dpre is not None:
        if saved.needs[_BIAS] and _sees_bias(work):
            dtensors[_BIAS] = dpre[0]
        slope = saved.tensors.slope
        if saved.needs[_SLOPE] and slope is not None and len(dpre) == 2:
            before = dpre[1] if slope.numel() == len(dpre[1]) else dpre[1].sum()
            known = dtensors[_SLOPE]
            dtensors[_SLOPE] = before.reshape(slope.shape) if known is None else known + before
    each = zip(dtensors, saved.tensors, strict=True)
    return dweight, [g if g is None or t is None else g.to(t.dtype) for g, t in each], found


def _defined(
    work: Work, static: Static, weight: Tensor | None, *flat: Tensor | None
) -> tuple[Tensor, ...]:
    """The block's results in differentiable PyTorch."""
    kind, tensors = work.how.kind, tail.widened(work.how.kind, TailTensors(*flat[:_COUNT]))
    y, bias = derivatives.written(sources_of(static, flat[_COUNT:])), tensors.bias
    rest: Tensor | None = None
    early = work.how.plan.adds_bias and (kind.activation_first or kind.norm == "none")
    if work.how.geometry is not None and weight is not None:
        added = bias.to(y.dtype) if early and bias is not None else None
        if added is not None and bias is not None and not _sees_bias(work):
            # as in forward, the bias gets its gradient with the coefficients
            added = added.detach()
            rest = bias.to(accumulate_dtype(y)) - added
        y = derivatives.convolution(y, weight, added, work.how.geometry)
    if work.result == "raw":
        return (y,)
    tensors = tensors._replace(bias=rest if early else bias)
    biased = early and bias is not None
    seen = tail.norm_input(kind, tensors, y, biased)
    if seen is not None:
        tensors = tensors._replace(stats=reference.moments(y, *seen))
    coef = reference.of_block(kind, tensors, y.device, *work.moving)
    if work.result == "pending":
        return y, coef
    return (reference.materialise(y, coef, kind.activation),)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: Work, sources: list[Source], weight: Tensor | None, *flat: Tensor | None
    ) -> Any:
        tensors, maps = TailTensors(*flat[:_COUNT]), flat[_COUNT:]
        ctx.work, ctx.static, ctx.forced = work, [s[2:] for s in sources], work.how.forced
        needs = ctx.needs_input_grad[3 : 3 + _COUNT]
        y, v, coef, stats, seen, ctx.local = values(work, sources, weight, tensors, needs)
        if work.how.kind.update:
            # backward reads the moments: the running statistics have moved by then
            tensors = tensors._replace(running_mean=None, running_var=None)
        pre = None if seen is None else seen.pre
        # a bare convolution's gradient does not need its result, which callers may write to
        own = None if weight is None or work.result == "raw" else y
        ctx.save_for_backward(own, stats, coef, pre, weight, *tensors, *maps)
        if work.result == "pending":
            return y, coef
        return y if work.result == "raw" else v

    @staticmethod
    @recalling
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        work, static = ctx.work, ctx.static
        y, stats, coef, pre, weight, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():

            def defined(*given: Tensor | None) -> tuple[Tensor, ...]:
                return _defined(work, static, *given)

            return None, None, *derivatives.pull(defined, (weight, *flat), grads)
        tensors, sources = TailTensors(*flat[:_COUNT]), sources_of(static, flat[_COUNT:])
        if y is None:
            raw = sources[0].raw
            y = raw if work.result == "raw" else channels_last(raw)
        _, _, at_weight, *needs = ctx.needs_input_grad
        sums = needs[_BIAS] and _sees_bias(work)
        sums = sums or (needs[_SLOPE] and pre is not None)
        wanted = Wanted(wanted_of(static, needs[_COUNT:]), at_weight, sums)
        kept = sources, weight, tensors, y, stats, coef, pre, ctx.local
        saved = _Saved(*kept, needs[:_COUNT], wanted)
        dweight, dtensors, found = _gradients(work, saved, grads)
        return None, None, dweight, *dtensors, *(g[0] for g in found), *(g[1] for g in found)


apply: Any = super(torch.autograd.Function, _Block).apply
"""``values`` with gradients, of (work, sources, weight, *tensors, *raw maps, *coefficients).

It gives y, (y, coefficients) or the written map, as ``work.result`` says. No functorch transform may be active.
"""
