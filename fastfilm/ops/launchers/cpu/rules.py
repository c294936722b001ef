"""Rules that choose between the C++ kernels' convolutions and PyTorch's, from measured times and rounding."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...spec import Geometry
from ...vendor.convolutions import SMALL, WIDE
from . import _C

_PRODUCTS, _AVX2_PRODUCTS, _NARROW_PRODUCTS, _NATIVE_PRODUCTS = 1 << 20, 1 << 23, 1 << 18, 1 << 16
"""Up to so many products PyTorch takes longer to set a convolution up than we take for it: float32; the same with
AVX2; 16 bits; a single 2D float32 sample, which it convolves without oneDNN."""


_WEIGHTS, _PACKED_WEIGHTS = 1 << 14, 1 << 11
"""Up to so many pairs of channels this holds for float32 with AVX2; beyond, most of our time is the reading of the
weight. The second number is for weights that are kept in oneDNN's own layout."""


_LONG = 32
"""Input channels from which oneDNN's channels-last sums round visibly more."""

_HALF_WIDE = WIDE // 2
"""Channels that a gradient at the map sums over, from which oneDNN's contiguous form with AVX2 is faster by more
than the copies that it needs."""

_FEW_POSITIONS = 512
"""Positions of the result below which contiguous copies pay at ``vendor.convolutions.WIDE`` channels."""

_FEW_OF_CHANNELS_LAST = 32, 256
"""The same for a channels-last weight, which would be copied too: of a convolution, of a gradient at the map."""

_FEWEST_TILES = 128
"""Tiles of 2 x 2 positions below which it does not pay to transform the weights."""


_SHORTEST_ROW = 8
"""Products of a row of the kernel below which a vector of the weight's gradient is mostly empty."""


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_Form = tuple[Any, ...]
"""Type, shapes of map and weight, stride, padding, dilation, whether the weight is contiguous, instruction set."""


def covers_convolution(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    finishing: bool = False,
    packed: bool = False,
) -> bool:
    """Whether ``convolve`` is to be taken rather than PyTorch's convolution, as measured.

    For float32: one of 3 x 3 positions and whole vectors of channels, where Winograd's form has 16 products
    and the direct sum has 36. A small one, whose time is that of the call. One of up to 8 output channels,
    since oneDNN computes 16. One of 32 and more input channels, whose sums oneDNN's channels-last form
    takes in one register with up to four times the error of the contiguous form, at the same speed. And
    where it finishes the map (``finishing``), one of nearly whole vectors of output channels: the pass that
    finishes it falls away. In 16 bits, where oneDNN has twice the rate: small ones, and up to two output
    channels.

    With AVX2 oneDNN's two forms round alike and take two thirds of our time for 16 and more channels on both
    sides: small ones are left, up to 8 output channels, and up to 16 where it finishes the map.

    Args:
        finishing: the map is finished too. packed: PyTorch's has the weight in oneDNN's own layout.
    """
    form = _form(x, weight, geometry)
    return form is not None and not geometry[3] and _faster(form, finishing, packed=packed)


def covers_gradients(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[bool, bool]:
    """Whether the gradients at map and weight of a float32 convolution, or a transposed one, are to be taken here.

    The one at the map is a convolution itself; see ``covers_convolution`` (at a stride, of transposed ones only).
    The weight's is taken at any size unless oneDNN is as fast and as good: with AVX-512, at whole vectors of both
    channels. At others its channels-last form adds up all positions in one register, and in 3D its error is twenty
    times that of the contiguous form.
    """
    form = _form(x, weight, geometry)
    return (
        (False, False) if form is None else _faster_gradients(form, geometry[3], tuple(geometry[4]))
    )


def _form(x: Tensor, weight: Tensor, geometry: Geometry) -> _Form | None:
    """The facts that decide between the kernels and PyTorch; None where the kernels do not cover the call."""
    stride, padding, dilation, _, _, groups = geometry
    if groups != 1 or weight.dtype != x.dtype or x.dtype not in _DTYPES:
        return None
    numbers = tuple(stride), tuple(padding), tuple(dilation)
    plain = weight.is_contiguous()
    return x.dtype, x.shape, weight.shape, *numbers, plain, _C.instruction_set()


def _output(form: _Form) -> list[int]:
    """Spatial size of the result; empty where the kernels do not serve the form, or slowly."""
    _, x, weight, stride, padding, dilation, _, instructions = form
    kernel = weight[2:]
    if instructions == "baseline" or max(dilation) != 1 or not math.prod(x):
        return []
    # a product of matrices
    if math.prod(kernel) == max(stride) == 1:
        return []
    if any(p >= k for p, k in zip(padding, kernel, strict=True)):
        return []
    return output_sizes(x[2:], kernel, stride, padding)


def output_sizes(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> list[int]:
    each = zip(size, kernel, stride, padding, strict=True)
    return [max(0, (s + 2 * p - k) // t + 1) for s, k, t, p in each]


def _is_small(form: _Form, products: float, packed: bool = False) -> bool:
    """Whether so many products take less time than PyTorch's call."""
    dtype, x, (co, ci, *_), *_ = form
    if dtype != torch.float32:
        return products <= _NARROW_PRODUCTS
    if form[-1] == "avx2" and co * ci > (_PACKED_WEIGHTS if packed else _WEIGHTS):
        return False
    if len(x) == 4 and _is_native(form):
        return products <= _NATIVE_PRODUCTS
    return products <= (_AVX2_PRODUCTS if form[-1] == "avx2" else _PRODUCTS)


def _is_native(form: _Form) -> bool:
    """Whether PyTorch would convolve a single float32 sample by products of matrices, which round less."""
    _, x, weight, *_ = form
    if x[0] != 1 or math.prod(x[:4]) > SMALL:
        return False
    return len(x) == 4 or 1 < max(weight[2:]) <= 3


@functools.lru_cache(maxsize=4096)
def _faster(form: _Form, finishing: bool, gradient: bool = False, packed: bool = False) -> bool:
    dtype, x, weight, stride, *_, plain, instructions = form
    out, narrow, (co, ci, *_) = _output(form), dtype != torch.float32, weight
    if not out:
        return False
    if _is_small(form, x[0] * math.prod(out) * math.prod(weight), packed):
        return True
    if narrow:
        return co <= 2
    if co <= 8 or (len(x) == 5 and _is_native(form)):
        return True
    if max(stride) == 1 and by_winograd(dtype, x[0], out, weight, instructions):
        return True
    if instructions == "avx2":
        # the contiguous form of the gradient at the map rounds less, unlike that of the convolution
        return _LONG <= ci < _HALF_WIDE if gradient else finishing and ci <= 16 and 15 <= co <= 16
    if ci >= _LONG:
        # to copy a few positions costs less than to pack the weights of many channels
        few = _FEW_POSITIONS if plain else _FEW_OF_CHANNELS_LAST[gradient]
        return ci < WIDE or x[0] * math.prod(out) >= few
    return finishing and 10 * co >= 9 * 16 * math.ceil(co / 16)


def by_winograd(
    dtype: torch.dtype, batch: int, out: Sequence[int], weight: Sequence[int], instructions: str
) -> bool:
    """Whether Winograd's form is the faster one, as measured: with AVX-512, from 16 channels on."""
    co, ci, *kernel = weight
    if dtype != torch.float32 or tuple(kernel[-2:]) != (3, 3) or instructions != "avx512":
        return False
    *planes, height, width = out
    if planes and batch == 1 and ci * planes[0] * height <= SMALL:
        return False  # see ``_is_native``
    tiles = batch * math.prod(planes) * -(-height // 2) * -(-width // 2)
    return ci % 16 == co % 16 == 0 and tiles >= _FEWEST_TILES


@functools.lru_cache(maxsize=4096)
def _faster_gradients(
    form: _Form, transposed: bool, output_padding: tuple[int, ...]
) -> tuple[bool, bool]:
    dtype, x, weight, stride, padding, *same = form
    if dtype != torch.float32:
        return False, False
    _, _, *kernel = weight
    if transposed:
        # the convolution that this one is the gradient of
        each = zip(x[2:], kernel, stride, padding, output_padding, strict=True)
        size = [(s - 1) * t - 2 * p + k + more for s, k, t, p, more in each]
        whole = (dtype, (x[0], weight[1], *size), weight, stride, padding, *same)
        return _faster(whole, False), _weight_gradient(whole)
    if max(stride) > 1:
        return False, _weight_gradient(form)
    out = _output(form)
    if not out:
        return False, False
    back = tuple(k - 1 - p for k, p in zip(kernel, padding, strict=True))
    turned = (weight[1], weight[0], *kernel)
    mirrored = (dtype, (x[0], weight[0], *out), turned, stride, back, *same)
    native = len(x) == 5 and _is_native(form) and bool(_output(mirrored))
    return native or _faster(mirrored, False, True), _weight_gradient(form)


def _weight_gradient(form: _Form) -> bool:
    _, x, weight, *_, instructions = form
    out, (co, ci, *kernel) = _output(form), weight
    if not out:
        return False
    # the vectors of the weight's gradient lie along a row of the kernel
    row = ci * kernel[-1]
    filled = row / (16 * math.ceil(row / 16))
    small = _is_small(form, x[0] * math.prod(out) * math.prod(weight) / filled)
    if small or _is_native(form):
        return True
    if row < _SHORTEST_ROW or max(ci, co) >= WIDE + (instructions != "avx2"):
        return False
    return instructions != "avx512" or ci % 16 != 0 or co % 16 != 0
