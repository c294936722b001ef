"""Registration of the ``fastfilm::`` operators with ``torch.library``, and a short way to them in eager mode.

The dispatcher's way through a Python operator costs tens of microseconds. Where nothing can be watching (no
compiler, no tracer, no dispatch mode, no tensor subclass) the same functions are called directly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARY = torch.library.Library("fastfilm", "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup: Callable[..., Any] | None = None,
) -> None:
    """Defines ``fastfilm::<schema>`` with its kernel, its shape function and its gradient.

    An operator without ``backward`` raises when it is differentiated: silence would be a wrong gradient.
    """
    name = "fastfilm::" + schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(schema.partition("(")[0], implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    if backward is None:

        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(
                f"{name} is not differentiable; use fastfilm.backend('reference') for higher derivatives"
            )

    torch.library.register_autograd(name, backward, setup_context=setup, lib=_LIBRARY)


_PLAIN = (Tensor, nn.Parameter)


def direct(x: Tensor) -> bool:
    """Whether operators on ``x`` may be called without the dispatcher."""
    return (
        type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
    )


def differentiable(
    implementation: Callable[..., Any], setup: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """``implementation`` with its gradient, for eager mode: what ``define`` registers, without dispatch."""

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
