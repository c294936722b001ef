"""What the launchers of the C++ kernels hand over: checked, dense tensors as addresses and codes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import layout
from .spec import ACTIVATION_CODES

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def feature_map(name: str, t: Tensor) -> Tensor:
    """``t`` [N, C, *S] dense in channels-last order."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
    if t.dim() not in FORMATS:
        raise ValueError(f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {tuple(t.shape)}")
    if not t.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {t.device}")
    if t.is_neg() or t._is_zerotensor():
        t = layout.values(t)
    return t.contiguous(memory_format=FORMATS[t.dim()])


def map_like(name: str, t: Tensor, y: Tensor) -> Tensor:
    """``t`` channels-last in the dtype of ``y``; ValueError unless it has the shape of ``y``."""
    if t.shape != y.shape:
        raise ValueError(f"{name} must have the shape of y {tuple(y.shape)}, got {tuple(t.shape)}")
    return feature_map(name, t if t.dtype == y.dtype else t.to(y.dtype))


def numbers_of(name: str, t: Tensor, y: Tensor, *shape: int) -> Tensor:
    """``t`` contiguous, float32 (float64 if ``y`` is); ValueError unless it has ``shape``."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if not t.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {t.device}")
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    if t.is_neg() or t._is_zerotensor():
        t = layout.values(t)
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def activation_code(act: str) -> int:
    """The kernels' number of an activation; ValueError for an unknown one."""
    code = ACTIVATION_CODES.get(act)
    if code is None:
        raise ValueError(f"act must be one of {', '.join(ACTIVATION_CODES)}, got {act!r}")
    return code


def call_of(y: Tensor, act: str) -> tuple[int, int, int, int, int, int]:
    """Trailing arguments of a pass: dtype, activation, N, S, C, threads."""
    code = activation_code(act)
    n, c = y.shape[:2]
    return DTYPES[y.dtype], code, n, y.numel() // max(n * c, 1), c, torch.get_num_threads()


def address_of(t: Tensor | None) -> int:
    """Where its first element lies; 0 for None."""
    return 0 if t is None else t.data_ptr()
