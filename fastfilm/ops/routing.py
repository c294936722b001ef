"""Fused or composed, by which backend, with which tiles? Measured choices, and an estimate for the rest.

What was measured stands in tables (``tables.py``); a shape whose bucket is in none is decided by the estimate
below, its tiles by the kernels' own ``pick``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import tables
from .cost import FUSED_SHARE, H200, VENDOR_SHARE


def measured(
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    output: Sequence[int],
) -> tables.Entry | None:
    """What was the fastest on this machine's kind of GPU; None where nothing was measured."""
    if not output:
        return None
    return tables.find(tables.key(dtype, batch, channels, kernel, stride, output))


def prefers_fused(
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    output: Sequence[int],
) -> bool:
    """Whether the fused route is expected to be faster on a GPU."""
    if not output:
        return False
    size = torch.finfo(dtype).bits // 8
    voxels = batch * math.prod(output)
    read = voxels * math.prod(stride) * channels[0] * size
    written = voxels * channels[1] * size
    flops = 2 * voxels * channels[0] * channels[1] * math.prod(kernel)
    bandwidth, rate = H200.bandwidth, H200.matrix["bfloat16"]
    moved = (read + written) / bandwidth
    fused = max(flops / (FUSED_SHARE * rate), moved)
    # the affine of the input costs a read and a write, the moments of the output a read
    composed = max(flops / (VENDOR_SHARE * rate), moved) + (2 * read + written) / bandwidth
    return fused < composed
