"""The class of a conditioned model: a subclass of the original's class whose forward takes metadata."""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn

from . import film
from .film import FiLMHook, Split

NAME = "film_generator"
"""The submodule that ``condition`` adds to a model."""

_made: dict[type[nn.Module], type[nn.Module]] = {}
_lock = threading.Lock()


class Conditioned:
    """Mixed into the class of every conditioned model.

    Attributes:
        _film_original: the model's class before.
        _film_needed: names of arguments that the original's forward insists on.
        _film_paths: of the modules that FiLM's hooks are on, by site.
    """

    _film_original: type[nn.Module]
    _film_needed: tuple[str, ...]
    _film_paths: dict[str, str]
    _film_split: Split | None = None
    _film_replica: int | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = self.__getstate__()  # type: ignore[attr-defined]
        return _empty, (self._film_original,), state

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        rows = film.given()
        if rows is not None:
            split = self._film_split
            if split is None or split.used or split.given is not rows:
                split = self._film_split = Split(rows)
            replica._film_split, replica._film_replica = split, split.replicas
            split.replicas += 1
        return replica


def class_of(original: type[nn.Module]) -> type[nn.Module]:
    """The class of conditioned ``original`` modules; always the same one."""
    with _lock:
        found = _made.get(original)
        if found is None:
            own = original.forward

            @functools.wraps(own)
            def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
                args, kwargs, rows = _take_metadata(self, args, kwargs)
                batch = next(
                    (a.shape[0] for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), 1
                )
                for site, path in self._film_paths.items():
                    _check(self, site, path)
                with film.applied(self._modules[NAME](rows, batch)):
                    return own(self, *args, **kwargs)

            # for exporters and other callers that ask for the arguments
            forward.__signature__ = _signature(original)  # type: ignore[attr-defined]
            parameters = list(inspect.signature(own).parameters.values())[1:]
            names = {
                "forward": forward,
                "_film_original": original,
                "_film_needed": tuple(p.name for p in parameters if _is_required(p)),
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
            }
            if issubclass(original, nn.Sequential):
                # the generator is a child, but no layer
                names["__iter__"] = _layers
                names["__len__"] = _count
            meta: Any = type(original)
            found = _made[original] = meta(original.__name__, (Conditioned, original), names)
        return found


def take_metadata(module: nn.Module, paths: dict[str, str]) -> None:
    """Gives a module's forward metadata as an argument.

    Args:
        paths: of the modules that FiLM's hooks are on, by site.

    Raises:
        ValueError: the module's class cannot be exchanged.
    """
    kind = type(module)
    reason = None
    if "forward" in module.__dict__:
        reason = "its forward was replaced on the object"
    elif isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        reason = f"it is a {kind.__name__}"
    elif any(
        "__reduce__" in k.__dict__ or "__reduce_ex__" in k.__dict__
        for k in kind.__mro__
        if k is not object
    ):
        reason = "it has its own way of being pickled"
    if reason is not None:
        raise ValueError(f"a {kind.__name__} cannot be conditioned as a whole: {reason}")
    module.__class__ = class_of(kind)
    module.__dict__["_film_paths"] = paths


def _check(model: nn.Module, site: str, path: str) -> None:
    """RuntimeError where the layer that a site's FiLM follows was replaced."""
    found: Any = model
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    if isinstance(found, nn.SyncBatchNorm) and not FiLMHook.at(found, site):
        # ``convert_sync_batchnorm`` puts it in place of a norm and leaves the norm's hooks behind
        torch.compiler.disable(found.register_forward_hook)(FiLMHook(site, False), prepend=True)
    if found is None or not FiLMHook.at(found, site):
        raise RuntimeError(
            f"FiLM at {site!r} is left out: the layer {path!r} that it stands at was replaced or lost its hook;"
            " condition the model anew after such a change"
        )


def _take_metadata(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """A call's own arguments, and its metadata: the keyword, the last argument, or those of a ``with`` block."""
    if "metadata" in kwargs:
        kwargs = dict(kwargs)
        rows = kwargs.pop("metadata")
    else:
        needed = sum(name not in kwargs for name in model._film_needed) or 1
        rows = None
        if len(args) > needed:
            args, rows = args[:-1], args[-1]
    if rows is None:
        split, replica = model._film_split, model._film_replica
        given = film.given() if split is None or replica is None else split.rows(replica)
        rows = None if given is None else given.rows
    if rows is None:
        raise TypeError(
            "metadata is missing: call model(x, metadata), or model(x) inside `with fastfilm.metadata(rows):`"
        )
    return args, kwargs, rows


def _signature(original: type[nn.Module]) -> inspect.Signature:
    """Arguments of a conditioned network's forward: metadata follow what the original's insists on."""
    own, *parameters = inspect.signature(original.forward).parameters.values()
    needed = [p for p in parameters if _is_required(p)]
    rest = [p for p in parameters if not _is_required(p)]
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    rest = [p if p.kind in kinds else p.replace(kind=p.KEYWORD_ONLY) for p in rest]
    added = inspect.Parameter("metadata", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    if any(p.kind is p.VAR_POSITIONAL for p in rest):
        added = added.replace(kind=added.KEYWORD_ONLY)
    order = sorted([*needed, added, *rest], key=lambda p: p.kind)
    return inspect.Signature([own, *order])


def _is_required(p: inspect.Parameter) -> bool:
    return p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty


def _layers(self: Any) -> Any:
    return iter([m for name, m in self._modules.items() if name != NAME])


def _count(self: Any) -> int:
    return len(self._modules) - (NAME in self._modules)


def _empty(original: type[nn.Module]) -> nn.Module:
    kind = class_of(original)
    made: nn.Module = kind.__new__(kind)
    return made
