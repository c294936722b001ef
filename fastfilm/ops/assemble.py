"""A consumer's input from one or several feature maps that were never written.

    v[:, c0:c1] = view(g * (act(a * (y - p) + b) - q) + s)       for each source y, one channel range after another

``assembled`` writes v; ``convolved`` is the convolution of v, for which v is written, read and dropped: both keep
only the raw maps and their coefficients for backward and make v again from them. These are functions of eager
mode; where a compiler or tracer watches, callers write the maps with the registered operators instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import conv, higher, reference, spec, views
from .backends import BACKENDS, forced
from .forks import Ledger
from .library import recalling
from .views import View


class Source(NamedTuple):
    """One channel range: a raw map [N, C, *S], what is pending on it (None: nothing) and its view.

    ``ledger``: what is known of the gradients of the map's other consumers, where it has some.
    """

    raw: Tensor
    coef: Tensor | None
    act: str
    view: View | None
    ledger: Ledger | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of what the consumer sees."""
        return tuple(self.raw.shape[2:]) if self.view is None else self.view.size


_Static = tuple[tuple[str, View | None], ...]


def write(sources: Sequence[Source], kernels: ModuleType, passing: bool = False) -> Tensor:
    """v [N, ΣC, *S], channels-last.

    Args:
        passing: v is read before anything else is written, and not afterwards.
    """
    if len(sources) == 1 and sources[0].view is None:
        return _valued(sources[0], kernels)
    first = sources[0]
    channels = sum(s.raw.shape[1] for s in sources)
    if hasattr(kernels, "gather") or hasattr(kernels, "gather_taps"):
        shape = (first.raw.shape[0], channels, *first.size)
        if passing and hasattr(kernels, "workspace"):
            v: Tensor = kernels.workspace(first.raw, shape)
        else:
            v = conv.raw_like(first.raw, shape)
        at = 0
        for s in sources:
            raw = spec.channels_last(s.raw)
            if hasattr(kernels, "gather"):
                kernels.gather(raw, s.coef, s.act, s.view, v, at)
            else:
                taps = views.taps(s.view, tuple(raw.shape[2:]), False, raw.device)
                kernels.gather_taps(raw, s.coef, s.act, taps, _is_maximum(s.view), v, at)
            at += raw.shape[1]
        return v
    parts = [views.seen(_valued(s, kernels), s.view) for s in sources]
    return spec.channels_last(torch.cat(parts, 1) if len(parts) > 1 else parts[0])


def write_backward(
    dv: Tensor, sources: Sequence[Source], kernels: ModuleType, wanted: Sequence[bool]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """(draw, dcoef) of each source that is wanted, from the gradient at v; ``dv`` may be overwritten."""
    grads: list[tuple[Tensor | None, Tensor | None]] = []
    at = 0
    for s, want in zip(sources, wanted, strict=True):
        channels = s.raw.shape[1]
        if want and hasattr(kernels, "gather_taps") and _taps_lead_back(s.view):
            raw, maximum = spec.channels_last(s.raw), _is_maximum(s.view)
            taps = views.taps(s.view, tuple(raw.shape[2:]), not maximum, raw.device)
            grads.append(kernels.gather_taps_backward(dv, at, raw, s.coef, s.act, taps, maximum))
        elif want:
            du = _view_backward(dv, at, s, kernels, len(sources) == 1)
            grads.append(
                (du, None)
                if s.coef is None
                else kernels.apply_backward(
                    du, spec.channels_last(s.raw), s.coef, s.act, in_place=True
                )
            )
        else:
            grads.append((None, None))
        at += channels
    return grads


def _is_maximum(view: View | None) -> bool:
    return view is not None and view.kind == "max"


def _taps_lead_back(view: View | None) -> bool:
    """Whether ``gather_taps_backward`` serves a view: a maximum over windows that overlap is PyTorch's."""
    return not _is_maximum(view) or views.disjoint(view)


def _valued(s: Source, kernels: ModuleType) -> Tensor:
    raw = spec.channels_last(s.raw)
    return raw if s.coef is None else kernels.apply(raw, s.coef, s.act)


def _view_backward(dv: Tensor, at: int, s: Source, kernels: ModuleType, alone: bool) -> Tensor:
    """Gradient at the source's map, in memory of its own (``dv`` itself if that is all of it)."""
    if alone and s.view is None:
        return dv
    if hasattr(kernels, "gather"):
        du: Tensor = kernels.gather_backward(
            dv, at, spec.channels_last(s.raw), s.coef, s.act, s.view
        )
        return du
    part = dv[:, at : at + s.raw.shape[1]]
    if s.view is None:
        return part.clone(memory_format=spec.channels_last_format(dv.dim()))
    with torch.enable_grad():
        u = _valued(s, kernels).detach().requires_grad_()
        (du,) = torch.autograd.grad(views.seen(u, s.view), u, part)
    # in memory of its own also where the view's gradient is a view
    return spec.channels_last(du).clone() if du._is_view() else spec.channels_last(du)


def sources_of(static: _Static, tensors: Sequence[Tensor | None]) -> list[Source]:
    """Sources from (act, view) of each, and from their raw maps followed by their coefficients."""
    raws, coefs = tensors[: len(static)], tensors[len(static) :]
    return [
        Source(raw, coef, act, view)  # type: ignore[arg-type]
        for raw, coef, (act, view) in zip(raws, coefs, static, strict=True)
    ]


def _flat(sources: Sequence[Source]) -> tuple[Tensor | None, ...]:
    return (*(s.raw for s in sources), *(s.coef for s in sources))


class _Assembled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, static: _Static, *tensors: Tensor | None) -> Tensor:
        ctx.kernels, ctx.static, ctx.forced = kernels, static, forced()[:2]
        ctx.save_for_backward(*tensors)
        return write(sources_of(static, tensors), kernels)

    @staticmethod
    @recalling
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        static: _Static = ctx.static
        needs = ctx.needs_input_grad[2:]
        wanted = [a or b for a, b in zip(needs[: len(static)], needs[len(static) :], strict=True)]
        if torch.is_grad_enabled():
            found = higher.pull(lambda *given: defined(static, given), ctx.saved_tensors, dv)
            return None, None, *found
        sources = sources_of(static, ctx.saved_tensors)
        if len(static) == 1 and static[0][1] is None:
            dv = dv.clone(memory_format=spec.channels_last_format(dv.dim()))
        grads = write_backward(spec.channels_last(dv), sources, ctx.kernels, wanted)
        return None, None, *(g[0] for g in grads), *(g[1] for g in grads)


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        how: tuple[Any, ...],
        static: _Static,
        weight: Tensor,
        bias: Tensor | None,
        pre: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        pre_act, geometry, moments, plan = how
        kernels = BACKENDS[plan.split("/")[0]].kernels()
        v = write(sources_of(static, tensors), kernels, passing=True)
        y, stats = conv.conv_fwd(
            v,
            weight,
            bias,
            None,
            "none",
            pre,
            pre_act,
            *geometry,
            moments,
            plan,  # type: ignore[call-arg]
        )
        kept = (y, stats) if moments else (None, None)
        ctx.save_for_backward(weight, pre, *kept, *tensors)
        ctx.how, ctx.static, ctx.kernels, ctx.forced = how, static, kernels, forced()[:2]
        return y, stats

    @staticmethod
    @recalling
    def backward(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
        static: _Static = ctx.static
        weight, pre, y, stats, *tensors = ctx.saved_tensors
        pre_act, geometry, _, plan = ctx.how
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return None, None, *convolved_gradients(ctx, dy, dstats)
        wanted = [
            a or b
            for a, b in zip(needs[5 : 5 + len(static)], needs[5 + len(static) :], strict=True)
        ]
        sources = sources_of(static, tensors)
        v = write(sources, ctx.kernels, passing=True)
        dv, dweight, _, dpre = conv.conv_bwd(
            dy,
            dstats,
            v,
            weight,
            None,
            "none",
            pre,
            pre_act,
            y,
            stats,
            *geometry,
            plan,
            any(wanted),
            needs[2],
        )
        del v
        grads = (
            write_backward(dv, sources, ctx.kernels, wanted)
            if any(wanted)
            else [(None, None)] * len(sources)
        )
        return (
            None,
            None,
            dweight if needs[2] else None,
            dpre[0].to(dy.dtype) if needs[3] and dpre.numel() else None,
            dpre if needs[4] and dpre.numel() else None,
            *(g[0] for g in grads),
            *(g[1] for g in grads),
        )


def defined(static: _Static, tensors: Sequence[Tensor | None]) -> Tensor:
    """``write`` in differentiable PyTorch."""
    parts = []
    for s in sources_of(static, tensors):
        u = s.raw if s.coef is None else reference.materialise(s.raw, s.coef, s.act)
        parts.append(views.seen(u, s.view))
    return torch.cat(parts, 1)


def convolved_gradients(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a convolution of sources at its tensors, differentiable themselves."""
    weight, pre, y, _, *tensors = ctx.saved_tensors
    pre_act, geometry, _, _ = ctx.how
    e, dpre = dy, None
    if y is not None:
        e, dpre = higher.after_moments(dy, dstats, y, pre, pre_act)

    def forward(weight: Tensor, *tensors: Tensor | None) -> Tensor:
        v = defined(ctx.static, tensors)
        return higher.convolution(v, weight, None, *geometry)

    dweight, *found = higher.pull(forward, (weight, *tensors), e)
    dbias = None if dpre is None or not ctx.needs_input_grad[3] else dpre[0].to(dy.dtype)
    return dweight, dbias, dpre, *found


# callers have made sure that no functorch transform is active
_assembled = super(torch.autograd.Function, _Assembled).apply
_convolved = super(torch.autograd.Function, _Convolved).apply


def assembled(sources: Sequence[Source], plan: str, passing: bool = False) -> Tensor:
    """v [N, ΣC, *S], channels-last, with gradients at the raw maps and the coefficients.

    Args:
        passing: v is an input of the next convolution and of nothing else (without gradients).
    """
    kernels = BACKENDS[plan.split("/")[0]].kernels()
    if not torch.is_grad_enabled():
        return write(sources, kernels, passing)
    static = tuple((s.act, s.view) for s in sources)
    v: Tensor = _assembled(kernels, static, *_flat(sources))
    return v


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
    """``conv.conv`` of ``assembled(sources)``, which is not kept."""
    static = tuple((s.act, s.view) for s in sources)
    y, stats = _convolved(
        (pre_act, geometry, moments, plan), static, weight, bias, pre, *_flat(sources)
    )
    return y, stats
