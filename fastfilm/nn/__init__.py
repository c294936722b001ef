"""Modules: FiLM and its generator, fused blocks, and the paper's networks built of them."""

from .blocks import ConvNormFiLM, ConvNormFiLM2d, ConvNormFiLM3d, DoubleConv, sync_batch_norm
from .film import FiLM
from .generator import FiLMGenerator
from .modified_unet3d import Modified3DUNet
from .unet import FiLMedUNet

__all__ = [
    "ConvNormFiLM",
    "ConvNormFiLM2d",
    "ConvNormFiLM3d",
    "DoubleConv",
    "FiLM",
    "FiLMGenerator",
    "FiLMedUNet",
    "Modified3DUNet",
    "sync_batch_norm",
]
