"""Networks of MONAI: variants of its U-Nets, autoencoders, generators, registration and diffusion."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .small import DYN, IMAGE, RGB, VOLUME, Network, monai, with_steps

WIDTHS: tuple[Any, ...] = ((8, 16, 32), (2, 2))
"""Channels and strides of three levels."""

CODED: tuple[Any, ...] = ((8, 16, 32), (1, 2, 2))
"""The same for autoencoders, which take a stride for each."""

GROUP = ("group", {"num_groups": 4})
ATTENTION: dict[str, Any] = {
    "channels": (16, 32),
    "num_res_blocks": 1,
    "attention_levels": (False, True),
    "norm_num_groups": 8,
}
DIFFUSION = ATTENTION | {"num_head_channels": 8}
LABELS = 3
"""Classes of the label maps that SPADE networks are conditioned on."""


def _labels(x: Tensor) -> Tensor:
    """One-hot maps [N, LABELS, *S], in stripes."""
    index = torch.arange(x.shape[-1], device=x.device) % LABELS
    maps = torch.nn.functional.one_hot(index, LABELS).T.to(x.dtype)
    shape = (1, LABELS, *(1,) * (x.dim() - 3), x.shape[-1])
    return maps.reshape(shape).expand(x.shape[0], LABELS, *x.shape[2:])


def _spade(model: nn.Module, x: Tensor) -> Any:
    return model(_labels(x), x)


def _spade_coded(model: nn.Module, x: Tensor) -> Any:
    return model(x, _labels(x))


def _spade_diffused(model: nn.Module, x: Tensor) -> Any:
    return model(x, torch.arange(x.shape[0]), _labels(x))


def _controlled(model: nn.Module, x: Tensor) -> Any:
    # the map that controls is eight times as large as the latent one
    finer = torch.nn.functional.interpolate(x, scale_factor=8)
    return model(x, torch.arange(x.shape[0]), finer)


def _dints() -> nn.Module:
    """A DiNTS network whose cells at all edges of two depths are of alternating kinds."""
    nets = importlib.import_module("monai.networks.nets")
    blocks, depths = 2, 2
    active = np.ones((blocks, 3 * depths - 2))
    kinds = np.arange(active.size).reshape(active.shape) % 2
    space = nets.TopologyInstance(
        arch_code=[active, kinds],
        channel_mul=0.5,
        num_blocks=blocks,
        num_depths=depths,
        use_downsample=True,
    )
    model: nn.Module = nets.DiNTS(space, 1, 2, use_downsample=True)
    return model


def _named(name: str, make: Any, shape: tuple[int, ...], *more: Any, **options: Any) -> Network:
    return Network("monai", name, make, shape, *more, **options)


VARIANTS: tuple[Network, ...] = (
    _named("UNet 2D group norm", monai("UNet", 2, 1, 2, *WIDTHS, norm=GROUP, act="swish"), IMAGE),
    _named("UNet 2D no norm", monai("UNet", 2, 1, 2, *WIDTHS, norm=None, act="elu"), IMAGE),
    _named("UNet 2D kernel 5", monai("UNet", 2, 1, 2, *WIDTHS, 5, num_res_units=1), IMAGE),
    _named(
        "UNet 3D batch norm residual",
        monai("UNet", 3, 1, 2, *WIDTHS, num_res_units=2, norm="batch", act="relu", dropout=0.1),
        VOLUME,
    ),
    _named(
        "UNet 3D norm before activation",
        monai("UNet", 3, 1, 2, *WIDTHS, act="gelu", adn_ordering="NA", bias=False),
        VOLUME,
    ),
    _named(
        "BasicUNet 2D batch norm",
        monai("BasicUNet", 2, 1, 2, (8, 8, 16, 16, 32, 8), norm="batch", act="relu"),
        IMAGE,
    ),
    _named(
        "BasicUNetPlusPlus 3D",
        monai("BasicUNetPlusPlus", 3, 1, 2, (8, 8, 16, 16, 32, 8), deep_supervision=True),
        (2, 1, 32, 16, 16),
    ),
    _named(
        "DynUNet 2D batch norm",
        monai("DynUNet", 2, 1, 2, [3] * 3, [1, 2, 2], [2, 2], norm_name="batch", **DYN),
        IMAGE,
    ),
    _named(
        "DynUNet 3D anisotropic",
        monai(
            "DynUNet",
            3,
            1,
            2,
            [(1, 3, 3), (3, 3, 3), (3, 3, 3)],
            [1, (1, 2, 2), 2],
            [(1, 2, 2), 2],
            deep_supervision=True,
            **DYN,
        ),
        VOLUME,
    ),
    _named(
        "SegResNet 2D batch norm",
        monai("SegResNet", 2, 8, 1, 2, norm="batch", upsample_mode="deconv"),
        IMAGE,
    ),
    _named("SegResNetVAE", monai("SegResNetVAE", (16, 16, 16), vae_nz=16), VOLUME, fixed=True),
    _named(
        "SegResNetDS 2D instance norm",
        monai("SegResNetDS", 2, 8, 1, 2, norm="instance", blocks_down=(1, 2, 2), dsdepth=2),
        IMAGE,
    ),
    _named("AttentionUnet 3D", monai("AttentionUnet", 3, 1, 2, *WIDTHS), VOLUME),
    _named(
        "FlexibleUNet ResNet-50",
        monai("FlexibleUNet", 1, 2, "resnet50", spatial_dims=2),
        (2, 1, 32, 32),
    ),
    _named(
        "FlexibleUNet EfficientNet-B1 instance norm",
        monai(
            "FlexibleUNet",
            1,
            2,
            "efficientnet-b1",
            spatial_dims=2,
            norm="instance",
            act="leakyrelu",
            upsample="deconv",
        ),
        (2, 1, 64, 64),
    ),
    _named(
        "FlexibleUNet ResNet 3D",
        monai("FlexibleUNet", 1, 2, "resnet10", spatial_dims=3),
        (2, 1, 32, 32, 32),
    ),
    _named("VNet 3D", monai("VNet", 3, 1, 2), (2, 1, 16, 16, 16)),
    _named("VNet 2D", monai("VNet", 2, 1, 2, act="relu", dropout_dim=2), IMAGE),
    _named("HighResNet 3D", monai("HighResNet", 3, 1, 2), (2, 1, 8, 8, 8)),
    _named("AHNet 2D", monai("AHNet", (1, 1, 1, 1), 2, 1, 2, 0, "bilinear"), (2, 1, 64, 64)),
    _named("DiNTS", _dints, VOLUME),
    _named("MedNeXt", monai("MedNeXt", 3, 8, 1, 2, kernel_size=3), VOLUME),
    _named("Quicknat", monai("Quicknat", 2, 1, 16), IMAGE),
    _named(
        "VoxelMorphUNet",
        monai("VoxelMorphUNet", 3, 2, 3, (8, 16, 16, 16), (8,)),
        (2, 2, 16, 16, 16),
    ),
    _named("RegUNet", monai("RegUNet", 3, 2, 8, 2), (2, 2, 16, 16, 16)),
    _named("LocalNet", monai("LocalNet", 3, 2, 8, (0, 1, 2)), (2, 2, 16, 16, 16)),
    _named(
        "SwinUNETR 3D",
        monai("SwinUNETR", 1, 2, feature_size=12, depths=(1, 1, 1, 1), window_size=2),
        (2, 1, 64, 32, 32),
    ),
)
"""Segmentation and registration."""

GENERATIVE: tuple[Network, ...] = (
    _named(
        "AutoEncoder 2D",
        monai("AutoEncoder", 2, 1, 1, *CODED, inter_channels=[32], norm="batch", act="relu"),
        IMAGE,
    ),
    _named(
        "VarAutoEncoder",
        monai("VarAutoEncoder", 2, (1, 32, 32), 1, 8, *CODED),
        IMAGE,
        fixed=True,
    ),
    _named("AutoencoderKL", monai("AutoencoderKL", 2, **ATTENTION), IMAGE),
    _named(
        "VQVAE",
        monai(
            "VQVAE",
            2,
            1,
            1,
            channels=(16, 32),
            num_res_layers=2,
            num_res_channels=(16, 32),
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
            upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            num_embeddings=8,
            embedding_dim=8,
        ),
        IMAGE,
    ),
    _named(
        "SPADENet",
        monai(
            "SPADENet", 2, 1, 1, LABELS, [32, 32], [32, 16, 8], 8, spade_intermediate_channels=16
        ),
        IMAGE,
        _spade,
        fixed=True,
    ),
    _named(
        "SPADEAutoencoderKL",
        monai("SPADEAutoencoderKL", 2, LABELS, spade_intermediate_channels=16, **ATTENTION),
        IMAGE,
        _spade_coded,
    ),
    _named(
        "SPADEDiffusionModelUNet",
        monai(
            "SPADEDiffusionModelUNet",
            2,
            1,
            1,
            LABELS,
            spade_intermediate_channels=16,
            **DIFFUSION,
        ),
        IMAGE,
        _spade_diffused,
    ),
    _named(
        "DiffusionModelUNet residual resampling",
        monai("DiffusionModelUNet", 2, 1, 1, resblock_updown=True, **DIFFUSION),
        IMAGE,
        with_steps,
    ),
    _named(
        "ControlNet",
        monai("ControlNet", 2, 1, conditioning_embedding_num_channels=(8, 16, 32, 32), **DIFFUSION),
        (2, 1, 16, 16),
        _controlled,
    ),
    _named("PatchDiscriminator", monai("PatchDiscriminator", 2, 8, 1, num_layers_d=2), IMAGE),
    _named(
        "Generator",
        monai("Generator", (8,), (32, 8, 8), (32, 16, 1), (2, 2, 1)),
        (2, 8),
        fixed=True,
    ),
)
"""Autoencoders, generators, discriminators and diffusion."""

CLASSIFIERS: tuple[Network, ...] = (
    _named(
        "DenseNet 3D",
        monai("DenseNet", 3, 1, 2, 16, 8, (2, 2, 2)),
        (2, 1, 32, 32, 32),
    ),
    _named(
        "ResNet-18 3D",
        monai("ResNet", "basic", [2, 2, 2, 2], [16, 32, 64, 128], n_input_channels=1),
        VOLUME,
    ),
    _named(
        "SEResNet-50 2D", monai("SEResNet50", spatial_dims=2, in_channels=3, num_classes=4), RGB
    ),
)

MEDICAL = VARIANTS + GENERATIVE + CLASSIFIERS
