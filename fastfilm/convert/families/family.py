"""What a table about a package says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastfilm.convert.layers import Activation


@dataclass(frozen=True)
class Layout:
    """Which layers of a network lie behind its bottleneck.

    Attributes:
        decoder: regular expression at the start of the paths of decoder layers, heads included.
        encoder: the same for the rest; None: whatever ``decoder`` does not match.
    """

    decoder: str
    encoder: str | None = None

    def is_decoder(self, path: str) -> bool | None:
        """Whether the layer at ``path`` (dotted, of a convolution) is the decoder's; None: unknown."""
        if re.match(self.decoder, path):
            return True
        if self.encoder is None or re.match(self.encoder, path):
            return False
        return None


@dataclass(frozen=True)
class Family:
    """Facts about the models of one package. Classes go by their names, so that nothing has to be imported.

    Attributes:
        name: of the package as people know it.
        modules: first parts of the names of the modules that its classes come from.
        activations: what an object of an activation class is; None from the function: not what it seems.
        norm_acts: norms that hold a dropout in ``drop`` and an activation in ``act`` and run them too.
        padded: convolutions without padding of their own: attribute of the layer that pads before them.
        methods: (class, method) that a model's forward calls for a check; called as they are.
        functions: in the namespaces of the package's modules; called as they are in training.
        layouts: of networks by class name.
    """

    name: str
    modules: tuple[str, ...]
    activations: Mapping[str, Callable[[Any], Activation | None]] = field(default_factory=dict)
    norm_acts: tuple[str, ...] = ()
    padded: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[tuple[str, str], ...] = ()
    functions: tuple[tuple[str, str], ...] = ()
    layouts: Mapping[str, Layout] = field(default_factory=dict)

    def has(self, kind: type[nn.Module]) -> bool:
        """Whether a class comes from the package."""
        return kind.__module__.partition(".")[0] in self.modules
