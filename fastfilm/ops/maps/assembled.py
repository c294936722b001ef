"""A feature map written from one or several sources: pooled, resized, concatenated, behind their affines.

    v[:, c0:c1] = view(g * (act(a * (y - p) + b) - q) + s)       for each source y, one channel range after another

Kept for the backward pass are the raw maps and their coefficients alone. This is a function of eager mode; where a
compiler or tracer watches, callers write the maps with the registered operators instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import launchers, settings
from ..launchers import composed
from ..operators.library import recalling
from ..reference import derivatives
from ..spec import Plan, Source, channels_last, channels_last_format

Static = list[tuple[Any, ...]]
"""Of each source what is no tensor: activation, view and ledger."""


def sources_of(static: Static, tensors: Sequence[Tensor | None]) -> list[Source]:
    """The sources, from their raw maps followed by their coefficients."""
    each = zip(tensors[: len(static)], tensors[len(static) :], static, strict=True)
    return [Source(raw, coef, *rest) for raw, coef, rest in each]  # type: ignore[arg-type]


def wanted_of(static: Static, needs: Sequence[bool]) -> list[bool]:
    """Which sources need a gradient, at the raw map or at the coefficients."""
    count = len(static)
    return [a or b for a, b in zip(needs[:count], needs[count:], strict=True)]


def flat(sources: Sequence[Source]) -> tuple[Tensor | None, ...]:
    """The tensors of sources: raw maps, then coefficients."""
    return (*(s.raw for s in sources), *(s.coef for s in sources))


class _Assembled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Any, static: Static, *tensors: Tensor | None) -> Tensor:
        ctx.kernels, ctx.static, ctx.forced = kernels, static, settings.forced()
        ctx.save_for_backward(*tensors)
        return composed.write(kernels, sources_of(static, tensors))

    @staticmethod
    @recalling
    def backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
        static: Static = ctx.static
        if torch.is_grad_enabled():

            def written(*given: Tensor | None) -> Tensor:
                return derivatives.written(sources_of(static, given))

            return None, None, *derivatives.pull(written, ctx.saved_tensors, dv)
        sources = sources_of(static, ctx.saved_tensors)
        wanted = wanted_of(static, ctx.needs_input_grad[2:])
        dv = channels_last(dv)
        if len(sources) == 1 and sources[0].view is None:
            dv = dv.clone(memory_format=channels_last_format(dv.dim()))
        grads = composed.write_backward(ctx.kernels, dv, sources, wanted)
        return None, None, *(g[0] for g in grads), *(g[1] for g in grads)


# callers have made sure that no functorch transform is active
_assembled = super(torch.autograd.Function, _Assembled).apply


def assembled(sources: Sequence[Source], plan: Plan) -> Tensor:
    """v [N, ΣC, *S], channels-last, with gradients at the raw maps and the coefficients."""
    kernels = launchers.of(plan.backend)
    if not torch.is_grad_enabled():
        return composed.write(kernels, sources)
    v: Tensor = _assembled(kernels, [s[2:] for s in sources], *flat(sources))
    return v
