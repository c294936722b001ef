"""Registration of the ``fastfilm::`` operators with ``torch.library``, and their direct calls in eager mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import settings
from ..spec.subclasses import PLAIN, stripped

_LIBRARY = torch.library.Library("fastfilm", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., Any] | None = None,
    cast: int = 0,
    second: Callable[..., Any] | None = None,
) -> None:
    """Defines ``fastfilm::<schema>`` with its kernel, its shape function, its gradient and its autocast rule.

    An operator without ``backward`` raises when it is differentiated: silence would be a wrong gradient.

    Args:
        cast: how many of the first arguments autocast brings to its dtype; 0: the operator runs in its map's.
        second: the operator in differentiable PyTorch, from which its gradient is taken: of the operators that
            are gradients themselves. Results that it does not have are None.
    """
    plain = schema.partition("(")[0]
    name = "fastfilm::" + plain
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(plain, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    for device in ("cpu", "cuda") if cast else ():
        _LIBRARY.impl(plain, _autocasting(plain, device, cast), f"Autocast{device.upper()}")
    if second is not None:
        setup, backward = _derived(second)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"{name} is not differentiable; use fastfilm.backend('reference') for higher derivatives"
            )

    if setup is not None:
        setup, backward = _choosing(setup, backward)
    torch.library.register_autograd(name, backward, setup_context=setup, lib=_LIBRARY)


def _autocasting(name: str, device: str, cast: int) -> Callable[..., Any]:
    """The operator behind its autocast rule: statistics, coefficients and float64 keep their types."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        given = [
            t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t
            for t in args[:cast]
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return getattr(torch.ops.fastfilm, name)(*given, *args[cast:])

    return call


def _derived(definition: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The gradient of an operator from its definition in differentiable PyTorch."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [isinstance(v, Tensor) for v in inputs]
        ctx.rest = [None if t else v for v, t in zip(inputs, tensors, strict=True)]
        ctx.at = [i for i, t in enumerate(tensors) if t]
        ctx.save_for_backward(*(inputs[i] for i in ctx.at))

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept: list[Tensor] = []

        def of_tensors(*given: Tensor) -> tuple[Tensor, ...]:
            args = list(ctx.rest)
            for i, t in zip(ctx.at, given, strict=True):
                args[i] = t
            found = definition(*args)
            kept[:] = [g for g, t in zip(grads, found, strict=True) if t is not None]
            return tuple(t for t in found if t is not None)

        back = torch.func.vjp(of_tensors, *ctx.saved_tensors)[1]
        found: list[Tensor | None] = [None] * len(ctx.rest)
        for i, grad in zip(ctx.at, back(tuple(kept)), strict=True):
            found[i] = grad
        return tuple(found)

    return setup, backward


def _choosing(
    setup: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A gradient that is computed with the backend forced where its forward was: autograd has own threads."""

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.forced = settings.forced()
        setup(ctx, inputs, output)

    return keep, recalling(backward)


def recalling(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of plain tensors, with the choice in force that is kept as ``ctx.forced``."""

    @functools.wraps(backward)
    def recall(ctx: Any, *grads: Any) -> Any:
        if not PLAIN.issuperset(map(type, grads)):
            grads = tuple([stripped(g) for g in grads])
        if ctx.forced == settings.forced():
            return backward(ctx, *grads)
        with settings.force(*ctx.forced):
            return backward(ctx, *grads)

    return recall


def differentiable(
    implementation: Callable[..., Any], setup: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``implementation`` with its gradient, for eager mode: what ``define`` registers, without dispatch."""
    setup, backward = _choosing(setup, backward)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = implementation(*inputs)
            setup(ctx, inputs, output)
            return output

    Eager.backward = staticmethod(backward)  # type: ignore[method-assign]
    Eager.__name__ = Eager.__qualname__ = implementation.__name__
    return applied(Eager, implementation)


def applied(
    function: type[torch.autograd.Function], plain: Callable[..., Any]
) -> Callable[..., Any]:
    """``function.apply`` where gradients may be asked for, else ``plain``; for tensors that are ``direct``."""
    # the rest of ``Function.apply`` is for functorch, which ``direct`` has ruled out
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*inputs: Any) -> Any:
        return apply(*inputs) if torch.is_grad_enabled() else plain(*inputs)

    return call
