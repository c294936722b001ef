"""Decoder layers of known networks: by class name, regular expressions of the paths behind the bottleneck."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Sides of a network.

    Attributes:
        decoder: regular expression at the start of the paths of decoder layers, heads included.
        encoder: the same for the rest; None: whatever ``decoder`` does not match.
    """

    decoder: str
    encoder: str | None = None

    def is_decoder(self, path: str) -> bool | None:
        """Whether the layer at ``path`` (dotted) is the decoder's; None: unknown."""
        if re.match(self.decoder, path):
            return True
        if self.encoder is None or re.match(self.encoder, path):
            return False
        return None


_NESTED = r"model(\.1\.submodule)*"
"""MONAI's UNet and AttentionUnet: each level is the second of three layers of the level above."""

# nnU-Net's decoder has the encoder as a child, too
_NNUNET = Layout(r"decoder\.(?!encoder\.)")
_HEADS = Layout(r"(aux_)?classifier\.", r"backbone\.")
_IVADOMED = Layout(r"decoder\.", r"encoder\.")
_MODIFIED = Layout(
    r"(conv3d|conv_norm_lrelu|norm_lrelu_upscale_conv_norm_lrelu)_l\d|upscale_conv_norm_lrelu_|ds\d_|norm_lrelu_0",
    r"conv3d_c\d|(norm_)?lrelu_conv_c\d|gating|attentionblock",
)

LAYOUTS: dict[str, dict[str, Layout]] = {
    "monai": {
        "UNet": Layout(rf"{_NESTED}\.2\."),
        "AttentionUnet": Layout(
            rf"{_NESTED}\.((1\.)?(attention|upconv|merge)|2)\.", rf"{_NESTED}\."
        ),
        "BasicUNet": Layout(r"upcat_|final_conv"),
        "BasicUNetPlusPlus": Layout(r"upcat_|final_conv"),
        "DynUNet": Layout(r"upsamples\.|output_block\.|deep_supervision_heads\."),
        "SegResNet": Layout(r"up_(layers|samples)\.|conv_final\."),
        "SegResNetVAE": Layout(r"up_(layers|samples)\.|conv_final\.|vae_"),
        "SegResNetDS": Layout(r"up_layers", r"encoder\."),
        "FlexibleUNet": Layout(r"decoder\.|segmentation_head\."),
        "SwinUNETR": Layout(r"decoder\d|out\."),
        "UNETR": Layout(r"decoder\d|out\."),
        "VNet": Layout(r"up_tr|out_tr"),
        "MedNeXt": Layout(r"up_blocks\.|dec_stages\.|out_"),
        "DiffusionModelUNet": Layout(r"up_blocks\.|out\."),
    },
    "dynamic_network_architectures": dict.fromkeys(
        ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet", "UNetDecoder"), _NNUNET
    ),
    "segmentation_models_pytorch": {
        "SegmentationModel": Layout(r"decoder\.|segmentation_head\.", r"encoder\.")
    },
    "torchvision": dict.fromkeys(("FCN", "DeepLabV3", "LRASPP"), _HEADS),
    "pytorch3dunet": {"AbstractUNet": Layout(r"decoders\.|final_conv", r"encoders\.")},
    "ivadomed": {"Unet": _IVADOMED, "FiLMedUnet": _IVADOMED, "Modified3DUNet": _MODIFIED},
}
"""By the package that a class comes from and the name of the class."""

PARTS: tuple[tuple[tuple[str, ...], Layout], ...] = (
    # inc, down1…4, up1…4, outc
    (("inc", "down1", "up1", "outc"), Layout(r"up\d|outc\b", r"inc\b|down\d")),
    # encoder1…4, bottleneck, upconv4…1 and decoder4…1, conv
    (
        ("encoder1", "bottleneck", "decoder1"),
        Layout(r"(upconv|decoder)\d|(out|final)?_?conv\b", r"encoder\d|bottleneck\b"),
    ),
)
"""Networks of the form that people write themselves: names of children that they have."""


def layout_of(model: nn.Module) -> Layout | None:
    """The layout of a model, by which its decoder's paths are known; None where no table has it."""
    for kind in type(model).__mro__:
        found = LAYOUTS.get(kind.__module__.partition(".")[0], {}).get(kind.__name__)
        if found is not None:
            return found
    children, name = set(model._modules), type(model).__name__
    # ivadomed's networks are copied into many repositories
    if name in ("Unet", "FiLMedUnet") and {"encoder", "decoder"} <= children:
        return _IVADOMED
    if name == "Modified3DUNet" and {"conv3d_c1_1", "conv3d_l4"} <= children:
        return _MODIFIED
    return next((layout for names, layout in PARTS if children.issuperset(names)), None)
