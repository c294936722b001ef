"""The [N, C]-sized algebra as one call of a backend each way, where nothing but its launch costs time.

It agrees with ``coefficients.py``, which is its definition. Backends offer it as ``block_coefficients`` and
``block_coefficients_backward``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]
"""Running mean and variance, moments, norm weight and bias, conv bias, γ, β, dropout mask, slope."""


class _BlockCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, kind: Any, momentum: float, *tensors: Tensor | None
    ) -> Tensor:
        ctx.kernels, ctx.kind = kernels, kind
        if kind.update:
            # the moments say what backward needs, and the running statistics have moved on by then
            ctx.save_for_backward(None, None, *tensors[2:])
        else:
            ctx.save_for_backward(*tensors)
        coef: Tensor = kernels.block_coefficients(kind, momentum, tensors)
        return coef

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dcoef: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3:]
        grads = ctx.kernels.block_coefficients_backward(ctx.kind, ctx.saved_tensors, dcoef, wanted)
        return None, None, None, *grads


# callers have made sure that no functorch transform is active
_apply = super(torch.autograd.Function, _BlockCoefficients).apply


def block_coefficients(kernels: ModuleType, kind: Any, momentum: float, tensors: Tensors) -> Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C] of a block of ``kind``; moves its running statistics.

    Args:
        kernels: launchers of the backend.
        kind: a ``tail.Kind``.
        tensors: [C] each; moments [2, N, C]; γ, β and mask [C], [1, C] or [N, C]; slope [1] or [C].
    """
    if torch.is_grad_enabled():
        coef: Tensor = _apply(kernels, kind, momentum, *tensors)
    else:
        coef = kernels.block_coefficients(kind, momentum, tensors)
    return coef
