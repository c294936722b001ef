"""What a table about a package says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastfilm.convert.layers import Activation


@dataclass(frozen=True)
class Family:
    """Facts about the models of one package.

    Attributes:
        name: of the package as people know it.
        modules: first parts of the module names that its classes come from.
        activations: its own activation classes by name.
        decoders: regular expressions that match the paths of decoder layers.
    """

    name: str
    modules: tuple[str, ...]
    activations: Mapping[str, Activation] = field(default_factory=dict)
    decoders: tuple[str, ...] = ()
