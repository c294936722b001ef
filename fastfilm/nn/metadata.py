"""Conversion of a user's metadata (lists, arrays, tensors) to one float tensor on the network's device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfilm.ops.spec import capture, direct

Metadata = Tensor | np.ndarray | Sequence[Any]


def as_metadata(
    metadata: Metadata | None,
    size: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Metadata rows [N or 1, M] for a batch of N, moved to ``device`` once.

    Args:
        metadata: [N, M], [1, M] or [M] (one row for all samples): nested lists, an array, or a tensor of any
            real dtype.
        size: M, the number of metadata values per sample.
        batch: N.

    Raises:
        TypeError: None, or something that is not numbers.
        ValueError: wrong shape, or NaN/infinity. Values that are already on a GPU are not looked at, since
            that would stall the GPU, and a compiled or exported model cannot look; NaN then
            shows in the output.
    """
    if metadata is None:
        raise TypeError(f"metadata is missing: the model was built with metadata_size={size}")
    if isinstance(metadata, Tensor):
        t = metadata
        if t.is_complex():
            raise TypeError(f"metadata must be real numbers, got {t.dtype}")
    else:
        try:
            array = np.asarray(metadata)
        except ValueError as error:
            raise ValueError(f"metadata rows must have one length, got {metadata!r}") from error
        if array.dtype.kind not in "biuf":
            raise TypeError(f"metadata must be numbers, got {array.dtype} values: {metadata!r}")
        t = torch.from_numpy(np.array(array, dtype=np.float64))
    if t.dim() == 1:
        t = t.unsqueeze(0)
    if t.dim() != 2 or t.shape[1] != size or t.shape[0] not in (batch, 1):
        raise ValueError(
            f"metadata must have shape ({batch}, {size}), (1, {size}) or ({size},), got {tuple(t.shape)}"
        )
    if (
        t.device.type == "cpu"
        and t.is_floating_point()
        and direct(t)  # a compiler or exporter has no values to look at
        and not t.isfinite().all()
    ):
        raise ValueError(f"metadata must be finite, got {t.tolist()}")
    return on_device(t.to(dtype), device)


def on_device(metadata: Tensor, device: torch.device) -> Tensor:
    """``metadata`` on a device; RuntimeError where the copy would invalidate the capture of a CUDA graph."""
    if metadata.device.type == "cpu" != device.type and capture.capturing():
        raise capture.refusal("metadata are copied to the GPU", "give them as a tensor on the GPU")
    return metadata.to(device)
