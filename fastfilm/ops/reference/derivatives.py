"""Gradients taken from the reference: differentiable themselves, to any order.

The first derivative of an operator comes from its kernels. With ``create_graph=True`` everything after it comes
from here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import Addends, Geometry, NormInput, Pending, Source, views
from ..vendor import safe_convolution
from .block import materialise, moments, residual

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


def convolution(v: Tensor, weight: Tensor, bias: Maybe, geometry: Geometry) -> Tensor:
    """``reference.convolution`` to be differentiated twice: of 16-bit types on a CPU in float32.

    PyTorch's second derivative convolves maps with maps, forms that the precautions do not look at.
    """
    if v.device.type != "cpu" or v.dtype.itemsize != 2:
        return safe_convolution(v, weight, bias, geometry)
    added = None if bias is None else bias.float()
    return safe_convolution(v.float(), weight.float(), added, geometry).to(v.dtype)


def written(sources: Sequence[Source]) -> Tensor:
    """The map [N, ΣC, *S] that a convolution sees of its sources."""
    parts = [
        views.seen(s.raw if s.coef is None else materialise(s.raw, s.coef, s.act), s.view)
        for s in sources
    ]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def after_moments(
    dy: Tensor, dstats: Tensor, y: Tensor, norm_input: NormInput
) -> tuple[Tensor, Maybe]:
    """e, the sum of dy and the gradient of the moments of ``y``, and dpre with the sum of e in its first row."""
    pre, act = norm_input
    added, dpre = pull(lambda y, pre: moments(y, pre, act), (y, pre), dstats)
    assert added is not None
    e = dy + added.to(dy.dtype)
    if dpre is None:
        return e, None
    space = (0, *range(2, y.dim()))
    return e, torch.stack([e.to(dpre.dtype).sum(space), dpre[1]])


def convolution_gradients(
    e: Tensor, x: Tensor, weight: Tensor, pending: Pending, geometry: Geometry
) -> list[Maybe]:
    """dx, dweight and dcoef of a convolution of a map behind its pending affine."""

    def forward(x: Tensor, weight: Tensor, coef: Maybe) -> Tensor:
        return convolution(written([Source(x, coef, pending.act)]), weight, None, geometry)

    return pull(forward, (x, weight, pending.coef), e)


def materialise_gradients(dv: Tensor, y: Tensor, pending: Pending) -> list[Maybe]:
    """dy and dcoef of ``materialise``."""
    return pull(lambda y, coef: materialise(y, coef, pending.act), (y, pending.coef), dv)


def residual_gradients(dv: Tensor, addends: Addends) -> list[Maybe]:
    """dy, dcoef, dother, dother_coef and dslope of ``residual``."""
    y, coef, act, other, other_coef, slope, outer = addends

    def forward(y: Tensor, coef: Maybe, other: Tensor, other_coef: Maybe, slope: Maybe) -> Tensor:
        return residual(Addends(y, coef, act, other, other_coef, slope, outer))

    return pull(forward, (y, coef, other, other_coef, slope), dv)
