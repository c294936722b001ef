"""Tensor subclasses that keep their values themselves, such as MONAI's ``MetaTensor``, as operands.

A class with a ``__torch_function__`` alone adds something to a tensor in Python and leaves the values to PyTorch.
Such operands are made plain tensors once for a whole call, and the class is asked once what it makes of a result,
as PyTorch asks it for its own functions. A class with a ``__torch_dispatch__`` decides what a tensor's values are:
operators on it go through the dispatcher.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

PLAIN = frozenset((Tensor, nn.Parameter, type(None)))
"""Types of operands that are nothing else."""


class _Thread(threading.local):
    inside = False


_thread = _Thread()


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """Results are plain tensors: whoever entered asks the classes in the end."""
    outer, _thread.inside = _thread.inside, True
    try:
        yield
    finally:
        _thread.inside = outer


def transparent(kind: type) -> bool:
    """Whether tensors of a class keep their values as plain ones do, and only their functions are overridden."""
    return (
        kind not in PLAIN
        and issubclass(kind, Tensor)
        and not issubclass(kind, UninitializedTensorMixin)
        and kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )


def among(operands: Iterable[Any]) -> tuple[Tensor, ...]:
    """Those of transparent classes among some operands, and those that unwritten maps among them come from."""
    if torch.compiler.is_compiling():
        return tuple([t for t in operands if isinstance(t, Tensor) and transparent(type(t))])
    found: list[Tensor] = []
    for operand in operands:
        if transparent(type(operand)):
            found.append(operand)
        elif not _thread.inside and not isinstance(operand, Tensor):
            found += getattr(operand, "origin", ())
    return tuple(found)


def stripped(operand: Any) -> Any:
    """A tensor of a transparent class as a plain one, in the same memory and with the same gradient."""
    if not transparent(type(operand)):
        return operand
    with torch._C.DisableTorchFunctionSubclass():
        return operand.as_subclass(Tensor)


def given_back(result: Tensor, origin: tuple[Tensor, ...]) -> Tensor:
    """The result of a function of ``origin`` as their classes have it."""

    def fastfilm_result(*operands: Tensor) -> Tensor:
        if has_torch_function(operands):
            asked: Tensor = handle_torch_function(fastfilm_result, operands, *operands)
            return asked
        return result

    return fastfilm_result(*origin) if origin and not _thread.inside else result


def through(
    function: Callable[..., Any], origin: tuple[Tensor, ...], *args: Any, **options: Any
) -> Any:
    """``function`` of plain tensors in place of those of transparent classes, its results as these have them.

    A compiler leaves such a call out of its graph: it runs as without it.

    Args:
        origin: ``among`` the operands.
        args, options: of the function; tensors in lists, tuples and dictionaries too.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(through)(function, origin, *args, **options)
    args, options = pytree.tree_map(stripped, (args, options))
    with inside():
        result = function(*args, **options)

    def back(value: Any) -> Any:
        if isinstance(value, Tensor):
            return given_back(value, origin)
        if hasattr(value, "origin"):
            value.origin = origin
        return value

    return pytree.tree_map(back, result)


Function = TypeVar("Function", bound=Callable[..., Any])


def unwrapping(function: Function) -> Function:
    """A function, or a ``forward``, that runs on plain tensors whatever transparent classes it is given."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        origin = among((*args, *options.values()))
        if origin:
            return through(function, origin, *args, **options)
        return function(*args, **options)

    return run  # type: ignore[return-value]
