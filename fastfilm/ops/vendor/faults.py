"""Known faults of PyTorch's convolutions on CPUs, and the precautions against them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Geometry, has_idle_taps


def unsafe_channels_last(x: Tensor) -> bool:
    """Whether the vendor's convolution must not see ``x``, or weights beside it, channels-last.

    oneDNN (PyTorch 2.13, CPU) crashes or returns garbage for some padded convolutions of channels-last maps
    with a dimension of size 1: in bfloat16, and in 3D also in float32 with groups.
    """
    return (
        (x.dim() == 5 or x.dtype == torch.bfloat16) and 1 in x.shape[2:] and x.device.type == "cpu"
    )


@functools.lru_cache(maxsize=4096)
def _faults(
    size: tuple[int, ...], kernel: tuple[int, ...], geometry: Geometry
) -> tuple[bool, bool, bool]:
    """Whether a kernel stands in padding, the last axis of a strided result has one position, and the kernel
    is longer than the map on a padded axis."""
    stride, padding, dilation, transposed, *_ = geometry
    out = tuple(geometry.output_size(size, kernel))
    if transposed:
        size, out = out, size  # the sizes of the convolution that this one is the gradient of
    thin = any(n == 1 and p > 0 for n, p in zip(size, padding, strict=True))
    stands = thin or (any(padding) and has_idle_taps(size, kernel, stride, padding, dilation))
    each = zip(size, kernel, padding, dilation, strict=True)
    longer = any(p > 0 and n < (k - 1) * d + 1 for n, k, p, d in each)
    return stands, max(stride) > 1 and out[-1] == 1, longer


def precautions(
    x: Tensor, weight: Tensor, geometry: Geometry, weight_gradient: bool
) -> tuple[bool, bool]:
    """Whether a convolution and its gradients are computed in float32, and whether its map is padded before.

    On a CPU, in any layout, oneDNN (PyTorch 2.13) crashes now and then at padded maps one voxel thick and where
    taps of the kernel meet nothing but padding. With AMX its bfloat16 kernels use memory there that is unwritten,
    and also at a stride where the last axis of the result has one position. With AVX-512 the weight gradient
    goes wrong where the kernel (with its dilation) is deeper than a 3D map that is padded in depth, as 3×3×3 is
    on two planes: the loop over the depth takes a kernel to reach over one end of the map at a time. In bfloat16
    it reads other planes, some of them never written; in float32 it writes behind its buffers at a stride.
    No form was found for which height and width do the same; such maps are too small to trust that for time.
    A graph for all sizes, which are not known then, computes 16-bit types in float32.

    Args:
        weight_gradient: whether this call computes the gradient at the weight, or may be asked for it later.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False, False
    half = x.dtype.itemsize == 2
    if any(isinstance(n, torch.SymInt) for n in (*x.shape, *weight.shape)):
        return half, False
    stands, narrow, longer = _faults(tuple(x.shape[2:]), tuple(weight.shape[2:]), geometry)
    before = stands or (longer and weight_gradient)
    return half and (before or narrow), before


def padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    """``x`` [N, C, *S] with as many zeros in front and behind; gradients of cropping."""
    return F.pad(x, [p for p in reversed(padding) for _ in range(2)])


def cropped(x: Tensor, padding: Sequence[int]) -> Tensor:
    """``x`` [N, C, *S] without so many voxels in front and behind; gradients of padding."""
    for d, p in enumerate(padding):
        x = x.narrow(d + 2, p, x.shape[d + 2] - 2 * p)
    return x


def guarded(
    convolve: Callable[[Tensor, Tensor, Tensor | None, Geometry], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    weight_gradient: bool,
) -> Tensor | None:
    """``convolve`` of these arguments with the ``precautions`` that they need; None where they need none."""
    wide, before = precautions(x, weight, geometry, weight_gradient)
    if wide:
        added = None if bias is None else bias.float()
        return convolve(x.float(), weight.float(), added, geometry).to(x.dtype)
    if before:
        padding, transposed = geometry.padding, geometry.transposed
        v = x if transposed else padded(x, padding)
        y = convolve(v, weight, bias, geometry._replace(padding=(0,) * len(padding)))
        return cropped(y, padding) if transposed else y
    return None


def safe_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """PyTorch's convolution [N, Ci, *S] -> [N, Co, *T] with all precautions; weight as in ``torch.nn.Conv*``."""
    y = guarded(safe_convolution, x, weight, bias, geometry, weight_gradient=True)
    if y is not None:
        return y
    if unsafe_channels_last(x):
        x, weight = x.contiguous(), weight.contiguous()
    return torch.convolution(x, weight, bias, *geometry)
