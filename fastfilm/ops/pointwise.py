"""Pointwise and reduction ops on an existing feature map: materialise and moments, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import higher, spec
from .backends import BACKENDS
from .conv import absent, raw_like, stats_like
from .library import define, differentiable, direct


def materialise_fwd(y: Tensor, coef: Tensor, act: str, plan: str) -> Tensor:
    """Implementation of ``fastfilm::materialise``: g * (act(a * (y - p) + b) - q) + s."""
    return BACKENDS[plan.split("/")[0]].kernels().apply(spec.channels_last(y), coef, act)


def materialise_bwd(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, plan: str
) -> tuple[Tensor, Tensor]:
    """Implementation of ``fastfilm::materialise_backward``: dy and dcoef."""
    kernels = BACKENDS[plan.split("/")[0]].kernels()
    return kernels.apply_backward(spec.channels_last(dv), spec.channels_last(y), coef, act)


def moments_fwd(y: Tensor, pre: Tensor | None, pre_act: str, plan: str) -> Tensor:
    """Implementation of ``fastfilm::moments``."""
    return BACKENDS[plan.split("/")[0]].kernels().moments(spec.channels_last(y), pre, pre_act)


def moments_bwd(
    dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, pre_act: str, plan: str
) -> tuple[Tensor, Tensor]:
    """Implementation of ``fastfilm::moments_backward``: dy and dpre (empty without ``pre``)."""
    kernels = BACKENDS[plan.split("/")[0]].kernels()
    dy, dpre = kernels.moments_backward(None, dstats, spec.channels_last(y), stats, pre, pre_act)
    return dy, absent(y) if dpre is None else dpre


def _materialise_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, coef, ctx.act, ctx.plan = inputs
    ctx.save_for_backward(y, coef)


def _materialise_backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
    y, coef = ctx.saved_tensors
    short = direct(dv) and not torch.is_grad_enabled()
    backward = materialise_bwd if short else torch.ops.fastfilm.materialise_backward
    dy, dcoef = backward(dv, y, coef, ctx.act, ctx.plan)
    return dy, dcoef, None, None


def _moments_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, pre, ctx.pre_act, ctx.plan = inputs
    ctx.save_for_backward(y, pre, output)


def _moments_backward(ctx: Any, dstats: Tensor) -> tuple[Tensor | None, ...]:
    y, pre, stats = ctx.saved_tensors
    short = direct(dstats) and not torch.is_grad_enabled()
    backward = moments_bwd if short else torch.ops.fastfilm.moments_backward
    dy, dpre = backward(dstats, y, stats, pre, ctx.pre_act, ctx.plan)
    return dy, dpre if dpre.numel() else None, None, None


define(
    "materialise(Tensor y, Tensor coef, str act, str plan) -> Tensor",
    materialise_fwd,
    lambda y, coef, act, plan: raw_like(y, y.shape),
    backward=_materialise_backward,
    setup=_materialise_setup,
)
define(
    "materialise_backward(Tensor dv, Tensor y, Tensor coef, str act, str plan) -> (Tensor, Tensor)",
    materialise_bwd,
    lambda dv, y, coef, act, plan: (raw_like(y, y.shape), torch.empty_like(coef)),
    backward=higher.materialise_backward_backward,
    setup=higher.materialise_backward_setup,
)
define(
    "moments(Tensor y, Tensor? pre, str pre_act, str plan) -> Tensor",
    moments_fwd,
    lambda y, pre, pre_act, plan: stats_like(y),
    backward=_moments_backward,
    setup=_moments_setup,
)
define(
    "moments_backward(Tensor dstats, Tensor y, Tensor stats, Tensor? pre, str pre_act, str plan)"
    " -> (Tensor, Tensor)",
    moments_bwd,
    lambda dstats, y, stats, pre, pre_act, plan: (
        raw_like(y, y.shape),
        absent(y) if pre is None else torch.empty_like(pre),
    ),
    backward=higher.moments_backward_backward,
    setup=higher.moments_backward_setup,
)

_eager_materialise = differentiable(materialise_fwd, _materialise_setup, _materialise_backward)
_eager_moments = differentiable(moments_fwd, _moments_setup, _moments_backward)


def materialise(y: Tensor, coef: Tensor, act: str, plan: str, short: bool) -> Tensor:
    """``fastfilm::materialise``; ``short``: both tensors are ``direct``."""
    op = _eager_materialise if short else torch.ops.fastfilm.materialise
    v: Tensor = op(y, coef, act, plan)
    return v


def moments(y: Tensor, pre: Tensor | None, pre_act: str, plan: str, short: bool) -> Tensor:
    """``fastfilm::moments``; ``short``: both tensors are ``direct``."""
    op = _eager_moments if short else torch.ops.fastfilm.moments
    stats: Tensor = op(y, pre, pre_act, plan)
    return stats


def finish(y: Tensor, coef: Tensor, act: str, plan: str, short: bool) -> Tensor:
    """Materialises a raw map that nobody else holds, in place where that is possible."""
    if not short:
        return materialise(y, coef, act, plan, short)
    v: Tensor = BACKENDS[plan.split("/")[0]].kernels().apply(y, coef, act, in_place=True)
    return v
