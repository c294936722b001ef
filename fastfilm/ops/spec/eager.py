"""A test for plain eager mode, in which functions are called directly instead of through PyTorch's dispatcher.

The dispatcher's way through a Python operator costs tens of microseconds. It is needed only where something
watches: a compiler, a tracer, a dispatch mode, a functional transform or a tensor subclass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .subclasses import PLAIN

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
