"""The operators behind fastfilm's modules: the functions that users call, and a sentence on each folder below.

Each room imports from those before it: ``spec`` (names and structs), ``settings`` (what is set before a call),
``vendor`` (PyTorch's convolutions), ``reference`` (the definition of right), ``launchers`` (the kernels of each
backend), ``choice`` (which backend and route), ``operators`` (for compilers and tracers), ``maps`` (not yet
written), ``block`` (one block).
"""

from .block import functional, torch_convolutions
from .block.functional import conv_norm_film, materialise, moments, norm_film
from .choice import backend
from .maps import DeferredMap
from .maps.residual import add_act
from .operators import convolution, flops, pointwise, residual

flops.watch()

__all__ = [
    "DeferredMap",
    "add_act",
    "backend",
    "conv_norm_film",
    "materialise",
    "moments",
    "norm_film",
]
