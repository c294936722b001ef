"""The tile that a Triton convolution was measured to be fastest with, as an argument of its launcher."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..settings import tables
from ..spec import Geometry, Gradient, Source


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


def _of_fprop(
    sources: Sequence[Source], weight: Tensor, bias: Any, geometry: Geometry, *rest: Any, **_: Any
) -> dict[str, Any]:
    x = sources[0].raw
    size = geometry.output_size(x.shape[2:], weight.shape[2:])
    return measured("fprop", x, weight, geometry.stride, size)


def _of_dgrad(
    gradient: Gradient, weight: Tensor, outputs: Any, size: Any, geometry: Geometry
) -> dict[str, Any]:
    dy = gradient.dy
    return measured("dgrad", dy, weight, geometry.stride, dy.shape[2:])


def _of_wgrad(
    gradient: Gradient, sources: Any, weight: Tensor, geometry: Geometry, *rest: Any
) -> dict[str, Any]:
    dy = gradient.dy
    return measured("wgrad", dy, weight, geometry.stride, dy.shape[2:])


TILED: dict[str, Callable[..., dict[str, Any]]] = {
    "fprop": _of_fprop,
    "dgrad": _of_dgrad,
    "wgrad": _of_wgrad,
}
"""Launchers that take a tile: what to add to their arguments."""
