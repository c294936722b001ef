"""Fused convolution + normalisation + activation + FiLM for segmentation networks conditioned on metadata."""

from .convert import (
    condition,
    conversion_report,
    convert,
    generator_parameters,
    metadata,
    parameter_groups,
    restore,
)
from .nn import (
    ConvNormFiLM2d,
    ConvNormFiLM3d,
    FiLM,
    FiLMedUNet,
    FiLMGenerator,
    Modified3DUNet,
)
from .ops import DeferredMap, backend, conv_norm_film, materialise, moments, norm_film

__version__ = "0.1.0"
__all__ = [
    "ConvNormFiLM2d",
    "ConvNormFiLM3d",
    "DeferredMap",
    "FiLM",
    "FiLMGenerator",
    "FiLMedUNet",
    "Modified3DUNet",
    "__version__",
    "backend",
    "condition",
    "conv_norm_film",
    "conversion_report",
    "convert",
    "generator_parameters",
    "materialise",
    "metadata",
    "moments",
    "norm_film",
    "parameter_groups",
    "restore",
]
