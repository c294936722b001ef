"""Weights of ivadomed's FiLM networks: the table of their names for the tensors of ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastfilm.ops import spec

from .blocks import ConvNormFiLM, DoubleConv
from .generator import FiLMGenerator

Keys = dict[str, str]
"""ivadomed's name -> our name in ``state_dict()``; several of theirs may be one of ours."""


def generator_keys(theirs: str, ours: str) -> Keys:
    """Names of one FiLM generator."""
    keys = {}
    for i, mine in enumerate(("hidden.0", "hidden.1", "last"), start=1):
        for part in ("weight", "bias"):
            keys[f"{theirs}.generator.linear{i}.{part}"] = f"{ours}.{mine}.{part}"
    return keys


def _double_keys(theirs: str, ours: str, block: DoubleConv) -> Keys:
    keys: Keys = {}
    for i, name in ((1, "first"), (2, "second")):
        layer = getattr(block, name)
        keys |= _layer_keys(f"{theirs}.conv{i}", f"{theirs}.conv{i}_bn", f"{ours}.{name}", layer)
    return keys


def _layer_keys(conv: str, norm: str, ours: str, layer: nn.Module) -> Keys:
    """Names of a convolution and the norm that belongs to it."""
    assert isinstance(layer, ConvNormFiLM)
    keys = {f"{conv}.{part}": f"{ours}.{part}" for part in ("weight", "bias")}
    inner = layer.norm_layer
    names = inner.state_dict() if isinstance(inner, nn.Module) else ()
    keys |= {f"{norm}.{part}": f"{ours}.norm_layer.{part}" for part in names}
    return keys


def _gate_keys(model: Any) -> Keys:
    """Names of the attention gates, if there are any."""
    if model.gates is None:
        return {}
    keys = _layer_keys("gating.conv1.0", "gating.conv1.1", "gating", model.gating)
    for i, gate in enumerate(model.gates):
        theirs, ours = f"attentionblock{i + 2}", f"gates.{i}"
        keys |= _layer_keys(f"{theirs}.W.0", f"{theirs}.W.1", f"{ours}.out", gate.out)
        keys[f"{theirs}.theta.weight"] = f"{ours}.theta.weight"
        for name in ("phi", "psi"):
            keys |= {f"{theirs}.{name}.{p}": f"{ours}.{name}.{p}" for p in ("weight", "bias")}
    return keys


def unet_keys(model: Any) -> Keys:
    """Names of a ``FiLMedUNet``."""
    depth = model.depth
    if model.heads:
        raise ValueError("a network with deep supervision has no ivadomed form")
    keys: Keys = {}
    film = [f"encoder.down_path.{3 * i + 1}" for i in range(depth)]
    film += ["encoder.film_bottom", *(f"decoder.up_path.{2 * j + 1}" for j in range(depth))]
    film.append("decoder.last_film")
    for i, block in enumerate(model.encoder):
        keys |= _double_keys(f"encoder.down_path.{3 * i}", f"encoder.{i}", block)
    keys |= _double_keys("encoder.conv_bottom", "bottom", model.bottom)
    for j, block in enumerate(model.decoder):
        keys |= _double_keys(f"decoder.up_path.{2 * j}.downconv", f"decoder.{j}", block)
    keys |= {f"decoder.last_conv.{p}": f"last.{p}" for p in ("weight", "bias")}
    return keys | film_keys(model.film, film)


_CONTEXT = ("conv3d_c1_1", "conv3d_c2", "conv3d_c3", "conv3d_c4", "conv3d_c5")


def modified_keys(model: Any) -> Keys:
    """Names of a ``Modified3DUNet``; the lowest block is named after whether it is modulated."""
    ours = {"stem": _CONTEXT[0], "inner.0": "conv3d_c1_2", "outer": "lrelu_conv_c1.1"}
    ours |= {f"down.{i}": _CONTEXT[i + 1] for i in range(4)}
    ours |= {f"inner.{i}": f"norm_lrelu_conv_c{i + 1}.2" for i in range(1, 5)}
    lowest = "upscale_conv_norm_lrelu_0.1"
    if not model.film_layers[4]:
        lowest = "norm_lrelu_upscale_conv_norm_lrelu_l0.3"
    ours |= {"up.0": lowest, "bottom": "conv3d_l0", "last": "conv3d_l4"}
    ours |= {f"up.{i}": f"norm_lrelu_upscale_conv_norm_lrelu_l{i}.3" for i in (1, 2, 3)}
    ours |= {f"local.{i}": f"conv_norm_lrelu_l{i + 1}.0" for i in range(4)}
    ours |= {f"reduce.{i}": f"conv3d_l{i + 1}" for i in range(3)}
    ours |= {f"heads.{i}": f"ds{i + 2}_1x1_conv3d" for i in range(2)}
    keys = {f"{theirs}.weight": f"{mine}.weight" for mine, theirs in ours.items()}
    return keys | _gate_keys(model) | film_keys(model.film, _MODIFIED_FILM)


_MODIFIED_FILM = tuple(f"film_layer{i}" for i in range(1, 11))


def read_modified(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the ``Modified3DUNet`` that a state_dict belongs to."""
    first, last = f"{_CONTEXT[0]}.weight", "conv3d_l4.weight"
    if first not in state or last not in state:
        raise ValueError(f"state_dict is not a Modified3DUNet's: it has no {first!r} and {last!r}")
    switches, metadata_size = read_film(state, _MODIFIED_FILM)
    return {
        "in_channels": state[first].shape[1],
        "out_channels": state[last].shape[0],
        "base_filters": state[first].shape[0],
        "metadata_size": metadata_size,
        "film_layers": switches,
        "attention": "gating.conv1.0.weight" in state,
    }


def film_keys(film: nn.ModuleList, names: Iterable[str]) -> Keys:
    """Names of a network's generators, in the order of its FiLM layers."""
    keys: Keys = {}
    for i, (generator, name) in enumerate(zip(film, names, strict=True)):
        if isinstance(generator, FiLMGenerator):
            keys |= generator_keys(name, f"film.{i}")
    return keys


def _count(state: Mapping[str, Tensor], pattern: str, step: int) -> int:
    n = 0
    while pattern.format(n * step) in state:
        n += 1
    return n


def read_unet(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the ``FiLMedUNet`` that a state_dict belongs to."""
    first = "encoder.down_path.0.conv1.weight"
    last = "decoder.last_conv.weight"
    if first not in state or last not in state:
        raise ValueError(f"state_dict is not a FiLMedUnet's: it has no {first!r} and {last!r}")
    depth = _count(state, "encoder.down_path.{}.conv1.weight", 3)
    film = [f"encoder.down_path.{3 * i + 1}" for i in range(depth)]
    film += ["encoder.film_bottom", *(f"decoder.up_path.{2 * j + 1}" for j in range(depth))]
    film.append("decoder.last_film")
    switches, metadata_size = read_film(state, film)
    dims = state[first].dim() - 2
    batch = "encoder.down_path.0.conv1_bn.running_mean" in state
    return {
        "in_channels": state[first].shape[1],
        "out_channels": state[last].shape[0],
        "spatial_dims": dims,
        "depth": depth,
        "base_filters": state[first].shape[0],
        "metadata_size": metadata_size,
        "film_layers": switches,
        "norm": "batch" if batch else "instance",
        "norm_affine": "encoder.down_path.0.conv1_bn.weight" in state,
    }


def read_film(state: Mapping[str, Tensor], names: Iterable[str]) -> tuple[list[int], int]:
    """The FiLM layers of a state_dict, and the width of its metadata."""
    keys = [f"{name}.generator.linear1.weight" for name in names]
    size = next((state[k].shape[1] for k in keys if k in state), 0)
    return [int(k in state) for k in keys], size


class Settings(NamedTuple):
    """Hyper-parameters of a network that its state_dict does not hold."""

    dropout: float = 0.0
    momentum: float | None = 0.1
    eps: float = 1e-5
    final_activation: str | None = "sigmoid"

    def apply(self, model: nn.Module) -> None:
        """Sets momentum and eps of every norm layer of ours."""
        for block in model.modules():
            if isinstance(block, ConvNormFiLM) and block.norm_layer is not None:
                block.momentum, block.eps = self.momentum, self.eps


def read_settings(source: Mapping[str, Tensor] | nn.Module, **given: Any) -> Settings:
    """The settings of a network of ivadomed's, as far as ``given`` has no other value than ``KEPT``.

    Raises:
        ValueError: a setting that differs from layer to layer, or that our networks do not have.
    """
    found: dict[str, Any] = {}
    if isinstance(source, nn.Module):
        modules = list(source.modules())
        norms = [m for m in modules if isinstance(m, (_BatchNorm, _InstanceNorm, nn.GroupNorm))]
        tracking = [m for m in norms if getattr(m, "track_running_stats", False)]
        values: dict[str, list[Any]] = {
            "dropout": [m.p for m in modules if isinstance(m, (nn.Dropout2d, nn.Dropout3d))],
            "momentum": [m.momentum for m in tracking],
            "eps": [m.eps for m in norms],
            "final_activation": [vars(m)[FINAL] for m in modules if FINAL in vars(m)],
        }
        fits = [isinstance(m, _BatchNorm if m in tracking else _InstanceNorm) for m in norms]
        if not all(fits):
            unfit = norms[fits.index(False)]
            raise ValueError(
                "norms must be batch norm with running statistics or instance norm without,"
                f" got {unfit}"
            )
        slopes = {m.negative_slope for m in modules if isinstance(m, nn.LeakyReLU)}
        if slopes - {spec.DEFAULT_SLOPE["leaky_relu"]}:
            raise ValueError(f"negative slopes must be 0.01, got {sorted(slopes)}")
        for name, several in values.items():
            if len(set(several)) > 1 and given[name] == KEPT:
                raise ValueError(f"{name} must be the same in all layers, got {set(several)}")
            if several:
                found[name] = several[0]
    return Settings(**(found | {k: v for k, v in given.items() if v != KEPT}))


KEPT = "source"
"""The value of an argument that stands for the source network's own."""

FINAL = "final_activation"


@torch.no_grad()
def load(model: nn.Module, state: Mapping[str, Tensor], keys: Keys) -> None:
    """Copies ``state`` into the model; the first of several names for a shared tensor wins.

    Raises:
        ValueError: missing or left-over names, or a tensor of another shape.
    """
    missing, extra = sorted(keys.keys() - state.keys()), sorted(state.keys() - keys.keys())
    if missing or extra:
        raise ValueError(f"state_dict does not fit: missing {missing[:4]}, unexpected {extra[:4]}")
    own = model.state_dict(keep_vars=True)
    done: set[int] = set()
    for theirs, ours in keys.items():
        target, value = own[ours], state[theirs]
        if target.shape != value.shape:
            raise ValueError(
                f"{theirs} must have shape {tuple(target.shape)}, got {tuple(value.shape)}"
            )
        if id(target) not in done:
            done.add(id(target))
            target.copy_(value)


def save(model: nn.Module, keys: Keys) -> dict[str, Tensor]:
    """The model's tensors, copied, under ivadomed's names."""
    own = model.state_dict()
    return {theirs: own[ours].detach().clone() for theirs, ours in keys.items()}
