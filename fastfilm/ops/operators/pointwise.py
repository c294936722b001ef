"""``fastfilm::materialise`` and ``fastfilm::moments``: passes over a feature map, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import launchers
from ..reference import derivatives
from ..spec import NormInput, Pending, Plan, absent, channels_last, direct, raw_like, stats_like
from .library import define, differentiable


def _kernels(plan: str) -> Any:
    return launchers.of(Plan.of(plan).backend)


def materialise(y: Tensor, coef: Tensor, act: str, plan: str) -> Tensor:
    """Implementation of ``fastfilm::materialise``: g * (act(a * (y - p) + b) - q) + s."""
    return _kernels(plan).apply(channels_last(y), coef, act)


def materialise_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, plan: str
) -> tuple[Tensor, Tensor]:
    """Implementation of ``fastfilm::materialise_backward``: dy and dcoef."""
    dy, dcoef = _kernels(plan).apply_backward(channels_last(dv), channels_last(y), coef, act)
    return dy, dcoef


def moments(y: Tensor, pre: Tensor | None, pre_act: str, plan: str) -> Tensor:
    """Implementation of ``fastfilm::moments``."""
    return _kernels(plan).moments(channels_last(y), pre, pre_act)


def moments_backward(
    dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, pre_act: str, plan: str
) -> tuple[Tensor, Tensor]:
    """Implementation of ``fastfilm::moments_backward``: dy and dpre (empty without ``pre``)."""
    given = dstats, channels_last(y), stats, pre, pre_act
    dy, dpre = _kernels(plan).moments_backward(None, *given)
    return dy, absent(y) if dpre is None else dpre


def _materialise_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, coef, ctx.act, ctx.plan = inputs
    ctx.save_for_backward(y, coef)


def _materialise_backward(ctx: Any, dv: Tensor) -> tuple[Tensor | None, ...]:
    y, coef = ctx.saved_tensors
    short = direct(dv) and not torch.is_grad_enabled()
    backward = materialise_backward if short else torch.ops.fastfilm.materialise_backward
    return *backward(dv, y, coef, ctx.act, ctx.plan), None, None


def _moments_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, pre, ctx.pre_act, ctx.plan = inputs
    ctx.save_for_backward(y, pre, output)


def _moments_backward(ctx: Any, dstats: Tensor) -> tuple[Tensor | None, ...]:
    y, pre, stats = ctx.saved_tensors
    short = direct(dstats) and not torch.is_grad_enabled()
    backward = moments_backward if short else torch.ops.fastfilm.moments_backward
    dy, dpre = backward(dstats, y, stats, pre, ctx.pre_act, ctx.plan)
    return dy, dpre if dpre.numel() else None, None, None


def _materialise_backward_defined(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, plan: str
) -> tuple[Tensor | None, ...]:
    return tuple(derivatives.materialise_gradients(dv, y, Pending(coef, act)))


def _moments_backward_defined(
    dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, pre_act: str, plan: str
) -> tuple[Tensor | None, ...]:
    norm_input = NormInput(pre, pre_act)
    return derivatives.after_moments(torch.zeros_like(y), dstats, y, norm_input)


define(
    "materialise(Tensor y, Tensor coef, str act, str plan) -> Tensor",
    materialise,
    lambda y, coef, act, plan: raw_like(y, y.shape),
    backward=_materialise_backward,
    setup=_materialise_setup,
)
define(
    "materialise_backward(Tensor dv, Tensor y, Tensor coef, str act, str plan) -> (Tensor, Tensor)",
    materialise_backward,
    lambda dv, y, coef, act, plan: (raw_like(y, y.shape), torch.empty_like(coef)),
    second=_materialise_backward_defined,
)
define(
    "moments(Tensor y, Tensor? pre, str pre_act, str plan) -> Tensor",
    moments,
    lambda y, pre, pre_act, plan: stats_like(y),
    backward=_moments_backward,
    setup=_moments_setup,
)
define(
    "moments_backward(Tensor dstats, Tensor y, Tensor stats, Tensor? pre, str pre_act, str plan)"
    " -> (Tensor, Tensor)",
    moments_backward,
    lambda dstats, y, stats, pre, pre_act, plan: (
        raw_like(y, y.shape),
        absent(y) if pre is None else torch.empty_like(pre),
    ),
    second=_moments_backward_defined,
)

_eager_materialise = differentiable(materialise, _materialise_setup, _materialise_backward)
_eager_moments = differentiable(moments, _moments_setup, _moments_backward)


def written(y: Tensor, coef: Tensor, act: str, plan: Plan) -> Tensor:
    """``fastfilm::materialise``, called directly where nothing watches."""
    operator = _eager_materialise if direct(y, coef) else torch.ops.fastfilm.materialise
    v: Tensor = operator(y, coef, act, str(plan))
    return v


def moments_of(y: Tensor, norm_input: NormInput, plan: Plan) -> Tensor:
    """``fastfilm::moments``, called directly where nothing watches."""
    pre, act = norm_input
    operator = _eager_moments if direct(y, pre) else torch.ops.fastfilm.moments
    stats: Tensor = operator(y, pre, act, str(plan))
    return stats
