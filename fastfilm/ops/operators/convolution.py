"""``fastfilm::conv``: pending affine of its input in front, moments of its output behind.

    y, stats = conv(x, weight, bias, coef, act, pre, pre_act, …)

x is the producer's raw map; coef and act say what is pending on it (None: nothing). bias is added before y is
rounded to its dtype, by the plans of which ``Plan.adds_bias`` says so; it has a gradient where there are moments
with ``pre`` (whose shift is then a constant), and is a constant otherwise. Only x, y and [N, C]-sized numbers are
kept for backward; the activated input is recomputed. In backward

    e   = dy + du/dy · (dmean + 2 (u - mean) dvar) / |S|      gradient at the raw output
    dv  = convᵀ(e, W),   dW = Σ v ⊗ e
    dx, dcoef from dv and x by the chain rule of the affine

PyTorch differentiates everything that happens to the moments afterwards, so the normalisation's
backward arrives as dmean and dvar.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import launchers
from ..reference import derivatives
from ..spec import (
    GEOMETRY,
    Geometry,
    Gradient,
    NormInput,
    Pending,
    Plan,
    Source,
    Wanted,
    absent,
    direct,
    raw_like,
    stats_like,
)
from .library import define


class Forward(NamedTuple):
    """A call of ``fastfilm::conv``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    pending: Pending
    norm_input: NormInput
    geometry: Geometry
    moments: bool
    plan: Plan

    @classmethod
    def of(cls, args: Sequence[Any]) -> Forward:
        """From the operator's arguments."""
        x, weight, bias, coef, act, pre, pre_act, *geometry, moments, plan = args
        structs = Pending(coef, act), NormInput(pre, pre_act), Geometry.of(geometry)
        return cls(x, weight, bias, *structs, moments, Plan.of(plan))


class Backward(NamedTuple):
    """A call of ``fastfilm::conv_backward``."""

    gradient: Gradient
    x: Tensor
    weight: Tensor
    pending: Pending
    geometry: Geometry
    plan: Plan
    wanted: Wanted

    @classmethod
    def of(cls, args: Sequence[Any]) -> Backward:
        """From the operator's arguments."""
        dy, dstats, x, weight, coef, act, pre, pre_act, y, stats, *geometry, plan, at, at_weight = (
            args
        )
        gradient = Gradient(dy) if y is None else Gradient(dy, y, stats, dstats, pre, pre_act)
        wanted = Wanted([at], at_weight, gradient.pre is not None)
        structs = Pending(coef, act), Geometry.of(geometry), Plan.of(plan), wanted
        return cls(gradient, x, weight, *structs)

    @property
    def present(self) -> tuple[bool, bool, bool, bool]:
        """Which of dx, dweight, dcoef and dpre there are."""
        (at,), at_weight, _ = self.wanted
        return at, at_weight, at and self.pending.coef is not None, self.gradient.pre is not None


def conv(*args: Any) -> tuple[Tensor, Tensor]:
    """Implementation of ``fastfilm::conv``; see the module docstring."""
    c = Forward.of(args)
    bias = c.bias if c.plan.adds_bias else None
    given = [Source(c.x, *c.pending)], c.weight, bias, c.norm_input if c.moments else None
    route, kernels = launchers.ROUTES[c.plan.route], launchers.of(c.plan.backend)
    y, stats = route.forward(kernels, *given, c.geometry)
    return y, absent(y, torch.float32) if stats is None else stats


def conv_backward(*args: Any) -> tuple[Tensor, ...]:
    """Implementation of ``fastfilm::conv_backward``: dx, dweight, dcoef, dpre (empty where not needed).

    With moments and ``pre``, dpre's first row is the gradient of the bias.
    """
    c = Backward.of(args)
    given = c.gradient, [Source(c.x, *c.pending)], c.weight, c.geometry, c.wanted
    route, kernels = launchers.ROUTES[c.plan.route], launchers.of(c.plan.backend)
    ((dx, dcoef),), dweight, dpre = route.backward(kernels, *given)
    return tuple([absent(c.x) if t is None else t for t in (dx, dweight, dcoef, dpre)])


def _conv_fake(*args: Any) -> tuple[Tensor, Tensor]:
    c = Forward.of(args)
    y = raw_like(c.x, c.geometry.output_shape(c.x, c.weight))
    return y, stats_like(y) if c.moments else absent(y, torch.float32)


def _conv_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    c = Backward.of(args)
    at, at_weight, at_coef, at_pre = c.present
    return (
        raw_like(c.x, c.x.shape) if at else absent(c.x),
        torch.empty_like(c.weight) if at_weight else absent(c.x),
        torch.empty_like(c.pending.coef) if at_coef else absent(c.x),  # type: ignore[arg-type]
        torch.empty_like(c.gradient.pre) if at_pre else absent(c.x),  # type: ignore[arg-type]
    )


def _conv_backward_defined(*args: Any) -> tuple[Tensor | None, ...]:
    """``conv_backward`` in differentiable PyTorch."""
    c = Backward.of(args)
    dy, y, _, dstats, pre, pre_act, _ = c.gradient
    e, dpre = dy, None
    if y is not None:
        assert dstats is not None
        e, dpre = derivatives.after_moments(dy, dstats, y, NormInput(pre, pre_act))
    found = derivatives.convolution_gradients(e, c.x, c.weight, c.pending, c.geometry)
    each = zip((*found, dpre), c.present, strict=True)
    return tuple(t if present else None for t, present in each)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, coef, act, pre, pre_act, *geometry, moments, plan = inputs
    y, stats = output if moments else (None, None)
    ctx.save_for_backward(x, weight, coef, pre, y, stats)
    ctx.acts, ctx.rest = (act, pre_act), (*geometry, plan)


def _backward(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, coef, pre, y, stats = ctx.saved_tensors
    act, pre_act = ctx.acts
    at_x, at_weight, at_bias, at_coef, _, at_pre, *others = ctx.needs_input_grad
    # with create_graph the operator runs: it has a second derivative
    short = direct(dy) and not torch.is_grad_enabled()
    operator = conv_backward if short else torch.ops.fastfilm.conv_backward
    dx, dweight, dcoef, dpre = operator(
        *(dy, dstats, x, weight, coef, act, pre, pre_act, y, stats),
        *(*ctx.rest, at_x or at_coef, at_weight),
    )
    return (
        dx if at_x else None,
        dweight if at_weight else None,
        dpre[0].to(dy.dtype) if at_bias and dpre.numel() else None,
        dcoef if at_coef else None,
        None,
        dpre if at_pre and dpre.numel() else None,
        *(None for _ in others),
    )


def conv_apply(*args: Any) -> Tensor:
    """Implementation of ``fastfilm::conv_apply``: the finished block where its affine is known (inference)."""
    x, weight, bias, coef, act, out_coef, out_act, *geometry, text = args
    plan, finish = Plan.of(text), Pending(out_coef, out_act)
    route, kernels = launchers.ROUTES[plan.route], launchers.of(plan.backend)
    read = [Source(x, coef, act)]
    added = bias if plan.adds_bias else None
    done: Tensor = route.finished(kernels, read, weight, added, finish, Geometry.of(geometry))
    return done


def _conv_apply_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return raw_like(x, Geometry.of(rest[5:11]).output_shape(x, weight))


define(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? coef, str act, Tensor? pre, str pre_act,"
    f" {GEOMETRY}, bool moments, str plan) -> (Tensor, Tensor)",
    conv,
    _conv_fake,
    backward=_backward,
    setup=_setup,
    cast=3,
)
define(
    "conv_backward(Tensor dy, Tensor dstats, Tensor x, Tensor weight, Tensor? coef, str act, Tensor? pre,"
    f" str pre_act, Tensor? y, Tensor? stats, {GEOMETRY}, str plan, bool need_input, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    conv_backward,
    _conv_backward_fake,
    second=_conv_backward_defined,
)
define(
    "conv_apply(Tensor x, Tensor weight, Tensor? bias, Tensor? coef, str act, Tensor out_coef,"
    f" str out_act, {GEOMETRY}, str plan) -> Tensor",
    conv_apply,
    _conv_apply_fake,
    cast=3,
)
