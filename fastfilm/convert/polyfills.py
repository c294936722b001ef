"""Substitutes for functions that TorchDynamo answers otherwise than eager PyTorch does, or does not trace."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_unnoticed = contextvars.ContextVar("unnoticed", default=False)
_PACKAGES = tuple(
    f"{p}/" for p in (pathlib.Path(torch.__file__).parent, pathlib.Path(__file__).parents[1])
)
"""Code here is followed as PyTorch means it to be: it is told of the compiler."""


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Lets a model that asks whether it is compiled hear no, as it would unconverted.

    Models skip checks of their inputs and outputs under a compiler.
    """
    token = _unnoticed.set(True)
    try:
        yield
    finally:
        _unnoticed.reset(token)


@functools.cache
def register() -> None:
    """Puts the functions of this file into TorchDynamo's tables."""
    _register_questions()
    _register_isinstance()


def _register_questions() -> None:
    from torch._dynamo import external_utils
    from torch._dynamo.variables.torch import TorchInGraphFunctionVariable

    handlers = TorchInGraphFunctionVariable._get_handlers()
    asked = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
    for question in (*asked, torch._utils.is_compiling, external_utils.is_compiling):
        handlers[question] = _unless_unnoticed(handlers[question])


def _unless_unnoticed(handler: Callable[..., Any]) -> Callable[..., Any]:
    from torch._dynamo import external_utils
    from torch._dynamo.variables import ConstantVariable

    # older forms of the question, which models use and PyTorch's own layers do not
    forms = torch._utils.__file__, external_utils.__file__

    @functools.wraps(handler)
    def answer(variable: Any, tx: Any, *args: Any, **kwargs: Any) -> Any:
        file = tx.f_code.co_filename
        if _unnoticed.get() and (file in forms or not file.startswith(_PACKAGES)):
            return ConstantVariable.create(False)
        return handler(variable, tx, *args, **kwargs)

    return answer


def _register_isinstance() -> None:
    """Lets TorchDynamo follow ``torch.jit.isinstance``, at which MONAI's BasicUNet would fall into many graphs.

    Where another version of TorchDynamo has no place for it, the graphs stay many.
    """
    original = torch.jit.isinstance
    from torch._dynamo import trace_rules

    with contextlib.suppress(AttributeError, ValueError, TypeError):
        rules = trace_rules.get_torch_obj_rule_map()
        rule = rules.pop(original, None)
        try:
            torch.compiler.substitute_in_graph(original)(_isinstance(original))
        except (ValueError, TypeError):
            if rule is not None:
                rules[original] = rule


def _isinstance(original: Any) -> Any:
    beyond = torch.compiler.disable(original)

    def isinstance_(obj: Any, target_type: Any) -> bool:
        if isinstance(target_type, type):
            return isinstance(obj, target_type)
        # a type of the module typing
        return beyond(obj, target_type)

    return isinstance_
