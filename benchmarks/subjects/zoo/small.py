"""Small networks of the packages that ``fastfilm.convert`` knows: one list for tests and table."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network as its package makes it.

    Attributes:
        package: what has to be installed.
        name: of the architecture, with what is special about this one.
        make: builds it.
        shape: of an input [N, C, *S].
        call: runs it; gives a tensor or several.
        fixed: it takes no other size.
    """

    package: str
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x)
    fixed: bool = False

    @property
    def id(self) -> str:
        """Package and name in one word."""
        return f"{self.package}-{self.name}".replace(" ", "-")

    @property
    def timed(self) -> tuple[int, ...]:
        """Shape of the input that it is timed with, larger than the one that it is tested with."""
        n, c, *size = self.shape
        factor = 1 if self.fixed else 4 if len(size) == 2 else 2
        return (n, c, *(factor * s for s in size))

    def build(self) -> nn.Module:
        """The network with initial weights; dropout off, so that two runs may be compared.

        Raises:
            ImportError: the package is not installed.
        """
        if self.package in ("segmentation_models_pytorch", "timm", "torchvision"):
            torchvision_operators()
        importlib.import_module(self.package)
        model = self.make()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
        return model

    def outputs(self, model: nn.Module, x: Tensor) -> list[Tensor]:
        """Floating-point tensors among all that the network gives, nested or not."""
        return [t for t in _leaves(self.call(model, x)) if t.is_floating_point()]


def _leaves(found: Any) -> list[Tensor]:
    """Tensors in nested lists, tuples and dictionaries."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, (list, tuple)):
        return [t for part in found for t in _leaves(part)]
    return [found] if isinstance(found, Tensor) else []


@functools.cache
def torchvision_operators() -> Any:
    """Declares two operators of torchvision where its binary does not fit torch, so that it can be imported."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


def of(module: str, name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """Calls ``name`` of ``module`` with these arguments, importing it only then."""

    def make() -> nn.Module:
        found: nn.Module = getattr(importlib.import_module(module), name)(*args, **kwargs)
        return found

    return make


def monai(name: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    """A class of MONAI's networks."""
    return of("monai.networks.nets", name, *args, **kwargs)


def nnunet(name: str, dims: int, **kwargs: Any) -> Callable[[], nn.Module]:
    """A U-Net of nnU-Net with three stages; ``kwargs`` replace the usual options."""
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    options: dict[str, Any] = {
        "conv_bias": True,
        "norm_op": norm,
        "norm_op_kwargs": {"affine": True, "eps": 1e-5},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    return of(
        "dynamic_network_architectures.architectures.unet",
        name,
        1,
        3,
        (8, 16, 32),
        conv,
        3,
        (1, 2, 2),
        2,
        2,
        2,
        **(options | kwargs),
    )


def smp(name: str, encoder: str = "resnet18", **kwargs: Any) -> Callable[[], nn.Module]:
    """An architecture of segmentation_models_pytorch on an encoder without weights."""
    return of("segmentation_models_pytorch", name, encoder, encoder_weights=None, **kwargs)


def unet3d(order: str, name: str = "UNet3D", **kwargs: Any) -> Callable[[], nn.Module]:
    """A network of pytorch-3dunet whose blocks are built in the order of these letters."""
    options: dict[str, Any] = {"f_maps": 8, "num_levels": 3, "layer_order": order}
    return of("pytorch3dunet.unet3d.model", name, 1, 2, **(options | kwargs))


def with_steps(model: nn.Module, x: Tensor) -> Any:
    """Calls a diffusion network at a time step for each image."""
    return model(x, torch.arange(x.shape[0]))


VOLUME, IMAGE, RGB = (2, 1, 16, 16, 16), (2, 1, 32, 32), (2, 3, 32, 32)
SHALLOW: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (32, 16, 16)}
DYN: dict[str, Any] = {"filters": [8, 16, 32]}

NETWORKS: tuple[Network, ...] = (
    Network(
        "monai", "UNet 3D", monai("UNet", 3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2), VOLUME
    ),
    Network(
        "monai",
        "UNet 2D batch norm",
        monai("UNet", 2, 1, 2, (8, 16, 32), (2, 2), norm="batch", act="relu"),
        IMAGE,
    ),
    Network(
        "monai", "BasicUNet", monai("BasicUNet", 3, 1, 2, (4, 4, 8, 8, 16, 4)), (2, 1, 32, 16, 16)
    ),
    Network(
        "monai",
        "BasicUNetPlusPlus",
        monai("BasicUNetPlusPlus", 2, 1, 2, (4, 4, 8, 8, 16, 4)),
        IMAGE,
    ),
    Network(
        "monai",
        "DynUNet 3D",
        monai("DynUNet", 3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], **DYN),
        VOLUME,
    ),
    Network(
        "monai",
        "DynUNet 2D residual",
        monai(
            "DynUNet",
            2,
            1,
            2,
            [3, 3, 3],
            [1, 2, 2],
            [2, 2],
            res_block=True,
            deep_supervision=True,
            **DYN,
        ),
        IMAGE,
    ),
    Network("monai", "SegResNet", monai("SegResNet", 3, 8, 1, 2), VOLUME),
    Network(
        "monai", "SegResNetDS", monai("SegResNetDS", 3, 8, 1, 2, blocks_down=(1, 2, 2)), VOLUME
    ),
    Network("monai", "AttentionUnet", monai("AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2)), IMAGE),
    Network(
        "monai",
        "FlexibleUNet EfficientNet",
        monai("FlexibleUNet", 1, 2, "efficientnet-b0", spatial_dims=2),
        (2, 1, 64, 64),
    ),
    Network(
        "monai",
        "FlexibleUNet ResNet",
        monai("FlexibleUNet", 1, 2, "resnet18", spatial_dims=2),
        (2, 1, 64, 64),
    ),
    Network(
        "monai",
        "SwinUNETR",
        monai("SwinUNETR", 1, 2, feature_size=12, spatial_dims=2),
        (2, 1, 64, 64),
    ),
    Network(
        "monai",
        "UNETR",
        monai("UNETR", 1, 2, (16, 16, 32), 8, 24, 48, 4),
        (2, 1, 16, 16, 32),
        fixed=True,
    ),
    Network(
        "monai",
        "DiffusionModelUNet",
        monai(
            "DiffusionModelUNet",
            2,
            1,
            1,
            channels=(8, 16),
            num_res_blocks=1,
            attention_levels=(False, True),
            norm_num_groups=4,
            num_head_channels=8,
        ),
        IMAGE,
        with_steps,
    ),
    Network(
        "dynamic_network_architectures",
        "PlainConvUNet 3D",
        nnunet("PlainConvUNet", 3, deep_supervision=True),
        VOLUME,
    ),
    Network("dynamic_network_architectures", "PlainConvUNet 2D", nnunet("PlainConvUNet", 2), IMAGE),
    Network(
        "dynamic_network_architectures",
        "ResidualEncoderUNet 3D",
        nnunet("ResidualEncoderUNet", 3),
        VOLUME,
    ),
    *(
        Network("segmentation_models_pytorch", name, smp(name, **SHALLOW), RGB)
        for name in ("Unet", "UnetPlusPlus", "MAnet")
    ),
    *(
        Network("segmentation_models_pytorch", name, smp(name), RGB)
        for name in ("FPN", "DeepLabV3Plus")
    ),
    Network(
        "segmentation_models_pytorch",
        "Unet EfficientNet",
        smp("Unet", "efficientnet-b0", **SHALLOW),
        RGB,
    ),
    Network(
        "segmentation_models_pytorch",
        "Unet RegNet timm",
        smp("Unet", "timm-regnetx_002", **SHALLOW),
        RGB,
    ),
    Network(
        "torchvision",
        "FCN ResNet-50",
        of("torchvision.models.segmentation", "fcn_resnet50", weights=None, weights_backbone=None),
        (2, 3, 32, 32),
        lambda model, x: model(x)["out"],
    ),
    Network("torchvision", "r3d_18", of("torchvision.models.video", "r3d_18"), (2, 3, 8, 32, 32)),
    *(
        Network("pytorch3dunet", f"UNet3D {order}", unet3d(order), VOLUME)
        for order in ("gcr", "cbr", "bcr", "cl", "crg")
    ),
    Network("pytorch3dunet", "ResidualUNet3D", unet3d("gcr", "ResidualUNet3D"), VOLUME),
)
"""In the order of the table."""
