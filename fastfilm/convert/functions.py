"""Tables of the PyTorch functions that a conversion knows: convolutions, norms, activations, readers of maps.

``bind`` names the arguments of one call in a graph; everything else here is a table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

Form = tuple[tuple[str, Any], ...]
"""Names of a function's arguments with their defaults."""


def _form(text: str) -> Form:
    parts = [part.partition("=") for part in text.split()]
    return tuple((name, eval(value) if value else None) for name, _, value in parts)


_CONVOLUTION = _form("input weight bias stride=1 padding=0 dilation=1 groups=1")
_TRANSPOSED = _form("input weight bias stride=1 padding=0 output_padding=0 groups=1 dilation=1")

CONVOLUTIONS: dict[Any, tuple[int, bool, Form]] = {
    F.conv2d: (2, False, _CONVOLUTION),
    F.conv3d: (3, False, _CONVOLUTION),
    F.conv_transpose2d: (2, True, _TRANSPOSED),
    F.conv_transpose3d: (3, True, _TRANSPOSED),
}
"""Spatial dimensions, whether transposed, and arguments."""

NORMS: dict[Any, tuple[str, Form]] = {
    F.batch_norm: (
        "batch",
        _form("input running_mean running_var weight bias training=False momentum=0.1 eps=1e-5"),
    ),
    F.instance_norm: (
        "instance",
        _form("input running_mean running_var weight bias training=True momentum=0.1 eps=1e-5"),
    ),
    F.group_norm: ("group", _form("input num_groups weight bias eps=1e-5")),
}
"""Name of the norm, and arguments (``use_input_stats`` of an instance norm is called training here)."""


@dataclass(frozen=True)
class Activation:
    """An activation by ``fastfilm``'s name.

    Attributes:
        slope: its number or, in a graph, the node of its learned slope.
    """

    name: str
    slope: Any = None

    @property
    def homogeneous(self) -> bool:
        """Whether act(m·u) = m·act(u) for every m ≥ 0."""
        return self.name in ("relu", "leaky_relu", "prelu")


NONE = Activation("none")


def _gelu(given: dict[str, Any]) -> Activation | None:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    name = names.get(given["approximate"])
    return None if name is None else Activation(name)


def _elu(given: dict[str, Any]) -> Activation | None:
    plain = (given["scale"], given["input_scale"]) == (1, 1)
    return Activation("elu", given["alpha"]) if plain else None


_RELU = (_form("input inplace=False"), lambda given: Activation("relu"))
_LEAKY = (
    _form("input negative_slope=0.01 inplace=False"),
    lambda given: Activation("leaky_relu", given["negative_slope"]),
)
_ELU = (_form("input alpha=1.0 inplace=False"), lambda given: Activation("elu", given["alpha"]))
_SILU = (_form("input inplace=False"), lambda given: Activation("silu"))
_PRELU = (_form("input weight"), lambda given: Activation("prelu", given["weight"]))
_GELU = (_form("input approximate='none'"), _gelu)

ACTIVATIONS: dict[Any, tuple[Form, Callable[[dict[str, Any]], Activation | None]]] = {
    F.relu: _RELU,
    F.relu_: _RELU,
    torch.relu: _RELU,
    torch.relu_: _RELU,
    "relu": _RELU,
    "relu_": _RELU,
    F.leaky_relu: _LEAKY,
    F.leaky_relu_: _LEAKY,
    torch._C._nn.leaky_relu: (_LEAKY[0][:2], _LEAKY[1]),
    F.elu: _ELU,
    F.elu_: _ELU,
    torch._C._nn.elu: (_form("input alpha=1 scale=1 input_scale=1"), _elu),
    F.silu: _SILU,
    torch._C._nn.silu: _SILU,
    F.prelu: _PRELU,
    torch.prelu: _PRELU,
    F.gelu: _GELU,
    torch._C._nn.gelu: _GELU,
}
"""Arguments, and the activation that they make; methods by their names."""

SIGMOIDS: tuple[Any, ...] = (torch.sigmoid, F.sigmoid, "sigmoid")
PRODUCTS: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
ADDED_PRODUCTS: tuple[Any, ...] = (torch.addcmul, "addcmul")

_DROPOUT = _form("input p=0.5 training=True inplace=False")
DROPOUTS: dict[Any, Form] = {F.dropout: _DROPOUT, torch.dropout: _form("input p training")}
"""Dropouts of single values."""
CHANNEL_DROPOUTS: dict[Any, tuple[int, Form]] = {
    F.dropout2d: (2, _DROPOUT),
    F.dropout3d: (3, _DROPOUT),
}
"""Dropouts of whole channels of a sample, and the spatial dimensions that they are meant for."""

CASTS: tuple[Any, ...] = ("float", "half", "bfloat16", "double", "to", "type", "type_as")
"""Methods that give their tensor itself where its type is the wanted one already."""

POOLS: tuple[Any, ...] = (
    F.max_pool2d,
    F.max_pool3d,
    torch.max_pool2d,
    torch.max_pool3d,
    F.avg_pool2d,
    F.avg_pool3d,
)
JOINS: tuple[Any, ...] = (torch.cat, torch.concat, torch.concatenate)
VIEWS: tuple[Any, ...] = (*POOLS, *JOINS, F.interpolate)
"""Functions that give a map which a convolution can read unwritten (see ``fastfilm.ops.spec.views``)."""

ANY_LAYOUT: frozenset[Any] = frozenset(
    (
        *CONVOLUTIONS,
        *NORMS,
        *ACTIVATIONS,
        *SIGMOIDS,
        *PRODUCTS,
        *SUMS,
        *ADDED_PRODUCTS,
        *CASTS,
        *VIEWS,
        *CHANNEL_DROPOUTS,
        operator.sub,
        operator.isub,
        operator.truediv,
        operator.neg,
        operator.pow,
        operator.getitem,
        torch.sub,
        torch.div,
        torch.tanh,
        torch.exp,
        torch.mean,
        torch.sum,
        torch.amax,
        torch.max,
        torch.softmax,
        torch.split,
        torch.chunk,
        torch.stack,
        torch.matmul,
        torch.einsum,
        F.adaptive_avg_pool2d,
        F.adaptive_avg_pool3d,
        F.adaptive_max_pool2d,
        F.adaptive_max_pool3d,
        F.hardswish,
        F.hardsigmoid,
        F.hardtanh,
        F.relu6,
        F.mish,
        F.softplus,
        F.softmax,
        F.log_softmax,
        F.pad,
        torch._C._nn.pad,
        F.linear,
        F.layer_norm,
        F.local_response_norm,
        "sub",
        "div",
        "exp",
        "tanh",
        "mean",
        "sum",
        "softmax",
        "size",
        "dim",
        "numel",
        "split",
        "chunk",
        "flatten",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "detach",
        "clone",
    )
)
"""Functions and methods of maps that give the same values for every layout of a map, and write to none but their
first argument.

Random numbers are not among them: PyTorch draws them in the order of the memory."""


RESHAPING: frozenset[Any] = frozenset(
    ("view", "reshape", "permute", "transpose", torch.reshape, torch.permute, torch.transpose)
)
"""Functions and methods that change a map's shape; a network of attention consists of them."""


def bind(node: fx.Node, form: Form) -> dict[str, Any] | None:
    """The arguments of a call by their names, defaults included; None where they do not fit ``form``."""
    names = [name for name, _ in form]
    if len(node.args) > len(names):
        return None
    found = dict(form)
    found.update(zip(names, node.args, strict=False))
    for name, value in node.kwargs.items():
        if name == "use_input_stats":
            name = "training"
        if name not in found:
            return None
        found[name] = value
    return found


def activation_of(node: fx.Node) -> tuple[Activation, Any] | None:
    """The activation that a call computes and the node that it is computed of, if it is one of ours."""
    entry = ACTIVATIONS.get(node.target)
    given = None if entry is None else bind(node, entry[0])
    if entry is None or given is None:
        return None
    found = entry[1](given)
    return None if found is None else (found, given["input"])


def idle_dropout(node: fx.Node) -> Any:
    """The input of a dropout that does nothing, as it is called; None for another node."""
    form = DROPOUTS.get(node.target)
    if form is None and node.target in CHANNEL_DROPOUTS:
        form = CHANNEL_DROPOUTS[node.target][1]
    given = None if form is None else bind(node, form)
    if given is None or (given["training"] is not False and given["p"] != 0):
        return None
    return given["input"]
