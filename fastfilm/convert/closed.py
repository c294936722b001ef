"""A test for models that never ask for a tensor's class, so that plain tensors may take a subclass's place."""

from __future__ import annotations

import builtins
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfilm.nn.norms import hooked

_PACKAGES = ("torch", "fastfilm", "monai", "timm", "segmentation_models_pytorch", "ivadomed")
"""Packages with layers and networks of tensors of any class."""

_ASKING = frozenset(("isinstance", "type", "hasattr", "getattr", "issubclass", "__class__"))
_KNOWN = frozenset((*dir(Tensor), *dir(torch), *dir(F), *dir(builtins), "functional", "F", "nn"))


def is_closed(model: nn.Module) -> bool:
    """Whether no module in a model asks for the class of a tensor, or for an attribute of a subclass."""
    return all(_is_closed(m) for m in model.modules())


def is_watched(model: nn.Module) -> bool:
    """Whether somebody watches a module inside by hooks."""
    return any(hooked(m) for m in model.modules() if m is not model)


def _is_closed(module: nn.Module) -> bool:
    kind = type(module)
    own = "forward" in module.__dict__
    if not own and kind.__module__.partition(".")[0] in _PACKAGES:
        return True
    code = getattr(kind.forward, "__code__", None)
    if own or code is None:
        return False
    return _names(code) <= _KNOWN | set(dir(module)) and not _names(code) & _ASKING


def _names(code: types.CodeType) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found
