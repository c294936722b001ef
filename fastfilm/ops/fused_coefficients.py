"""The [N, C]-sized algebra as one call of a backend each way, where nothing but its launch costs time.

It agrees with ``coefficients.py``, which is its definition. Backends offer it as ``block_coefficients`` and
``block_coefficients_backward``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .backends import forced
from .higher import pull
from .library import recalling

Tensors = tuple[Tensor | None, ...]
"""Running mean and variance, moments, norm weight and bias, conv bias, γ, β, dropout mask, slope."""

Definition = Callable[[Any, Tensors, Tensor], Tensor]
"""Coefficients of a kind and its tensors, in the type and on the device of a third; moves nothing."""


class _BlockCoefficients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        kind: Any,
        momentum: float,
        definition: Definition,
        device: torch.device,
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.kernels, ctx.kind, ctx.definition = kernels, kind, definition
        ctx.forced = forced()[:2]
        if kind.update:
            # the moments say what backward needs, and the running statistics have moved on by then
            ctx.save_for_backward(None, None, *tensors[2:])
        else:
            ctx.save_for_backward(*tensors)
        coef: Tensor = kernels.block_coefficients(kind, momentum, tensors, device)
        return coef

    @staticmethod
    @recalling
    def backward(ctx: Any, dcoef: Tensor) -> tuple[Tensor | None, ...]:
        wanted, tensors = ctx.needs_input_grad[5:], ctx.saved_tensors
        if torch.is_grad_enabled():
            found = pull(lambda *given: ctx.definition(ctx.kind, given, dcoef), tensors, dcoef)
            grads = [g if want else None for g, want in zip(found, wanted, strict=True)]
        else:
            grads = ctx.kernels.block_coefficients_backward(ctx.kind, tensors, dcoef, wanted)
        return None, None, None, None, None, *grads


# callers have made sure that no functorch transform is active
_apply = super(torch.autograd.Function, _BlockCoefficients).apply


def block_coefficients(
    kernels: ModuleType,
    kind: Any,
    momentum: float,
    tensors: Tensors,
    definition: Definition,
    device: torch.device,
) -> Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C] of a block of ``kind``; moves its running statistics.

    Args:
        kernels: launchers of the backend.
        kind: a ``tail.Kind``.
        tensors: [C] each; moments [2, N, C]; γ, β and mask [C], [1, C] or [N, C]; slope [1] or [C].
        device: where the coefficients are wanted.
        definition: the same in plain PyTorch, from which higher derivatives come.
    """
    if torch.is_grad_enabled():
        coef: Tensor = _apply(kernels, kind, momentum, definition, device, *tensors)
    else:
        coef = kernels.block_coefficients(kind, momentum, tensors, device)
    return coef
