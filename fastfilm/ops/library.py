"""Registration of the ``fastfilm::`` operators with ``torch.library``, and a short way to them in eager mode.

The dispatcher's way through a Python operator costs tens of microseconds. Where nothing can be watching (no
compiler, no tracer, no dispatch mode, no tensor subclass) the same functions are called directly.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import backends
from .subclasses import PLAIN, stripped

_LIBRARY = torch.library.Library("fastfilm", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., Any] | None = None,
    cast: int = 0,
) -> None:
    """Defines ``fastfilm::<schema>`` with its kernel, its shape function, its gradient and its autocast rule.

    An operator without ``backward`` raises when it is differentiated: silence would be a wrong gradient.

    Args:
        cast: how many of the first arguments autocast brings to its dtype; 0: the operator runs in its map's.
    """
    plain = schema.partition("(")[0]
    name = "fastfilm::" + plain
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(plain, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    for device in ("cpu", "cuda") if cast else ():
        _LIBRARY.impl(plain, _autocasting(plain, device, cast), f"Autocast{device.upper()}")
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


def _choosing(
    setup: Callable[..., Any], backward: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A gradient that is computed with the backend forced where its forward was: autograd has own threads."""

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.forced = backends.forced()[:2]
        setup(ctx, inputs, output)

    return keep, recalling(backward)


def recalling(backward: Callable[..., Any]) -> Callable[..., Any]:
    """``backward`` of plain tensors, with the choice in force that is kept as ``ctx.forced``."""

    @functools.wraps(backward)
    def recall(ctx: Any, *grads: Any) -> Any:
        if not PLAIN.issuperset(map(type, grads)):
            grads = tuple([stripped(g) for g in grads])
        if ctx.forced == backends.forced()[:2]:
            return backward(ctx, *grads)
        with backends.backend(*ctx.forced):
            return backward(ctx, *grads)

    return recall


_observers = 0


@contextlib.contextmanager
def observed() -> Iterator[None]:
    """For a dispatch mode that watches operators and lets eager mode run as it does without it."""
    global _observers
    _observers += 1
    try:
        yield
    finally:
        _observers -= 1


def direct(x: Tensor, *others: Tensor | None) -> bool:
    """Whether operators on ``x``, beside ``others``, may be called without the dispatcher."""
    return (
        type(x) in PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == _observers
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and (not others or PLAIN.issuperset(map(type, others)))
    )


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

    # what ``Function.apply`` does beside this is for functorch, which ``direct`` has ruled out
    apply = super(torch.autograd.Function, Eager).apply

    def call(*inputs: Any) -> Any:
        return apply(*inputs) if torch.is_grad_enabled() else implementation(*inputs)

    return call
