"""Shapes, types and memory layouts of feature maps, and empty tensors that have them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Channels-last memory format by a feature map's dimensions."""


def channels_last_format(ndim: int) -> torch.memory_format:
    """Channels-last memory format of a feature map with ``ndim`` dimensions (4 or 5)."""
    return FORMATS[ndim]


def channels_last(t: Tensor) -> Tensor:
    """``t`` [N, C, *S] dense in channels-last order; copies only if it is not already."""
    return t.contiguous(memory_format=FORMATS[t.dim()])


def accumulate_dtype(t: Tensor) -> torch.dtype:
    """dtype of statistics and coefficients beside a map: float32, or float64 for a float64 map."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def stats_like(y: Tensor) -> Tensor:
    """Uninitialised [2, N, C] for the moments of ``y``."""
    shape = (2, y.shape[0], y.shape[1])
    return torch.empty(shape, dtype=accumulate_dtype(y), device=y.device)


def raw_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised channels-last feature map of ``shape``, of the type and on the device of ``x``."""
    order = channels_last_format(len(shape))
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=order)


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in place of a result that is not wanted; tensor classes may redefine ``new_empty``."""
    return (
        like.new_empty(0)
        if type(like) is Tensor and dtype is None
        else Tensor.new_empty(like, 0, dtype=dtype)
    )


def laid_out_like(grad: Tensor, weight: Tensor) -> Tensor:
    """A weight's gradient with the strides of ``torch.empty_like(weight)``, as the shape function promises."""
    if grad.stride() == weight.stride():
        return grad
    like = torch.empty_like(weight)
    return grad if grad.stride() == like.stride() else like.copy_(grad)


def layout_of(x: Tensor, v: Tensor) -> Tensor:
    """``v`` channels-last if ``x`` is: some of PyTorch's norms fall back to contiguous."""
    if transformed():
        return v
    if x.is_contiguous() or not x.is_contiguous(memory_format=channels_last_format(x.dim())):
        return v
    return channels_last(v)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs: tensors may be batches that have no layout to ask for."""
    running = not torch.compiler.is_compiling()
    return running and torch._C._functorch.peek_interpreter_stack() is not None


def conv_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] | None = None,
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
) -> list[int]:
    """Spatial size of a convolution's output, as ``torch.nn.functional.conv*`` gives it."""
    dims = len(size)
    dilation = dilation or (1,) * dims
    output_padding = output_padding or (0,) * dims
    if transposed:
        return [
            (i - 1) * s - 2 * p + d * (k - 1) + o + 1
            for i, k, s, p, d, o in zip(
                size, kernel, stride, padding, dilation, output_padding, strict=True
            )
        ]
    return [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def has_idle_taps(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> bool:
    """Whether some tap of a convolution's kernel meets padding alone, wherever the kernel stands."""
    out = conv_output_size(size, kernel, stride, padding, dilation)
    each = zip(size, kernel, stride, padding, dilation, out, strict=True)
    for s, k, t, p, d, count in each:
        for tap in range(k):
            # the first position whose tap is not in front of the map
            first = max(0, -((tap * d - p) // t))
            if first >= count or first * t - p + tap * d >= s:
                return True
    return False
