"""Convolutions and their gradients on a CPU, by the C++ kernels or, where they are faster, by PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import vendor
from ...spec import Geometry, Keep, Pending, channels_last, dense
from ..arguments import activation_code, address
from . import _C
from .arguments import DTYPES, FORMATS, feature_map, numbers_of
from .passes import apply
from .rules import by_winograd, covers_convolution, covers_gradients, output_sizes

_ONES = {3: (1,), 4: (1, 1), 5: (1, 1, 1)}
"""Strides of one, by the map's dimensions."""


def convolution(
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    keep: Keep | None = None,
    finish: Pending | None = None,
) -> Tensor:
    """The composed route's convolution [N, Co, *T], channels-last, by whichever kernels are faster.

    Args:
        keep: where the form of the weight is kept that the kernels want.
        finish: what is pending on the result; it is applied.
    """
    if covers_convolution(v, weight, geometry, finish is not None, keep is not None):
        coef, act = finish or Pending()
        return convolve(v, weight, bias, geometry.padding, coef, act, geometry.stride, keep)
    # ``finishing=True`` accepts every case that ``False`` does, so no second check is needed
    y = channels_last(vendor.convolution(v, weight, bias, geometry, keep))
    if finish is None or finish.coef is None:
        return y
    return apply(y, finish.coef, finish.act, in_place=True)


def convolution_gradients(
    e: Tensor, v: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients at map and weight, as far as ``needs`` asks for them, each by the kernels that are faster."""
    dgrad, wgrad = covers_gradients(v, weight, geometry)
    rest = needs[0] and not dgrad, needs[1] and not wgrad
    dv = dw = None
    if any(rest):
        dv, dw = vendor.convolution_backward(e, v, weight, geometry, rest)
    if needs[0] and dgrad:
        if geometry.transposed:
            dv = convolve(e, weight, None, geometry.padding, stride=geometry.stride)
        else:
            dv = convolve_dgrad(e, weight, geometry.padding)
    if needs[1] and wgrad:
        given, read = (v, e) if geometry.transposed else (e, v)
        dw = convolve_wgrad(given, read, weight, geometry.padding, geometry.stride)
    return dv, dw


def _kernels_of(
    x: Tensor,
    weight: Tensor,
    strides: tuple[int, ...],
    stride: Sequence[int] | None,
    padding: Sequence[int],
) -> tuple[_C.Convolution, Callable[..., None], tuple[int, ...]]:
    """``_convolution`` of a call; ``strides`` are those of the weight, or of its gradient."""
    steps = _ONES[x.dim()] if stride is None else tuple(stride)
    instructions = _C.instruction_set()
    return _convolution(
        x.dtype, x.shape, weight.shape, strides, steps, tuple(padding), instructions
    )


@functools.lru_cache(maxsize=4096)
def _convolution(
    dtype: torch.dtype,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    strides: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    instructions: str,
) -> tuple[_C.Convolution, Callable[..., None], tuple[int, ...]]:
    """The kernels for such tensors and weights of these strides, the forward one, and its result's shape."""
    (n, ci, *size), (co, wanted, *kernel) = x, weight
    if len(kernel) != len(size) or wanted != ci:
        raise ValueError(f"weight must be [Co, {ci}] and {len(size)} sizes, got {weight}")
    out = output_sizes(size, kernel, stride, padding)
    one, none = [1] * (3 - len(size)), [0] * (3 - len(size))
    sizes = [n, ci, co, *one, *size, *one, *kernel, *none, *padding, *one, *out, *one, *stride]
    strides = (*strides[:2], *none, *strides[2:])
    kernels = _C.Convolution(DTYPES[dtype], sizes, strides)
    winograd = max(stride) == 1 and by_winograd(dtype, n, out, weight, instructions)
    return kernels, kernels.run_winograd if winograd else kernels.run, (n, co, *out)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: Sequence[int],
    coef: Tensor | None = None,
    act: str = "none",
    stride: Sequence[int] | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """``torch.nn.functional.conv2d`` or ``conv3d``, summed in float32; [N, Co, *T], channels-last.

    Args:
        x: [N, Ci, *S], channels-last; not float64.
        weight: [Co, Ci, *K] and ``bias`` [Co]: in x's dtype.
        coef: [7, N, Co]: the result is that of ``apply`` with it and ``act``, each row finished in the cache.
        keep: where the weight that Winograd's form transforms is kept.
    """
    if weight.is_neg() or weight._is_zerotensor():
        weight = dense.values(weight)
    kernels, run, shape = _kernels_of(x, weight, weight.stride(), stride, padding)
    x = feature_map("x", x)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(f"weight and bias must be {x.dtype} as x, got {weight.dtype}")
    y = torch.empty(shape, dtype=x.dtype, memory_format=FORMATS[x.dim()])
    if bias is not None:
        bias = dense.contiguous(bias)
    if coef is not None:
        coef = numbers_of("coef", coef, y, 7, *shape[:2])
    rest: tuple[int, ...] = ()
    transformed = None
    if keep is not None and run == kernels.run_winograd:
        form = "winograd", _C.instruction_set()
        transformed = keep(weight, form, lambda w: _transformed(kernels, w))
        rest = (address(transformed),)
    run(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if coef is None else coef.data_ptr(),
        y.data_ptr(),
        0 if act == "none" else activation_code(act),
        torch.get_num_threads(),
        *rest,
    )
    return y


def _transformed(kernels: _C.Convolution, weight: Tensor) -> Tensor:
    to = torch.empty(kernels.transformed)
    kernels.transform(weight.data_ptr(), to.data_ptr(), torch.get_num_threads())
    return to


@functools.lru_cache(maxsize=4096)
def _mirrored(
    dtype: torch.dtype,
    e: tuple[int, ...],
    weight: tuple[int, ...],
    strides: tuple[int, ...],
    padding: tuple[int, ...],
    instructions: str,
) -> tuple[Callable[..., None], tuple[int, ...], int]:
    """The convolution that leads e back to the map, its result's shape, and where in bytes its kernel starts."""
    co, ci, *kernel = weight
    back = tuple(k - 1 - p for k, p in zip(kernel, padding, strict=True))
    turned = (strides[1], strides[0], *(-s for s in strides[2:]))
    _, run, shape = _convolution(
        dtype, e, (ci, co, *kernel), turned, _ONES[len(e)], back, instructions
    )
    last = sum((k - 1) * s for k, s in zip(kernel, strides[2:], strict=True))
    return run, shape, last * dtype.itemsize


def convolve_dgrad(e: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """Gradient of ``convolve`` at its map [N, Ci, *S], channels-last, from that at its result.

    Args:
        e: [N, Co, *T], channels-last; not float64.
        weight: [Co, Ci, *K] in e's dtype; ``padding`` smaller than K.
    """
    e = feature_map("e", e)
    if weight.dtype != e.dtype:
        raise TypeError(f"weight must be {e.dtype} as e, got {weight.dtype}")
    if weight.is_neg() or weight._is_zerotensor():
        weight = dense.values(weight)
    run, shape, last = _mirrored(
        e.dtype, e.shape, weight.shape, weight.stride(), tuple(padding), _C.instruction_set()
    )
    dx = torch.empty(shape, dtype=e.dtype, memory_format=FORMATS[e.dim()])
    threads = torch.get_num_threads()
    run(e.data_ptr(), weight.data_ptr() + last, 0, 0, dx.data_ptr(), 0, threads)
    return dx


def convolve_wgrad(
    e: Tensor,
    x: Tensor,
    weight: Tensor,
    padding: Sequence[int],
    stride: Sequence[int] | None = None,
) -> Tensor:
    """Gradient of ``convolve`` at its weight, like ``weight`` [Co, Ci, *K]; all float32, summed in double.

    Args:
        e: gradient at the result [N, Co, *T], channels-last.
        x: the map [N, Ci, *S], channels-last.
    """
    e, x = feature_map("e", e), feature_map("x", x)
    dweight = torch.empty_like(weight)
    kernels, _, shape = _kernels_of(x, weight, dweight.stride(), stride, padding)
    if e.shape != shape or e.dtype != x.dtype or weight.dtype != x.dtype:
        raise ValueError(f"e must be {x.dtype} {shape}, got {e.dtype} {tuple(e.shape)}")
    kernels.kernel_gradient(x.data_ptr(), e.data_ptr(), dweight.data_ptr(), torch.get_num_threads())
    return dweight
