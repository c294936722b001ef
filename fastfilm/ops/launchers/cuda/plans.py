"""The CUDA kernels of one convolution: their layout in shared memory, and whether one fits on this GPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...settings import left_out
from ...spec import DTYPE_CODES, precision
from . import _CUDA

Sizes = tuple[int, ...]


class Shape(NamedTuple):
    """The facts that the layout of a convolution depends on, beside the GPU.

    Attributes:
        channels: of the input and of the output.
        size, out: spatial sizes of what the convolution sees and of its result.
    """

    dtype: torch.dtype
    batch: int
    channels: tuple[int, int]
    size: Sizes
    out: Sizes
    kernel: Sizes
    stride: Sizes
    padding: Sizes


def three(values: Sequence[int], depth: int) -> tuple[int, int, int]:
    """Two or three numbers as three, ``depth`` in front."""
    return (depth, values[0], values[1]) if len(values) == 2 else (*values,)  # type: ignore[return-value]


KERNELS = ("fprop", "dgrad", "wgrad")

_wgmma = "where faster"


@contextlib.contextmanager
def wgmma(choice: str) -> Iterator[None]:
    """Which kernels of sm_90 measurements and tests get: of warpgroups "where faster", "always" or "never".

    It holds for all threads. Elsewhere, and for float32, there is one kind only. Kernels that FASTFILM_WITHOUT
    leaves out stay out.
    """
    global _wgmma
    before, _wgmma = _wgmma, choice
    try:
        yield
    finally:
        _wgmma = before


def _choice(dtype: torch.dtype, kernels: Sequence[str]) -> str:
    """Which kernels of sm_90 a call gets that runs ``kernels``."""
    out = any(left_out.why_not("cuda", f"{left_out.SM90}{k}", dtype) for k in kernels)
    return "never" if out else _wgmma


def why_not(
    dtype: torch.dtype, channels: tuple[int, int], kernel: Sizes, stride: Sizes
) -> str | None:
    """Why no layout of the convolution fits into the current GPU; None if one does."""
    out = (16,) * len(kernel)
    size = tuple(n * s for n, s in zip(out, stride, strict=True))
    padding = tuple(k // 2 for k in kernel)
    try:
        shape = Shape(dtype, 1, channels, size, out, kernel, stride, padding)
        for choice in {_choice(dtype, [kernel]) for kernel in KERNELS}:
            _plan(shape, _device(None), False, choice).check()
    except RuntimeError as error:
        return str(error)
    return None


def plan(shape: Shape, on: Tensor, kernels: Sequence[str] = KERNELS) -> _CUDA.Convolution:
    """The kernels of one shape, with the layout that suits the GPU of ``on`` (the current one).

    Args:
        kernels: those that the call runs; if one is left out by warpgroups, none of them is by warpgroups.
    """
    tf32 = shape.dtype == torch.float32 and on.is_cuda and precision.tf32()
    choice = _choice(shape.dtype, kernels) if left_out.entries else _wgmma
    return _plan(shape, _device(on.device.index), tf32, choice)


@functools.lru_cache(maxsize=4096)
def _device(index: int | None) -> tuple[int, int, int]:
    return _CUDA.device()


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: Shape, device: tuple[int, int, int], tf32: bool = False, wgmma: str = "where faster"
) -> _CUDA.Convolution:
    if len(set(shape.stride)) != 1:
        raise ValueError(f"stride must be the same in every dimension, got {shape.stride}")
    return _CUDA.Convolution(
        dtype=DTYPE_CODES[shape.dtype],
        dims=len(shape.size),
        n=shape.batch,
        ci=shape.channels[0],
        co=shape.channels[1],
        in_size=three(shape.size, 1),
        out_size=three(shape.out, 1),
        kernel=three(shape.kernel, 1),
        padding=three(shape.padding, 0),
        stride=shape.stride[0],
        device=device,
        tf32=tf32,
        wgmma=wgmma,
    )
