"""The call of a whole network: its metadata before, the layout of its outputs after."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastfilm.ops import subclasses

from . import film
from .film import Conditioner
from .program import written
from .state import State


def call(module: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward of the module that ``convert`` or ``condition`` was called with."""
    given: Any = (*args, *kwargs.values())
    if any(isinstance(a, (list, tuple, dict)) for a in given):
        given = pytree.tree_leaves(given)
    origin = subclasses.among(given)
    if origin and state.closed(module):
        return subclasses.through(_call, origin, module, state, args, kwargs)
    return _call(module, state, args, kwargs)


def _call(module: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if state.conditioner is None:
        result = state.call(module, args, kwargs, False)
    else:
        args, kwargs, rows = _take_metadata(state, args, kwargs)
        conditioner: Any = module._modules[state.conditioner]
        assert isinstance(conditioner, Conditioner)
        batch = next((a.shape[0] for a in _tensors(args, kwargs)), 1)
        with film.applied(conditioner(rows, batch)):
            result = state.call(module, args, kwargs, False)
    return _as_given(result, args) if state.fused else written(result)


def signature(original: type[nn.Module]) -> inspect.Signature:
    """Arguments of a conditioned network's forward: metadata follow what the original's insists on."""
    own, *parameters = inspect.signature(original.forward).parameters.values()
    needed = [p for p in parameters if _required(p)]
    rest = [p for p in parameters if not _required(p)]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    rest = [p if p.kind in kinds else p.replace(kind=p.KEYWORD_ONLY) for p in rest]
    added = inspect.Parameter("metadata", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    if any(p.kind is p.VAR_POSITIONAL for p in rest):
        added = added.replace(kind=added.KEYWORD_ONLY)
    order = sorted([*needed, added, *rest], key=lambda p: p.kind)
    return inspect.Signature([own, *order])


def _required(p: inspect.Parameter) -> bool:
    return p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty


def _take_metadata(
    state: State, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A call's own arguments, and its metadata: the keyword, the last argument, or those of a ``with`` block."""
    if "metadata" in kwargs:
        kwargs = dict(kwargs)
        rows = kwargs.pop("metadata")
    else:
        parameters = list(inspect.signature(state.original.forward).parameters.values())[1:]
        needed = sum(_required(p) and p.name not in kwargs for p in parameters) or 1
        rows = None
        if len(args) > needed:
            args, rows = args[:-1], args[-1]
    if rows is None:
        given = state.given() or film.given()
        rows = None if given is None else given.rows
    if rows is None:
        raise TypeError(
            "metadata is missing: call model(x, metadata), or model(x) inside `with fastfilm.metadata(rows):`"
        )
    return args, kwargs, rows


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def _as_given(result: Any, args: tuple[Any, ...]) -> Any:
    """A network's outputs contiguous if its input was, as without conversion."""
    result = written(result)
    first = next((a for a in args if isinstance(a, Tensor)), None)
    if first is None or not first.is_contiguous():
        return result
    return _contiguous(result)


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, dict):
        return type(value)({k: _contiguous(v) for k, v in value.items()})
    if type(value) in (list, tuple):
        return type(value)(_contiguous(v) for v in value)
    return value
