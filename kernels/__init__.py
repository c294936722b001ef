"""Triton kernels: one file a family, with kernel, launcher and its tiles together."""

from .dgrad import dgrad
from .fprop import fprop, fprop_apply
from .moments import moments, moments_backward
from .pointwise import apply, apply_backward
from .wgrad import wgrad

__all__ = [
    "apply",
    "apply_backward",
    "dgrad",
    "fprop",
    "fprop_apply",
    "moments",
    "moments_backward",
    "wgrad",
]
