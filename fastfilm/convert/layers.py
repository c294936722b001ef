"""What PyTorch's layers are to a fused group: convolutions, norms, activations and dropouts, as data."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fastfilm.nn.norms import NORMS, hooked

CONVOLUTIONS: dict[type[nn.Module], int] = {
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
"""Convolutions and their spatial dimensions; subclasses count where they compute the same."""

CHANNEL_DROPOUTS = (nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Activation:
    """An activation by ``fastfilm``'s name.

    Attributes:
        slope: its number, where it has one.
        path: of the module whose ``weight`` is a learned slope (PReLU).
    """

    name: str
    slope: float | None = None
    path: tuple[str, ...] | None = None

    @property
    def homogeneous(self) -> bool:
        """Whether act(m·u) = m·act(u) for every m ≥ 0."""
        return self.name in ("relu", "leaky_relu", "prelu", "none")


ACTIVATIONS: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: Activation("relu"),
    nn.LeakyReLU: lambda m: Activation("leaky_relu", m.negative_slope),
    nn.PReLU: lambda m: Activation("prelu"),
    nn.ELU: lambda m: Activation("elu", m.alpha),
    nn.SiLU: lambda m: Activation("silu"),
    nn.GELU: lambda m: Activation("gelu" if m.approximate == "none" else "gelu_tanh"),
}


def _relu(x: Any, inplace: bool = False) -> Activation:
    return Activation("relu")


def _leaky_relu(x: Any, negative_slope: float = 0.01, inplace: bool = False) -> Activation:
    return Activation("leaky_relu", negative_slope)


def _elu(x: Any, alpha: float = 1.0, inplace: bool = False) -> Activation:
    return Activation("elu", alpha)


def _silu(x: Any, inplace: bool = False) -> Activation:
    return Activation("silu")


def _gelu(x: Any, approximate: str = "none") -> Activation:
    return Activation("gelu" if approximate == "none" else "gelu_tanh")


ACTIVATION_FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    F.relu: _relu,
    F.relu_: _relu,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: _leaky_relu,
    F.elu: _elu,
    F.elu_: _elu,
    F.silu: _silu,
    F.gelu: _gelu,
    torch._C._nn.gelu: _gelu,
}
"""Functions whose first argument is the map."""

ACTIVATION_METHODS: dict[str, Callable[..., Activation]] = {"relu": _relu, "relu_": _relu}

ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is a ``kind`` whose subclass, if it is one, left the computation alone."""
    own = type(module)
    if own is kind:
        return True
    same = isinstance(module, kind) and own.forward is kind.forward
    if same and issubclass(kind, _ConvNd):
        same = own._conv_forward is kind._conv_forward  # type: ignore[attr-defined]
    return same


def convolution_dims(module: nn.Module) -> int | None:
    """Spatial dimensions of a convolution; None for another module."""
    return next((d for kind, d in CONVOLUTIONS.items() if isinstance(module, kind)), None)


def is_plain(convolution: nn.Module) -> bool:
    """Whether a convolution computes what PyTorch's of its kind does."""
    return any(computes_as(convolution, kind) for kind in CONVOLUTIONS)


def unfit_convolution(module: nn.Module, base: type[nn.Module] | None = None) -> str | None:
    """Why a convolution has to stay as it is; None if it can be fused.

    Args:
        base: the class whose forward is meant, where the layer's own does more.
    """
    assert isinstance(module, _ConvNd)
    if base is None and not is_plain(module):
        return f"{type(module).__name__} computes something of its own"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrised"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    if padding_of(module) is None:
        return "padding='same' is not symmetric for its kernel"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "it is lazy and not initialised yet"
    return unfit(module)


def padding_of(module: _ConvNd) -> tuple[int, ...] | None:
    """Padding of a convolution as numbers; None if it is not the same on both sides."""
    padding = module.padding
    if padding == "valid":
        return (0,) * len(module.kernel_size)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)
    return tuple(int(p) for p in padding)


def norm_of(
    module: nn.Module, hooked_too: bool = False, base: type[nn.Module] | None = None
) -> str | None:
    """Name of a norm; None for another module and for a subclass that computes something of its own."""
    for kind, name in NORMS.items():
        if isinstance(module, kind):
            fits = hooked_too or unfit(module) is None
            return name if (base is kind or computes_as(module, kind)) and fits else None
    return None


def norm_dims(module: nn.Module) -> int | None:
    """Spatial dimensions that a norm insists on; None for any."""
    if isinstance(module, (nn.BatchNorm3d, nn.InstanceNorm3d)):
        return 3
    return 2 if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) else None


def activation_of(module: nn.Module, hooked_too: bool = False) -> Activation | None:
    """A module as an activation, if it is one of PyTorch's."""
    for kind, read in ACTIVATIONS.items():
        if computes_as(module, kind):
            return read(module) if hooked_too or unfit(module) is None else None
    return None


def differs(module: Any, activation: Activation) -> bool:
    """Whether a layer of a group computes, as it is set now, what the group does not: an activation, or padding.

    Other options of layers are read at every call.
    """
    read = ACTIVATIONS.get(type(module))
    if read is not None:
        now = read(module)
        return (now.name, now.slope) != (activation.name, activation.slope)
    if not isinstance(module, _ConvNd):
        return False
    uneven = module.padding == "same" and padding_of(module) is None
    return uneven or module.padding_mode != "zeros"


def unfit(module: nn.Module) -> str | None:
    """Why a layer is left alone whatever it is: hooks that a fused group would pass by."""
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrised"
    if hooked(module):
        return "it has hooks (a weight norm, pruning or an observer)"
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is one of the norms that a group can hold, fit or not."""
    return isinstance(module, (_BatchNorm, _InstanceNorm, nn.GroupNorm))


def is_channel_dropout(module: nn.Module) -> bool:
    """Dropout2d and Dropout3d: whole channels of a sample."""
    return any(computes_as(module, kind) for kind in CHANNEL_DROPOUTS)


def is_dropout(module: nn.Module) -> bool:
    """Dropout of single values or of whole channels."""
    return is_channel_dropout(module) or computes_as(module, nn.Dropout)
