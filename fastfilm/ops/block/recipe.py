"""Recipes: checks, output size, kind and plan of a call, found once for all calls with equal shapes and options.

What is decided here depends on shapes, types, devices and options only, so a call of a form that came before
finds its recipe by one dictionary lookup.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import choice, settings, spec
from ..spec import Geometry, Kind, Options, Plan, TailTensors, accumulate_dtype


@dataclass(frozen=True, eq=False)
class Recipe:
    """The facts of a call that its numbers do not change.

    Attributes:
        kind: the block behind the convolution.
        plan: the backend that serves it, and the route.
        geometry: of the convolution; None without one.
        plain: the block runs in plain PyTorch: the plan says so, or a map is empty.
        bare: nothing is pending behind the convolution, which adds its bias itself.
        forced: backend and route that were forced when the recipe was made, and are when it is found.
    """

    kind: Kind
    plan: Plan
    geometry: Geometry | None
    plain: bool
    bare: bool
    forced: tuple[str | None, str | None]


_KEPT = 4096
_recipes: dict[Any, Recipe] = {}


def of_call(
    known: bool,
    like: Tensor,
    weight: Tensor | None,
    geometry: Geometry | None,
    options: Options,
    tensors: TailTensors,
) -> Recipe:
    """The recipe of a call; its checks run once for each form of call.

    Args:
        known: all tensors are ``direct``, so that their forms decide.
        like: a tensor of the shape, type and device of what the block sees.
        weight: of the convolution; None without one.
    """
    if not known:
        return _made(like, weight, geometry, options, tensors)
    forms = [
        None if t is None else (t.shape, t.dtype, t.device) if isinstance(t, Tensor) else t
        for t in (like, weight, *tensors)
    ]
    key = choice.state(), geometry, options, *forms
    try:
        found = _recipes.get(key)
    except TypeError:
        # a list among the options cannot be a key
        return _made(like, weight, geometry, options, tensors)
    if found is None:
        if len(_recipes) >= _KEPT:
            _recipes.clear()
        found = _recipes[key] = _made(like, weight, geometry, options, tensors)
    return found


def forget() -> None:
    """Every later call is decided anew."""
    _recipes.clear()


@contextlib.contextmanager
def unremembered() -> Iterator[None]:
    """No recipe from before is found inside the block; those that are made there are forgotten behind it."""
    before = dict(_recipes)
    _recipes.clear()
    try:
        yield
    finally:
        _recipes.clear()
        _recipes.update(before)


def _made(
    like: Tensor,
    weight: Tensor | None,
    geometry: Geometry | None,
    options: Options,
    tensors: TailTensors,
) -> Recipe:
    """The recipe; TypeError, ValueError or NotImplementedError naming what does not fit."""
    if weight is None or geometry is None:
        return _of_map(like, options, tensors)
    return _of_convolution(like, weight, geometry, options, tensors)


def _of_convolution(
    raw: Tensor, weight: Tensor, geometry: Geometry, options: Options, tensors: TailTensors
) -> Recipe:
    """Recipe of ``conv_norm_film``."""
    dims = spec.check_feature_map("x", raw)
    if weight.dtype != raw.dtype:
        raise TypeError(
            f"weight must have x's dtype {raw.dtype}, got {weight.dtype} (use torch.autocast to mix them)"
        )
    bias = tensors.bias
    stride, padding, dilation, transposed, output_padding, groups = geometry
    stride = spec.as_tuple("stride", stride, dims, 1)
    padding = spec.as_tuple("padding", padding, dims)
    dilation = spec.as_tuple("dilation", dilation, dims, 1)
    output_padding = spec.as_tuple("output_padding", output_padding, dims)
    channels = _check_weight(raw, weight, groups, transposed)
    spec.check_channel_vector("bias", bias, channels)
    batch, kernel = raw.shape[0], tuple(weight.shape[2:])
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)
    size = geometry.output_size(raw.shape[2:], kernel)
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
    plan = choice.choose(
        choice.Request(
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
    plain = empty or plan.route == "eager"
    exact = bias is None or bias.dtype == raw.dtype or plan.route == "fused"
    bare = kind.norm == kind.activation == "none" and exact and (bias is None or plan.adds_bias)
    bare = bare and tensors.gamma is tensors.beta is tensors.dropout_mask is None
    return Recipe(kind, plan, geometry, plain, bare, settings.forced())


def _of_map(x: Tensor, options: Options, tensors: TailTensors) -> Recipe:
    """Recipe of ``norm_film``."""
    spec.check_feature_map("x", x)
    batch, channels, *size = x.shape
    kind = _kind(x, batch, channels, size, {"x": x}, options, tensors)
    plan = choice.for_pass(x)
    plain = x.numel() == 0 or plan.route == "eager"
    return Recipe(kind, plan, None, plain, False, settings.forced())


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
    running_mean, running_var, _, norm_weight, norm_bias, _ = tensors[:6]
    gamma, beta, dropout_mask, slope = tensors[6:]
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
    number = spec.check_slope(activation, options.slope if slope is None else slope, channels)
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
        norm in spec.SAMPLE_NORMS
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
    if norm in spec.SAMPLE_NORMS and batch * (channels // groups) * voxels == 1:
        raise ValueError(f"norm={norm!r} needs more than 1 value per group, got {shape}")


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
