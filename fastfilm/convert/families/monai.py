"""MONAI's networks."""

from __future__ import annotations

from typing import Any

from fastfilm.convert.layers import Activation

from .family import Family, Layout

_NESTED = r"model(\.1\.submodule)*"
"""UNet and AttentionUnet: each level is the second of three layers of the level above."""


def _swish(module: Any) -> Activation | None:
    return Activation("silu") if getattr(module, "alpha", 1.0) == 1.0 else None


FAMILY = Family(
    name="MONAI",
    modules=("monai",),
    activations={"Swish": _swish, "MemoryEfficientSwish": _swish},
    functions=(("monai.networks.nets.efficientnet", "drop_connect"),),
    layouts={
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
)
