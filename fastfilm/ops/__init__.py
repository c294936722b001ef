"""The operators: schemas, shape functions, gradients, backend choice, and the float64-capable reference."""

from . import consumers, conv, flops, pointwise, residual
from .backends import backend
from .functional import conv_norm_film, materialise, moments, norm_film
from .maps import DeferredMap

flops.watch()

__all__ = [
    "DeferredMap",
    "backend",
    "consumers",
    "conv",
    "conv_norm_film",
    "materialise",
    "moments",
    "norm_film",
    "pointwise",
    "residual",
]
