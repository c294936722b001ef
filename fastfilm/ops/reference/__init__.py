"""The reference: each operator in eager, differentiable PyTorch, with derivatives of any order."""

from ..vendor import safe_convolution as convolution
from .block import activation, block_tail, materialise, moments, normalise, residual, spread
from .coefficients import of_block
