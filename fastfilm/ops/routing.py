"""Fused or composed? A per-shape choice from a shipped table, and an analytic estimate for the rest.

The table ``tuned.json`` beside this file maps a bucketed shape key to a route. It is filled by
measurement on a GPU; a key that is not in it is decided by the estimate below.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from .cost import FUSED_SHARE, H200, VENDOR_SHARE


def key(
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    output: Sequence[int],
) -> str:
    """Bucketed key of a convolution: channels and voxels are rounded up to powers of two."""
    voxels = batch * math.prod(output)
    bucket = [1 << max(v - 1, 0).bit_length() for v in (*channels, voxels)]
    name = str(dtype).removeprefix("torch.")
    return (
        f"{name}-{len(kernel)}d-k{kernel[0]}s{stride[0]}-ci{bucket[0]}-co{bucket[1]}-v{bucket[2]}"
    )


@functools.cache
def table() -> dict[str, str]:
    """The shipped table of measured choices, key -> route."""
    path = Path(__file__).with_name("tuned.json")
    entries = json.loads(path.read_text())["routes"]
    return {str(k): str(v) for k, v in entries.items()}


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
    measured = table().get(key(dtype, batch, channels, kernel, stride, output))
    if measured is not None:
        return measured == "fused"
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
