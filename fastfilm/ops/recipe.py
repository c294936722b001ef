"""How a call will be served: every check, the output size, the block's kind and the plan, once for each form.

What is decided here depends on shapes, types, devices and options only, so a call of a form that came before
finds its recipe by one dictionary lookup.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, spec
from .tail import Kind, accumulate_dtype

Geometry = tuple[Any, ...]
"""stride, padding, dilation, transposed, output_padding, groups."""

TailTensors = tuple[Tensor | None, ...]
"""norm_weight, norm_bias, running_mean, running_var, gamma, beta, dropout_mask, slope."""


class Options(NamedTuple):
    """Options of ``conv_norm_film`` that are not tensors, as they were passed; ``slope`` if it is a number."""

    norm: str | None
    num_groups: int | None
    training: bool
    eps: float
    activation: str | None
    slope: float | None
    order: str
    dropout_position: str
    synchronised: bool = False


@dataclass(frozen=True, eq=False)
class Recipe:
    """What is known of a call before its numbers.

    Attributes:
        kind: the block behind the convolution.
        plan: "backend/route".
        kernels: the backend's launchers; None if the block runs in plain PyTorch.
        geometry: stride, padding, dilation, transposed, output_padding, groups.
        composed: the route is the composed one.
    """

    kind: Kind
    plan: str
    kernels: ModuleType | None
    geometry: tuple[Any, ...] = ()
    composed: bool = False


_KEPT = 4096
_recipes: dict[Any, Recipe] = {}


def find(key: Any) -> Recipe | None:
    """The recipe of a form of call that came before; None for a new one (or one that cannot be a key)."""
    try:
        return _recipes.get(key)
    except TypeError:
        return None


def keep(key: Any, recipe: Recipe) -> None:
    """Remembers a recipe."""
    if len(_recipes) >= _KEPT:
        _recipes.clear()
    try:
        _recipes[key] = recipe
    except TypeError:
        # a list among the options: nothing to remember it by
        return


def forget() -> None:
    """Every later call is decided anew."""
    _recipes.clear()


@contextlib.contextmanager
def unremembered() -> Iterator[None]:
    """No recipe from before is found inside the block; those that are made there are forgotten behind it."""
    before = dict(_recipes)
    forget()
    try:
        yield
    finally:
        forget()
        _recipes.update(before)


def of_convolution(
    raw: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    options: Options,
    tensors: TailTensors,
) -> Recipe:
    """Recipe of ``conv_norm_film``; TypeError, ValueError or NotImplementedError naming what does not fit."""
    dims = spec.check_feature_map("x", raw)
    if weight.dtype != raw.dtype:
        raise TypeError(
            f"weight must have x's dtype {raw.dtype}, got {weight.dtype} (use torch.autocast to mix them)"
        )
    stride, padding, dilation, transposed, output_padding, groups = geometry
    stride = spec.as_tuple("stride", stride, dims, 1)
    padding = spec.as_tuple("padding", padding, dims)
    dilation = spec.as_tuple("dilation", dilation, dims, 1)
    output_padding = spec.as_tuple("output_padding", output_padding, dims)
    channels = _check_weight(raw, weight, groups, transposed)
    spec.check_channel_vector("bias", bias, channels)
    batch, kernel = raw.shape[0], tuple(weight.shape[2:])
    size = spec.conv_output_size(
        raw.shape[2:], kernel, stride, padding, dilation, transposed, output_padding
    )
    if 0 in raw.shape[2:]:
        raise ValueError(f"x must have voxels to convolve, got {tuple(raw.shape)}")
    if transposed and any(
        o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)
    ):
        raise ValueError(
            f"output_padding must be smaller than stride {stride} or dilation {dilation}, got {output_padding}"
        )
    if transposed and min(size) < 1:
        raise ValueError(f"padding {padding} leaves nothing of the output of x {tuple(raw.shape)}")
    if min(size) < 1:
        raise ValueError(
            f"kernel {kernel} is larger than the padded input {tuple(raw.shape[2:])} (padding {padding})"
        )
    kind = _kind(
        raw, batch, channels, size, {"x": raw, "weight": weight, "bias": bias}, options, tensors
    )
    plan = backends.choose(
        backends.Request(
            device=raw.device.type,
            dtype=raw.dtype,
            dims=dims,
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            groups=groups,
            transposed=transposed,
            channels=(raw.shape[1], channels),
            output=tuple(size),
            batch=batch,
        )
    )
    empty = raw.numel() == 0 or 0 in size or weight.numel() == 0
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    kernels = None if empty else launchers(plan)
    return Recipe(kind, plan, kernels, geometry, plan.endswith("/composed"))


def of_map(x: Tensor, options: Options, tensors: TailTensors) -> Recipe:
    """Recipe of ``norm_film``; TypeError, ValueError or NotImplementedError naming what does not fit."""
    spec.check_feature_map("x", x)
    batch, channels, *size = x.shape
    kind = _kind(x, batch, channels, size, {"x": x}, options, tensors)
    plan = pointwise_plan(x)
    return Recipe(kind, plan, None if x.numel() == 0 else launchers(plan))


def pointwise_plan(y: Tensor) -> str:
    """Plan for a pass over an existing map."""
    dims = y.dim() - 2
    one = (1,) * dims
    return backends.choose(backends.Request(y.device.type, y.dtype, dims, one, one, one))


def launchers(plan: str) -> ModuleType | None:
    """Kernels of a plan; None for plain PyTorch."""
    name, route = plan.split("/")
    if route == "eager":
        return None
    # a compiler sees the operators only, and could not follow the import
    return backends if torch.compiler.is_compiling() else backends.BACKENDS[name].kernels()


def _kind(
    like: Tensor,
    batch: int,
    channels: int,
    size: Sequence[int],
    others: dict[str, Tensor | None],
    options: Options,
    tensors: TailTensors,
) -> Kind:
    """The checked form of everything behind the convolution.

    Args:
        size: spatial size of the map that the norm sees.
        others: the call's other tensors by name, the map itself first (for the device check).
    """
    norm_weight, norm_bias, running_mean, running_var, gamma, beta, dropout_mask, slope = tensors
    norm, num_groups, training = options.norm, options.num_groups, options.training
    norm = spec.choice("norm", norm, spec.NORMS)
    activation = spec.choice("activation", options.activation, spec.ACTIVATIONS)
    order = spec.choice("order", options.order, spec.ORDERS)
    position = spec.choice("dropout_position", options.dropout_position, spec.DROPOUT_POSITIONS)
    vectors = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "running_mean": running_mean,
        "running_var": running_var,
    }
    for name, vector in vectors.items():
        spec.check_channel_vector(name, vector, channels)
    films = {"gamma": gamma, "beta": beta, "dropout_mask": dropout_mask}
    for name, film in films.items():
        spec.check_film(name, film, batch, channels)
    spec.check_number("eps", options.eps)
    number = check_slope(activation, options.slope if slope is None else slope, channels)
    spec.check_same_device(**others, **vectors, **films, slope=slope)
    if norm == "group" and (
        not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups
    ):
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if norm == "batch" and not training and running_mean is None:
        raise ValueError("norm='batch' with training=False needs running_mean and running_var")
    if dropout_mask is not None and position == "norm" and norm == "none":
        raise ValueError("dropout_position='norm' needs a norm")
    uses_input = (
        norm in ("group", "layer")
        or (norm == "batch" and training)
        or (norm == "instance" and (training or running_mean is None))
    )
    groups = num_groups if norm == "group" and num_groups is not None else 1
    # other processes may have more values
    if uses_input and batch > 0 and not options.synchronised:
        _check_count(norm, groups, batch, channels, size)
    return Kind(
        norm=norm,
        activation=activation,
        order=order,
        dropout_position=position,
        groups=groups,
        eps=options.eps,
        slope=number,
        batch=batch,
        channels=channels,
        count=math.prod(size),
        wide=accumulate_dtype(like).itemsize == 8,
        training=training,
        uses_input=uses_input,
        update=training and running_mean is not None and norm in ("batch", "instance"),
    )


def _check_count(norm: str, groups: int, batch: int, channels: int, size: Sequence[int]) -> None:
    """PyTorch's refusal to normalise a single value."""
    voxels = math.prod(size)
    shape = (batch, channels, *size)
    if norm == "batch" and batch * voxels == 1:
        raise ValueError(
            f"norm='batch' needs more than 1 value per channel when training, got {shape}"
        )
    if norm == "instance" and voxels == 1:
        raise ValueError(f"norm='instance' needs more than 1 spatial element, got {shape}")
    if norm in ("group", "layer") and batch * (channels // groups) * voxels == 1:
        raise ValueError(f"norm={norm!r} needs more than 1 value per group, got {shape}")


def check_slope(act: str, slope: float | Tensor | None, channels: int) -> float:
    """The activation's parameter if it is a number, else 0."""
    if act not in spec.DEFAULT_SLOPE:
        if slope is not None:
            raise ValueError(f"slope has no meaning for activation {act!r}, got {slope!r}")
        return 0.0
    if slope is None:
        return spec.DEFAULT_SLOPE[act]
    if isinstance(slope, Tensor):
        if slope.numel() not in (1, channels) or slope.dim() > 1 or not slope.is_floating_point():
            raise ValueError(
                f"slope must be floating point with 1 or {channels} values, got {slope.dtype} {tuple(slope.shape)}"
            )
        return 0.0
    if not isinstance(slope, (int, float)):
        raise TypeError(f"slope must be a number or a tensor, got {slope!r}")
    return float(slope)


def _check_weight(raw: Tensor, weight: Tensor, groups: int, transposed: bool) -> int:
    """Output channels; ValueError if the weight does not fit the input."""
    if weight.dim() != raw.dim():
        raise ValueError(
            f"weight must have {raw.dim()} dimensions for an input {tuple(raw.shape)}, got {tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    expected = weight.shape[0] if transposed else weight.shape[1] * groups
    if raw.shape[1] != expected:
        raise ValueError(
            f"x must have {expected} channels for weight {tuple(weight.shape)} and groups {groups},"
            f" got {raw.shape[1]}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide weight.shape[0] = {weight.shape[0]}, got {groups}")
    return weight.shape[1] * groups if transposed else weight.shape[0]
