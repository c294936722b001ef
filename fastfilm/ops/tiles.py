"""The tile that a Triton convolution was measured to be fastest with, as an argument of its launcher."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import routing, spec


def measured(
    family: str, x: Tensor, weight: Tensor, stride: Sequence[int], output: Sequence[int]
) -> dict[str, Any]:
    """``config`` for the launcher of ``family``; nothing where it chooses for itself."""
    if not x.is_cuda:
        return {}
    co, ci, *kernel = weight.shape
    entry = routing.measured(x.dtype, x.shape[0], (ci, co), kernel, stride, output)
    fields = None if entry is None else entry.tiles.get(family)
    return {} if fields is None else {"config": config(family, fields)}


@functools.cache
def config(family: str, fields: tuple[int, ...]) -> Any:
    """A tile of the kernels of ``family`` ("fprop", "dgrad", "wgrad") from its numbers."""
    kind = importlib.import_module(f"fastfilm.kernels.conv_{family}").Config
    return kind(*fields)


def _of_fprop(x: Tensor, weight: Tensor, *rest: Any) -> dict[str, Any]:
    # both forward launchers have stride and padding in the same places
    stride, padding = rest[5:7]
    size = spec.conv_output_size(x.shape[2:], weight.shape[2:], stride, padding)
    return measured("fprop", x, weight, stride, size)


def _of_dgrad(e: Tensor, weight: Tensor, x: Tensor, *rest: Any) -> dict[str, Any]:
    return measured("dgrad", x, weight, rest[2], e.shape[2:])


def _of_wgrad(e: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> dict[str, Any]:
    return measured("wgrad", x, weight, rest[2], e.shape[2:])


TILED: dict[str, Callable[..., dict[str, Any]]] = {
    "fprop": _of_fprop,
    "fprop_apply": _of_fprop,
    "dgrad": _of_dgrad,
    "wgrad": _of_wgrad,
}
"""Launchers that take a tile: what to add to their arguments."""
