"""``fastfilm::residual``: the sum of two maps behind their affines, and its activation, in one pass each way.

    v = outer(M(y; coef, act) + M(other; other_coef); slope)

M is ``materialise``. One of act and outer is none. Kept for the backward pass are the raw maps alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import launchers
from ..reference import derivatives
from ..spec import Addends, Plan, absent, channels_last, direct, raw_like
from .library import define, differentiable

_Maybe = Tensor | None


def residual(*args: Any) -> Tensor:
    """Implementation of ``fastfilm::residual``; see the module docstring."""
    *addends, plan = args
    return launchers.of(Plan.of(plan).backend).residual(_dense(Addends(*addends)))


def residual_backward(dv: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Implementation of ``fastfilm::residual_backward``: dy, dcoef, dother, dother_coef, dslope (or empty)."""
    *addends, at_other, plan = args
    given, kernels = _dense(Addends(*addends)), launchers.of(Plan.of(plan).backend)
    grads = kernels.residual_backward(channels_last(dv), given, at_other)
    return tuple(absent(given.y) if g is None else g for g in grads)


def _dense(addends: Addends) -> Addends:
    return addends._replace(y=channels_last(addends.y), other=channels_last(addends.other))


def _residual_backward_fake(dv: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *addends, at_other, _ = args
    y, coef, _, _, other_coef, slope, _ = Addends(*addends)

    def like(t: _Maybe) -> Tensor:
        return absent(y) if t is None else torch.empty_like(t).contiguous()

    dother = raw_like(y, y.shape) if at_other else absent(y)
    return raw_like(y, y.shape), like(coef), dother, like(other_coef), like(slope)


def _residual_backward_defined(dv: Tensor, *args: Any) -> tuple[_Maybe, ...]:
    *addends, at_other, _ = args
    dy, dcoef, dother, *rest = derivatives.residual_gradients(dv, Addends(*addends))
    return dy, dcoef, dother if at_other else None, *rest


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, coef, ctx.act, other, other_coef, slope, ctx.outer, ctx.plan = inputs
    ctx.save_for_backward(y, coef, other, other_coef, slope)


def _backward(ctx: Any, dv: Tensor) -> tuple[_Maybe, ...]:
    y, coef, other, other_coef, slope = ctx.saved_tensors
    needs = ctx.needs_input_grad
    short = direct(dv) and not torch.is_grad_enabled()
    operator = residual_backward if short else torch.ops.fastfilm.residual_backward
    summands = y, coef, ctx.act, other, other_coef, slope, ctx.outer
    dy, dcoef, dother, dother_coef, dslope = operator(dv, *summands, needs[3], ctx.plan)
    return (
        dy if needs[0] else None,
        dcoef if needs[1] else None,
        None,
        dother if needs[3] else None,
        dother_coef if needs[4] else None,
        dslope if needs[5] else None,
        None,
        None,
    )


define(
    "residual(Tensor y, Tensor? coef, str act, Tensor other, Tensor? other_coef, Tensor? slope, str outer,"
    " str plan) -> Tensor",
    residual,
    lambda y, *rest: raw_like(y, y.shape),
    backward=_backward,
    setup=_setup,
)
define(
    "residual_backward(Tensor dv, Tensor y, Tensor? coef, str act, Tensor other, Tensor? other_coef,"
    " Tensor? slope, str outer, bool at_other, str plan) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    residual_backward,
    _residual_backward_fake,
    second=_residual_backward_defined,
)

eager_residual = differentiable(residual, _setup, _backward)
