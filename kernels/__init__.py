"""Triton kernels: each file has one family of kernels with their launchers and tiles."""

from .coefficients import block_coefficients, block_coefficients_backward, covers_block
from .conv_dgrad import dgrad
from .conv_fprop import fprop
from .conv_wgrad import wgrad
from .pointwise import apply, apply_backward
from .residual_sum import residual, residual_backward
from .spatial_moments import moments, moments_backward
from .taps import gather_taps, gather_taps_backward

__all__ = [
    "apply",
    "apply_backward",
    "block_coefficients",
    "block_coefficients_backward",
    "covers_block",
    "dgrad",
    "fprop",
    "gather_taps",
    "gather_taps_backward",
    "moments",
    "moments_backward",
    "residual",
    "residual_backward",
    "wgrad",
]
