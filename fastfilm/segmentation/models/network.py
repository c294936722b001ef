"""Networks by configuration: fastfilm's own, and those of other libraries through ``fastfilm.condition``."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.nn import FiLMGenerator

from ..config.sections import NetworkConfig
from ..support.errors import UserError
from ..support.offline import offline, switched_off

TRUSTED = (
    "monai.networks.nets.",
    "dynamic_network_architectures.architectures.",
    "segmentation_models_pytorch.",
)
"""Where ``network.target`` may come from: a model folder must not be able to name any function there is."""

DEFAULT_DEPTH = 4


def build_network(
    config: NetworkConfig,
    *,
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    metadata_size: int,
) -> nn.Module:
    """The network, freshly initialised, without a final activation; nothing is fetched.

    Called as ``call(network, image, rows)``.

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels: channels of image and logits.
        metadata_size: columns of the metadata encoder; 0 builds an unconditioned network.

    Raises:
        UserError: settings that do not fit, a class that is not there.
    """
    if config.conditioning == "channels" and metadata_size:
        inner = build_network(
            config,
            spatial_dims=spatial_dims,
            in_channels=in_channels + metadata_size,
            out_channels=out_channels,
            metadata_size=0,
        )
        return MetadataChannels(inner, metadata_size)
    try:
        if config.name == "condition":
            return _conditioned(config, spatial_dims, in_channels, out_channels, metadata_size)
        common: dict[str, Any] = {
            "base_filters": config.base_filters,
            "metadata_size": metadata_size,
            "film_layers": config.film_layers if metadata_size else None,
            "dropout": config.dropout,
            "generator": config.generator,
        }
        if config.name == "Modified3DUNet":
            if spatial_dims != 3:
                raise ValueError("Modified3DUNet takes volumes: set preprocessing.dimensions to 3d")
            if config.deep_supervision:
                raise ValueError(
                    "Modified3DUNet adds its coarse outputs itself: no deep_supervision"
                )
            return fastfilm.Modified3DUNet(in_channels, out_channels, **common)
        return fastfilm.FiLMedUNet(
            in_channels,
            out_channels,
            spatial_dims=spatial_dims,
            depth=config.depth or DEFAULT_DEPTH,
            norm=None if config.norm == "none" else config.norm,
            order=config.order,
            activation=config.activation,
            deep_supervision=config.deep_supervision,
            **common,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"network: {error}") from error
    except (MemoryError, RuntimeError) as error:
        raise UserError(f"network: cannot be built: {str(error).splitlines()[0]}") from error


class MetadataChannels(nn.Module):
    """A network that gets its metadata as image channels, each of them constant.

    Args:
        network: takes C + M image channels and no metadata.
        metadata_size: M.
    """

    def __init__(self, network: nn.Module, metadata_size: int) -> None:
        super().__init__()
        self.network, self.metadata_size = network, metadata_size

    def forward(self, image: Tensor, metadata: Tensor) -> Any:
        """Logits for ``image`` [N, C, *S] and ``metadata`` [N or 1, M]."""
        rows = metadata.to(image).expand(len(image), -1)
        rows = rows.reshape(*rows.shape, *[1] * (image.dim() - 2))
        return self.network(torch.cat([image, rows.expand(-1, -1, *image.shape[2:])], 1))


def call(network: nn.Module, image: Tensor, rows: Tensor | None) -> Any:
    """Logits for ``image`` [N, C, *S] and metadata ``rows`` [N or 1, M] (None or M = 0: unconditioned).

    Networks with deep supervision return a list in training, full size first; some do so always.
    """
    if rows is None or rows.shape[-1] == 0:
        return network(image)
    return network(image, rows)


def divisor(config: NetworkConfig) -> int:
    """Patch sizes must be a multiple of this, or (``FiLMedUNet``) at least this."""
    if config.name == "Modified3DUNet":
        return 16
    # networks of other libraries mostly halve their input four or five times
    return 32 if config.name == "condition" else 2 ** (config.depth or DEFAULT_DEPTH)


def generator_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The weights that turn metadata into γ and β, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in network.modules():
        if isinstance(module, FiLMGenerator):
            found |= {id(p): p for p in module.parameters()}
    return list(found.values())


def grow_metadata(network: nn.Module, column: int) -> None:
    """Gives every generator one more input at position ``column``, in place.

    The new weights are the mean of the others, so that a value never seen starts as an average one.
    """
    grown: dict[int, nn.Parameter] = {}
    for module in network.modules():
        if not isinstance(module, FiLMGenerator):
            continue
        first = module.hidden[0]
        assert isinstance(first, nn.Linear)
        old = first.weight
        if id(old) not in grown:
            new = old.detach().mean(1, keepdim=True)
            whole = torch.cat([old.detach()[:, :column], new, old.detach()[:, column:]], 1)
            grown[id(old)] = nn.Parameter(whole, requires_grad=old.requires_grad)
        first.weight = grown[id(old)]
        first.in_features = module.metadata_size = first.weight.shape[1]
    for module in network.modules():
        if isinstance(getattr(module, "metadata_size", None), int) and not isinstance(
            module, FiLMGenerator
        ):
            module.metadata_size = module.metadata_size + 1  # type: ignore[assignment, operator]


def _conditioned(
    config: NetworkConfig, dims: int, channels: int, out: int, metadata_size: int
) -> nn.Module:
    target = config.target or ""
    if not target.startswith(TRUSTED):
        raise ValueError(f"target must begin with one of {', '.join(TRUSTED)}, got {target!r}")
    module, _, name = target.rpartition(".")
    with offline(target):
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"target {target!r} cannot be imported: {error}") from error
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise ValueError(f"target {target!r} is not a network class")
        arguments = {k: _argument(v, channels, out, dims) for k, v in config.arguments.items()}
        try:
            network = cls(**switched_off(cls, arguments))
        except UserError:
            raise
        except Exception as error:  # of another library
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{target} cannot be built with these arguments: {reason}") from error
    if metadata_size == 0:
        return network
    options: dict[str, Any] = {"order": config.order, "generator": config.generator}
    if config.where is not None:
        options["where"] = config.where
    return fastfilm.condition(fastfilm.convert(network, verbose=False), metadata_size, **options)


def _argument(value: Any, channels: int, out: int, dims: int) -> Any:
    """``{in}``, ``{out}``, ``{dims}`` -> numbers, ``torch.nn.X`` -> the class; lists and dictionaries inside."""
    if isinstance(value, list):
        return [_argument(v, channels, out, dims) for v in value]
    if isinstance(value, dict):
        return {k: _argument(v, channels, out, dims) for k, v in value.items()}
    if not isinstance(value, str):
        return value
    numbers = {"{in}": channels, "{out}": out, "{dims}": dims}
    if value in numbers:
        return numbers[value]
    if value.startswith("torch.nn."):
        cls = getattr(nn, value.removeprefix("torch.nn."), None)
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            return cls
        raise ValueError(f"arguments: {value!r} is no class of torch.nn")
    return value
