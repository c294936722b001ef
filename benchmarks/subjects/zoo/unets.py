"""U-Nets of nnU-Net, of pytorch-3dunet, and in ivadomed's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .small import IMAGE, VOLUME, Network, nnunet, of, unet3d

ARCHITECTURES = "dynamic_network_architectures.architectures"
BLOCKS = "dynamic_network_architectures.building_blocks"
STAGES: dict[str, Any] = {
    "input_channels": 1,
    "n_stages": 3,
    "features_per_stage": (8, 16, 32),
    "kernel_sizes": 3,
    "strides": (1, 2, 2),
    "conv_bias": True,
    "norm_op_kwargs": {"affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
    "return_skips": True,
}
BATCH_2D: dict[str, Any] = {"conv_op": nn.Conv2d, "norm_op": nn.BatchNorm2d}
INSTANCE_3D: dict[str, Any] = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d}
SILU: dict[str, Any] = {"nonlin": nn.SiLU, "nonlin_kwargs": {}}


def _nnunet(name: str, make: Any, shape: tuple[int, ...]) -> Network:
    return Network("dynamic_network_architectures", name, make, shape)


NNUNET: tuple[Network, ...] = (
    _nnunet(
        "PlainConvUNet 2D batch norm",
        nnunet("PlainConvUNet", 2, norm_op=nn.BatchNorm2d, nonlin=nn.ReLU, conv_bias=False),
        IMAGE,
    ),
    _nnunet("PlainConvUNet 2D no norm", nnunet("PlainConvUNet", 2, norm_op=None), IMAGE),
    _nnunet(
        "PlainConvUNet 3D dropout",
        nnunet("PlainConvUNet", 3, dropout_op=nn.Dropout3d, dropout_op_kwargs={"p": 0.2}, **SILU),
        VOLUME,
    ),
    _nnunet(
        "PlainConvUNet 3D activation first",
        nnunet("PlainConvUNet", 3, nonlin_first=True),
        VOLUME,
    ),
    _nnunet(
        "ResidualEncoderUNet 2D",
        nnunet("ResidualEncoderUNet", 2, deep_supervision=True),
        IMAGE,
    ),
    _nnunet("ResidualUNet 3D", nnunet("ResidualUNet", 3), VOLUME),
    _nnunet(
        "PlainConvEncoder 2D pooled",
        of(
            f"{BLOCKS}.plain_conv_encoder",
            "PlainConvEncoder",
            n_conv_per_stage=2,
            pool="max",
            **(STAGES | BATCH_2D),
        ),
        IMAGE,
    ),
    _nnunet(
        "ResidualEncoder 3D squeezed",
        of(
            f"{BLOCKS}.residual_encoders",
            "ResidualEncoder",
            n_blocks_per_stage=2,
            squeeze_excitation=True,
            **(STAGES | INSTANCE_3D),
        ),
        VOLUME,
    ),
    _nnunet(
        "ResNetD-18",
        of(f"{ARCHITECTURES}.resnet", "ResNetD", 4, 3, "18", 2),
        (2, 3, 64, 64),
    ),
)

PYTORCH_3DUNET: tuple[Network, ...] = (
    *(
        Network("pytorch3dunet", f"UNet3D {order}", unet3d(order), VOLUME)
        for order in ("cge", "cr")
    ),
    Network("pytorch3dunet", "UNet2D bcr", unet3d("bcr", "UNet2D"), IMAGE),
    Network("pytorch3dunet", "UNet2D gcr dropped", unet3d("gcrd", "UNet2D"), IMAGE),
    Network("pytorch3dunet", "UNet3D transposed", unet3d("gcr", upsample="deconv"), VOLUME),
    Network("pytorch3dunet", "ResidualUNet2D cbr", unet3d("cbr", "ResidualUNet2D"), IMAGE),
    Network("pytorch3dunet", "ResidualUNetSE3D", unet3d("gcr", "ResidualUNetSE3D"), VOLUME),
)


def _with_metadata(model: nn.Module, x: Tensor) -> Any:
    metadata = torch.linspace(0, 1, 3 * x.shape[0], dtype=x.dtype, device=x.device)
    return model(x, metadata.reshape(x.shape[0], 3))


def _filmed(dims: int, form: str) -> Any:
    options: dict[str, Any] = {"depth": 2, "filters": 8, "classes": 2}
    return of(
        "benchmarks.subjects.eager_networks", "EagerFiLMedUNet", dims=dims, form=form, **options
    )


IVADOMED: tuple[Network, ...] = tuple(
    Network(
        "benchmarks", f"FiLMed U-Net {dims}D {said}", _filmed(dims, form), shape, _with_metadata
    )
    for dims, shape, said, form in (
        (2, IMAGE, "ivadomed", "expanded"),
        (3, VOLUME, "ivadomed", "expanded"),
        (2, IMAGE, "without FiLM", "none"),
    )
)
"""The network of ``benchmarks.subjects.eager_networks``, which has ivadomed's structure and names."""

UNETS = NNUNET + PYTORCH_3DUNET + IVADOMED
