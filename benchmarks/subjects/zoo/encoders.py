"""Architectures of segmentation_models_pytorch, and its encoders under a U-Net."""

from __future__ import annotations

from typing import Any

from .small import RGB, SHALLOW, Network, smp

WIDE = (2, 3, 64, 64)
"""Shape for what ends in a pyramid of pooled maps, whose batch norms need more than one pixel."""


def _network(name: str, make: Any, shape: tuple[int, ...] = RGB, **options: Any) -> Network:
    return Network("segmentation_models_pytorch", name, make, shape, **options)


ARCHITECTURES: tuple[Network, ...] = (
    _network("Linknet", smp("Linknet")),
    _network("PSPNet", smp("PSPNet"), WIDE),
    _network("PAN", smp("PAN"), (2, 3, 128, 128)),
    _network("DeepLabV3", smp("DeepLabV3"), WIDE),
    _network("UPerNet", smp("UPerNet"), WIDE),
    _network("Segformer", smp("Segformer", "mit_b0")),
    _network("DPT", smp("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True), RGB),
    _network("Unet attention", smp("Unet", decoder_attention_type="scse", **SHALLOW)),
    _network(
        "Unet instance norm",
        smp("Unet", decoder_use_norm={"type": "instancenorm", "affine": True}, **SHALLOW),
    ),
    _network("UnetPlusPlus EfficientNet", smp("UnetPlusPlus", "efficientnet-b0", **SHALLOW)),
)

UNETS: tuple[Network, ...] = tuple(
    _network(f"Unet {said}", smp("Unet", encoder, **options), shape)
    for said, encoder, shape, options in (
        ("ResNet-50", "resnet50", RGB, {}),
        ("ResNeXt-50", "resnext50_32x4d", RGB, {}),
        ("DenseNet-121", "densenet121", RGB, {}),
        ("VGG-11", "vgg11_bn", RGB, {}),
        ("MobileNetV2", "mobilenet_v2", RGB, {}),
        ("EfficientNet-B0 timm", "timm-efficientnet-b0", RGB, {}),
        ("SE-ResNet-50", "se_resnet50", RGB, {}),
        ("SK-ResNet-18", "timm-skresnet18", RGB, {}),
        ("DPN-68", "dpn68", RGB, {}),
        ("Inception-v4", "inceptionv4", WIDE, {}),
        ("Xception", "xception", WIDE, {}),
        ("MobileOne-S0", "mobileone_s0", RGB, {}),
        ("MiT-B0", "mit_b0", RGB, {}),
        (
            "ConvNeXt timm",
            "tu-convnext_atto",
            RGB,
            {"encoder_depth": 4, "decoder_channels": (64, 32, 16, 16)},
        ),
        ("ResNet-18 timm", "tu-resnet18", RGB, {}),
    )
)

ENCODERS = ARCHITECTURES + UNETS
