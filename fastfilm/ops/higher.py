"""Second derivatives: the gradients that the kernels compute, once more in differentiable PyTorch.

An operator's backward is an operator too. Its own gradient is taken here from the reference, so that
``create_graph=True`` works to any order: the first derivative still comes from the kernels, everything after it
from PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

Maybe = Tensor | None


def pull(
    function: Callable[..., Any], inputs: Sequence[Maybe], cotangents: Tensor | tuple[Tensor, ...]
) -> list[Maybe]:
    """Gradients of ``function(*inputs)`` at each of its inputs (None at None); differentiable themselves."""
    present = [i for i, t in enumerate(inputs) if t is not None]

    def of_present(*given: Tensor) -> Any:
        full: list[Maybe] = [None] * len(inputs)
        for i, t in zip(present, given, strict=True):
            full[i] = t
        return function(*full)

    back = torch.func.vjp(of_present, *(inputs[i] for i in present))[1]
    grads: list[Maybe] = [None] * len(inputs)
    for i, grad in zip(present, back(cotangents), strict=True):
        grads[i] = grad
    return grads


def convolution(v: Tensor, weight: Tensor, bias: Maybe, *geometry: Any) -> Tensor:
    """``reference.convolution`` to be differentiated twice: of 16-bit types on a CPU in float32.

    PyTorch's second derivative convolves maps with maps, forms that ``reference.precautions`` does not look at.
    """
    if v.device.type != "cpu" or v.dtype.itemsize != 2:
        return reference.convolution(v, weight, bias, *geometry)
    added = None if bias is None else bias.float()
    return reference.convolution(v.float(), weight.float(), added, *geometry).to(v.dtype)


def after_moments(
    dy: Tensor, dstats: Tensor, y: Tensor, pre: Maybe, pre_act: str
) -> tuple[Tensor, Maybe]:
    """e = dy + what the moments of ``y`` add to it, and dpre, whose first row is the sum of e."""
    added, dpre = pull(lambda y, pre: reference.moments(y, pre, pre_act), (y, pre), dstats)
    assert added is not None
    e = dy + added.to(dy.dtype)
    if dpre is None:
        return e, None
    space = (0, *range(2, y.dim()))
    return e, torch.stack([e.to(dpre.dtype).sum(space), dpre[1]])


def conv_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What ``conv_backward_backward`` needs of a call of ``fastfilm::conv_backward``."""
    dy, dstats, x, weight, coef, act, pre, pre_act, y, _, *geometry, _, _, _ = inputs
    ctx.save_for_backward(dy, dstats, x, weight, coef, pre, y)
    ctx.needed = inputs[-2:]
    ctx.acts, ctx.geometry = (act, pre_act), geometry


def conv_backward_backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
    """Gradient of ``fastfilm::conv_backward`` at its tensors."""
    act, pre_act = ctx.acts
    need_input, need_weight = ctx.needed
    *_, pre, y = ctx.saved_tensors
    wanted = (
        need_input,
        need_weight,
        need_input and ctx.saved_tensors[4] is not None,
        y is not None and pre is not None,
    )

    def gradients(
        dy: Tensor, dstats: Maybe, x: Tensor, weight: Tensor, coef: Maybe, pre: Maybe, y: Maybe
    ) -> tuple[Maybe, ...]:
        e, dpre = dy, None
        if y is not None:
            assert dstats is not None
            e, dpre = after_moments(dy, dstats, y, pre, pre_act)

        def forward(x: Tensor, weight: Tensor, coef: Maybe) -> Tensor:
            v = x if coef is None else reference.materialise(x, coef, act)
            return convolution(v, weight, None, *ctx.geometry)

        found = (*pull(forward, (x, weight, coef), e), dpre)
        return tuple(t for t, want in zip(found, wanted, strict=True) if want)

    kept = tuple(g for g, want in zip(grads, wanted, strict=True) if want)
    ddy, ddstats, dx, dweight, dcoef, dpre, dy = pull(gradients, ctx.saved_tensors, kept)
    return (ddy, ddstats, dx, dweight, dcoef, None, dpre, None, dy, *(None,) * 10)


def materialise_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What ``materialise_backward_backward`` needs of a call of ``fastfilm::materialise_backward``."""
    dv, y, coef, ctx.act, _ = inputs
    ctx.save_for_backward(dv, y, coef)


def materialise_backward_backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
    """Gradient of ``fastfilm::materialise_backward`` at its tensors."""

    def gradients(dv: Tensor, y: Tensor, coef: Tensor) -> tuple[Maybe, ...]:
        return tuple(pull(lambda y, coef: reference.materialise(y, coef, ctx.act), (y, coef), dv))

    return (*pull(gradients, ctx.saved_tensors, grads), None, None)


def residual_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What ``residual_backward_backward`` needs of a call of ``fastfilm::residual_backward``."""
    dv, y, coef, act, other, other_coef, slope, outer, at_other, _ = inputs
    ctx.save_for_backward(dv, y, coef, other, other_coef, slope)
    ctx.acts, ctx.at_other = (act, outer), at_other


def residual_backward_backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
    """Gradient of ``fastfilm::residual_backward`` at its tensors."""
    act, outer = ctx.acts
    given = [t is not None for t in ctx.saved_tensors[1:]]
    given[2] = ctx.at_other

    def gradients(dv: Tensor, *summands: Maybe) -> tuple[Maybe, ...]:
        found = pull(
            lambda y, coef, other, other_coef, slope: reference.residual(
                y, coef, act, other, other_coef, slope, outer
            ),
            summands,
            dv,
        )
        return tuple(g for g, want in zip(found, given, strict=True) if want)

    kept = tuple(g for g, want in zip(grads, given, strict=True) if want)
    ddv, dy, dcoef, dother, dother_coef, dslope = pull(gradients, ctx.saved_tensors, kept)
    return ddv, dy, dcoef, None, dother, dother_coef, dslope, None, None, None


def moments_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """What ``moments_backward_backward`` needs of a call of ``fastfilm::moments_backward``."""
    dstats, y, _, pre, ctx.pre_act, _ = inputs
    ctx.save_for_backward(dstats, y, pre)


def moments_backward_backward(ctx: Any, *grads: Tensor) -> tuple[Maybe, ...]:
    """Gradient of ``fastfilm::moments_backward`` at its tensors."""
    has_pre = ctx.saved_tensors[2] is not None

    def gradients(dstats: Tensor, y: Tensor, pre: Maybe) -> tuple[Maybe, ...]:
        found = pull(lambda y, pre: reference.moments(y, pre, ctx.pre_act), (y, pre), dstats)
        return tuple(found if has_pre else found[:1])

    ddstats, dy, dpre = pull(gradients, ctx.saved_tensors, grads if has_pre else grads[:1])
    return ddstats, dy, None, dpre, None, None
