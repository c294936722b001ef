"""What the packages that models come from call their layers: one table a package."""

from __future__ import annotations

from fastfilm.convert.layers import Activation

from . import monai, nnunet
from .family import Family

FAMILIES: tuple[Family, ...] = (monai.FAMILY, nnunet.FAMILY)


def activations() -> dict[str, Activation]:
    """Activations that are no PyTorch classes, by class name."""
    found: dict[str, Activation] = {}
    for family in FAMILIES:
        found.update(family.activations)
    return found
