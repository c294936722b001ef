"""Fused or composed, by which backend, with which tiles? What was measured, from the tables (``tables.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import tables


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
