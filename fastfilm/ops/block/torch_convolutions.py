"""``torch.nn.functional.conv2d`` and its kin on deferred maps: they read raw maps and pending affines like blocks.

``torch.nn.Conv2d``, ``ConvTranspose3d`` and the like then keep the raw map for the backward pass and not the
written one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps.deferred import DeferredMap, Joined, defer, deferrable
from .functional import conv_norm_film


def _convolved(
    x: Any, weight: Any, bias: Any, dims: int, padding: Any, **options: Any
) -> Tensor | None:
    """The convolution of an unwritten map; None where that is PyTorch's business."""
    lazy = isinstance(x, (DeferredMap, Joined)) and x._tensor is None
    if not lazy or len(x.shape) != dims + 2 or isinstance(padding, str):
        return None
    given = [t for t in (weight, bias) if t is not None]
    if not all(isinstance(t, Tensor) for t in given) or not deferrable(x.sources()[0].raw, x.plan):
        return None
    cast = torch.is_autocast_enabled(x.device.type)
    if not cast and any(t.dtype != x.dtype for t in given):
        return None
    found = conv_norm_film(x, weight, bias, padding=_numbers(padding), **options)
    return found if isinstance(found, Tensor) else found.tensor()


def _numbers(value: Any) -> int | Sequence[int]:
    return value if isinstance(value, int) else tuple(value)


def _convolution(dims: int) -> Callable[..., Tensor | None]:
    def conv(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor | None:
        rest = {"stride": _numbers(stride), "dilation": _numbers(dilation), "groups": groups}
        return _convolved(input, weight, bias, dims, padding, **rest)

    return conv


def _transposed(dims: int) -> Callable[..., Tensor | None]:
    def conv(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor | None:
        rest = {"stride": _numbers(stride), "dilation": _numbers(dilation), "groups": groups}
        rest |= {"output_padding": _numbers(output_padding), "transposed": True}
        return _convolved(input, weight, bias, dims, padding, **rest)

    return conv


defer(_convolution(2), F.conv2d, torch.conv2d)
defer(_convolution(3), F.conv3d, torch.conv3d)
defer(_transposed(2), F.conv_transpose2d, torch.conv_transpose2d)
defer(_transposed(3), F.conv_transpose3d, torch.conv_transpose3d)
