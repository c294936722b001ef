"""Arguments of the CUDA kernels: checks of maps and numbers, codes, addresses, streams."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...spec import DTYPE_CODES, FORMATS, capture, dense

DTYPES = {t: code for t, code in DTYPE_CODES.items() if t != torch.float64}


def feature_map(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` [N, C, *S], checked: its type, its layout and, with ``like``, that map's shape and type."""
    if t.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {t.dtype}")
    if t.dim() not in FORMATS:
        raise ValueError(f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {tuple(t.shape)}")
    t = dense.values(t)
    if not t.is_contiguous(memory_format=FORMATS[t.dim()]):
        raise ValueError(
            f"{name} must be dense in channels-last order, got shape {tuple(t.shape)} with strides {t.stride()}"
        )
    if like is not None and (t.shape != like.shape or t.dtype != like.dtype):
        raise ValueError(
            f"{name} must be {tuple(like.shape)} of {like.dtype}, got {tuple(t.shape)} of {t.dtype}"
        )
    return t


def numbers(name: str, t: Tensor, *shape: int) -> Tensor:
    """``t`` float32 and contiguous; ValueError unless it has ``shape``."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    return dense.contiguous(t.float())


def stream_of(t: Tensor) -> int:
    """Handle of the current stream of the tensor's GPU."""
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


class Launch(torch.cuda.device):
    """Makes a GPU the current one; an error inside the capture of a CUDA graph says what to do."""

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        super().__exit__(kind, error, trace)
        if isinstance(error, RuntimeError) and capture.capturing():
            raise capture.refusal("a CUDA kernel is launched for the first time") from error
        return False


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one for a launch."""
    return Launch(t.device) if t.is_cuda else contextlib.nullcontext()


def empty_map(y: Tensor) -> Tensor:
    """Uninitialised, of y's shape and type, channels-last."""
    return torch.empty_like(y, memory_format=FORMATS[y.dim()])
