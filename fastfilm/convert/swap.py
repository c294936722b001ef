"""A converted module's class: its original's subclass with another forward, which copies and pickles."""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import nn

from . import root
from .state import State

_made: dict[tuple[type[nn.Module], bool], type[nn.Module]] = {}
_lock = threading.Lock()


class Converted:
    """Mixed into the class of every converted module."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        assert isinstance(self, nn.Module)
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        own: State = self.__dict__["_fastfilm"]
        return _empty, (own.original, own.conditioner is not None), state

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[misc]
        replica.__dict__["_fastfilm"] = self.__dict__["_fastfilm"].replica()
        return replica


def class_of(original: type[nn.Module], metadata: bool = False) -> type[nn.Module]:
    """The class of converted ``original`` modules; always the same one.

    Args:
        metadata: its forward takes metadata too.
    """
    with _lock:
        found = _made.get((original, metadata))
        if found is None:
            forward = original.forward

            @functools.wraps(forward)
            def converted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
                state: State = self.__dict__["_fastfilm"]
                if state.root:
                    return root.call(self, state, args, kwargs)
                return state.call(self, args, kwargs, False)

            if metadata:
                # exporters and others who ask for the arguments
                converted.__signature__ = root.signature(original)  # type: ignore[attr-defined]
            names = {
                "forward": converted,
                "_fastfilm_original_forward": forward,
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
            }
            meta: Any = type(original)
            found = meta(original.__name__, (Converted, original), names)
            _made[original, metadata] = found
        return found


def swappable(module: nn.Module) -> str | None:
    """Why a module's class cannot be exchanged; None if it can."""
    kind = type(module)
    if "forward" in module.__dict__:
        return "its forward was replaced on the object"
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return f"it is a {kind.__name__}"
    own = any(
        "__reduce__" in k.__dict__ or "__reduce_ex__" in k.__dict__
        for k in kind.__mro__
        if k is not object
    )
    if own:
        return "it has its own way of being pickled"
    return None


def swap(module: nn.Module, state: State) -> None:
    """Makes ``module`` run its programs."""
    module.__dict__["_fastfilm"] = state
    module.__class__ = class_of(state.original)


def unswap(module: nn.Module) -> None:
    """Makes ``module`` what it was."""
    module.__class__ = module.__dict__.pop("_fastfilm").original


def take_metadata(module: nn.Module) -> None:
    """Gives a converted module's forward metadata as an argument."""
    module.__class__ = class_of(module.__dict__["_fastfilm"].original, metadata=True)


def _empty(original: type[nn.Module], metadata: bool) -> nn.Module:
    kind = class_of(original, metadata)
    made: nn.Module = kind.__new__(kind)
    return made
