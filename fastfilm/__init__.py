"""Fused convolution + normalisation + activation + FiLM for segmentation networks conditioned on metadata."""

from .ops import Pending, backend, conv_norm_film, materialise, moments, norm_film

__version__ = "0.1.0"
__all__ = [
    "Pending",
    "__version__",
    "backend",
    "conv_norm_film",
    "materialise",
    "moments",
    "norm_film",
]
