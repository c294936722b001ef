"""Classifiers and their pyramids of maps: timm and torchvision."""

from __future__ import annotations

from typing import Any

from .small import RGB, Network, of

WIDE = (2, 3, 64, 64)
CLIP = (2, 3, 8, 32, 32)


def _timm(said: str, name: str, shape: tuple[int, ...] = RGB, **options: Any) -> Network:
    make = of("timm", "create_model", name, pretrained=False, **({"num_classes": 4} | options))
    return Network("timm", said, make, shape)


def _pyramid(said: str, name: str, shape: tuple[int, ...] = RGB, **options: Any) -> Network:
    return _timm(f"{said} pyramid", name, shape, features_only=True, **options)


TIMM: tuple[Network, ...] = (
    _timm("ResNet-18", "resnet18"),
    _pyramid("ResNet-50", "resnet50"),
    _timm("ResNeSt-14", "resnest14d"),
    _timm("Res2Net-50", "res2net50_26w_4s"),
    _timm("MobileNetV3 large", "mobilenetv3_large_100"),
    _pyramid("EfficientNet-B0", "efficientnet_b0"),
    _timm("EfficientNet-B0 same padding", "tf_efficientnet_b0"),
    _timm("ConvNeXt", "convnext_atto"),
    _timm("RegNetY", "regnety_002"),
    _pyramid("HRNet-W18", "hrnet_w18_small"),
    _timm("GhostNet", "ghostnet_100"),
    _timm("ReXNet", "rexnet_100"),
    _timm("DLA-34", "dla34"),
    _timm("VoVNet-19", "ese_vovnet19b_dw"),
    _timm("NFNet-L0", "nfnet_l0"),
    _timm("ResNetV2-50", "resnetv2_50"),
    _timm("ResNetV2-50 big transfer", "resnetv2_50x1_bit"),
    _timm("CSPDarkNet-53", "cspdarknet53"),
    _timm("RepVGG-A0", "repvgg_a0"),
)


def _torchvision(
    said: str, module: str, name: str, shape: tuple[int, ...], **options: Any
) -> Network:
    make = of(f"torchvision.models{module}", name, weights=None, **options)
    return Network("torchvision", said, make, shape)


BARE: dict[str, Any] = {"weights_backbone": None}

TORCHVISION: tuple[Network, ...] = (
    _torchvision("DeepLabV3 ResNet-50", ".segmentation", "deeplabv3_resnet50", RGB, **BARE),
    _torchvision("LR-ASPP MobileNetV3", ".segmentation", "lraspp_mobilenet_v3_large", WIDE, **BARE),
    _torchvision("mc3_18", ".video", "mc3_18", CLIP),
    _torchvision("r2plus1d_18", ".video", "r2plus1d_18", CLIP),
)

BACKBONES = TIMM + TORCHVISION
