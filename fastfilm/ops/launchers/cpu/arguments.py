"""Arguments of the C++ kernels: checked, dense tensors as addresses and codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import ACTIVATION_CODES, DTYPE_CODES, FORMATS, dense
from ..arguments import activation_code

DTYPES = DTYPE_CODES


def feature_map(name: str, t: Tensor) -> Tensor:
    """``t`` [N, C, *S] dense in channels-last order."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
    if t.dim() not in FORMATS:
        raise ValueError(f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {tuple(t.shape)}")
    if not t.is_cpu:
        raise ValueError(f"{name} must be on the CPU, got {t.device}")
    if t.is_neg() or t._is_zerotensor():
        t = dense.values(t)
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
        t = dense.values(t)
    return (t if t.dtype == dtype else t.to(dtype)).contiguous()


def call_of(y: Tensor, act: str) -> tuple[Any, ...]:
    """Trailing arguments of a pass: dtype, activation, N, S, C, threads."""
    code = ACTIVATION_CODES[act] if act in ACTIVATION_CODES else activation_code(act)
    n, c = y.shape[:2]
    return DTYPES[y.dtype], code, n, y.numel() // max(n * c, 1), c, torch.get_num_threads()
