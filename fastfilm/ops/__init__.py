"""The operators: schemas, shape functions, gradients, backend choice, and the float64-capable reference."""

from . import conv, pointwise
from .backends import backend
from .block import Pending
from .functional import conv_norm_film, materialise, moments, norm_film

__all__ = [
    "Pending",
    "backend",
    "conv",
    "conv_norm_film",
    "materialise",
    "moments",
    "norm_film",
    "pointwise",
]
