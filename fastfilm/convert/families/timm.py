"""timm's layers, which other packages' encoders are made of."""

from __future__ import annotations

from typing import Any

from fastfilm.convert.layers import Activation

from .family import Family


def _silu(module: Any) -> Activation:
    return Activation("silu")


FAMILY = Family(
    name="timm",
    modules=("timm",),
    activations={
        "Swish": _silu,
        "SwishMe": _silu,
        "GELU": lambda m: Activation("gelu"),
        "GELUTanh": lambda m: Activation("gelu_tanh"),
        "PReLU": lambda m: Activation("prelu"),
    },
    norm_acts=("BatchNormAct2d", "GroupNormAct"),
)
