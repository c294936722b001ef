"""Fused convolution + normalisation + activation + FiLM for segmentation networks conditioned on metadata."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert.condition import condition, generator_parameters, parameter_groups
    from .convert.conversion import conversion_report, convert, restore
    from .convert.film import metadata
    from .nn import (
        ConvNormFiLM2d,
        ConvNormFiLM3d,
        FiLM,
        FiLMedUNet,
        FiLMGenerator,
        Modified3DUNet,
    )
    from .ops import DeferredMap, backend, conv_norm_film, materialise, moments, norm_film

__version__ = "0.2.0"
__all__ = [
    "ConvNormFiLM2d",
    "ConvNormFiLM3d",
    "DeferredMap",
    "FiLM",
    "FiLMGenerator",
    "FiLMedUNet",
    "Modified3DUNet",
    "__version__",
    "backend",
    "condition",
    "conv_norm_film",
    "conversion_report",
    "convert",
    "generator_parameters",
    "materialise",
    "metadata",
    "moments",
    "norm_film",
    "parameter_groups",
    "restore",
]

_ROOMS = {
    "ConvNormFiLM2d": "nn",
    "ConvNormFiLM3d": "nn",
    "DeferredMap": "ops",
    "FiLM": "nn",
    "FiLMGenerator": "nn",
    "FiLMedUNet": "nn",
    "Modified3DUNet": "nn",
    "backend": "ops",
    "condition": "convert",
    "conv_norm_film": "ops",
    "conversion_report": "convert",
    "convert": "convert",
    "generator_parameters": "convert",
    "materialise": "ops",
    "metadata": "convert",
    "moments": "ops",
    "norm_film": "ops",
    "parameter_groups": "convert",
    "restore": "convert",
}
"""Public name -> the room that defines it, imported when the name is first asked for: a command line that only
prints its help waits for no torch."""


class _Package(ModuleType):
    """This module: public names come from their rooms on first use, and the rooms themselves are names too."""

    def __getattr__(self, name: str) -> Any:
        if name in _ROOMS:
            value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
            setattr(self, name, value)
            return value
        if name in ("nn", "ops"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        # importing fastfilm.convert binds the room to the name of its function, which keeps it
        if name in _ROOMS and value is sys.modules.get(f"{__name__}.{name}"):
            return
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *_ROOMS, "nn", "ops"})


sys.modules[__name__].__class__ = _Package
if "torch" in sys.modules:
    # torch.ops.fastfilm is there as soon as both are imported, torch first
    import_module(f"{__name__}.ops")
