"""What the packages that models come from call their layers: one table a package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastfilm.convert import layers
from fastfilm.convert.layers import Activation

from . import classic, ivadomed, monai, nnunet, pytorch3dunet, smp, timm, torchvision
from .family import Family, Layout

FAMILIES: tuple[Family, ...] = (
    monai.FAMILY,
    nnunet.FAMILY,
    smp.FAMILY,
    timm.FAMILY,
    torchvision.FAMILY,
    pytorch3dunet.FAMILY,
    ivadomed.FAMILY,
)


def family_of(kind: type[nn.Module]) -> Family | None:
    """The package that a class comes from, if there is a table for it."""
    return next((f for f in FAMILIES if f.has(kind)), None)


def functions() -> tuple[Callable[..., Any], ...]:
    """Functions of the packages that are imported, which are called as they are."""
    found = [
        getattr(sys.modules.get(module), name, None)
        for f in FAMILIES
        for module, name in f.functions
    ]
    return tuple(f for f in found if f is not None)


def activation_of(module: nn.Module, hooked_too: bool = False) -> Activation | None:
    """A module as an activation: PyTorch's classes and those of the tables."""
    found = layers.activation_of(module, hooked_too)
    family = family_of(type(module))
    if found is not None or family is None:
        return found
    read = family.activations.get(type(module).__name__)
    if read is None or not (hooked_too or layers.unfit(module) is None):
        return None
    return read(module)


def layout_of(model: nn.Module) -> Layout | None:
    """Which paths of a model are its decoder's, if a table says so."""
    for kind in type(model).__mro__:
        if not issubclass(kind, nn.Module):
            continue
        family = family_of(kind)
        if family is not None and kind.__name__ in family.layouts:
            return family.layouts[kind.__name__]
    return _by_parts(model)


def _by_parts(model: nn.Module) -> Layout | None:
    children = set(model._modules)
    name = type(model).__name__
    if name in ("Unet", "FiLMedUnet") and {"encoder", "decoder"} <= children:
        return ivadomed.UNET
    if name == "Modified3DUNet" and {"conv3d_c1_1", "conv3d_l4"} <= children:
        return ivadomed.MODIFIED
    return next((layout for names, layout in classic.LAYOUTS if children.issuperset(names)), None)
