"""The tile that a Triton convolution was measured to be fastest with, as an argument of its launcher."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..settings import tables


def measured(
    family: str, x: Tensor, weight: Tensor, stride: Sequence[int], output: Sequence[int]
) -> dict[str, Any]:
    """``config`` for the launcher of ``family``; nothing where it chooses for itself."""
    if not x.is_cuda:
        return {}
    co, ci, *kernel = weight.shape
    entry = tables.measured(x.dtype, x.shape[0], (ci, co), kernel, stride, output)
    fields = None if entry is None else entry.tiles.get(family)
    return {} if fields is None else {"config": config(family, fields)}


@functools.cache
def config(family: str, fields: tuple[int, ...]) -> Any:
    """A tile of the kernels of ``family`` ("fprop", "dgrad", "wgrad") from its numbers."""
    kind = importlib.import_module(f"fastfilm.kernels.conv_{family}").Config
    return kind(*fields)
