"""The CUDA kernels as a backend, gathered from the files beside.

What has no CUDA kernel (views, residual sums, the algebra of a block) is Triton's work, or PyTorch's where there
is no Triton.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from .. import eager, of
from .coefficients import covers_behind
from .convolution import (
    convolution,
    covers_sources,
    dgrad,
    fprop,
    gradients,
    wgrad,
)
from .passes import (
    apply,
    apply_backward,
    coefficients_backward,
    moments,
    moments_backward,
)

reads_sources = True
convolves = False


_TRITON = importlib.util.find_spec("triton") is not None
_BORROWED = (
    "block_coefficients",
    "block_coefficients_backward",
    "covers_block",
    "gather",
    "gather_backward",
    "residual",
    "residual_backward",
    "workspace",
)


def __getattr__(name: str) -> Any:
    if name not in _BORROWED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(of("triton") if _TRITON else eager, name)
