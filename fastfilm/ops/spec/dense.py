"""Operands as kernels read them by address: values in memory, dense, in the order that the kernel expects.

Whatever gives a tensor's address to a kernel, ours or a vendor's, takes the tensor from here. A tensor may be a
column of a larger one, one number expanded, a view that PyTorch negates when it is read (``is_neg``), or zeros
without memory; strides of dimensions of one element may be any numbers.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .layout import channels_last_format


def values(t: Tensor) -> Tensor:
    """``t`` with its values in its memory; the tensor itself where they are."""
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t.resolve_neg() if t.is_neg() else t


def contiguous(t: Tensor) -> Tensor:
    """``t`` dense in the order of its dimensions."""
    if t.is_neg() or t._is_zerotensor():
        t = values(t)
    return t.contiguous()


def channels_last(t: Tensor) -> Tensor:
    """``t`` [N, C, *S] dense in channels-last order."""
    if t.is_neg() or t._is_zerotensor():
        t = values(t)
    return t.contiguous(memory_format=channels_last_format(t.dim()))


def vendors_map(t: Tensor, plain: bool) -> Tensor:
    """``t`` [N, C, *S] channels-last, or contiguous if ``plain``, as its strides alone say.

    Vendors' libraries take the order from the strides, those of dimensions of one element too.
    """
    t = contiguous(t) if plain else channels_last(t)
    strides = _strides(t.shape)[not plain]
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def vendors_weight(t: Tensor, plain: bool) -> Tensor:
    """A weight [Co, Ci, *K] channels-last, as vendors' channels-last kernels want it, or contiguous if ``plain``.

    oneDNN is 1.6 times slower with channels-last maps and a contiguous weight.
    """
    t = contiguous(t) if plain else channels_last(t)
    usual = _strides(t.shape)
    return t if t.stride() in usual else t.as_strided(t.shape, usual[not plain])


@functools.lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of a contiguous and of a channels-last tensor of a shape."""
    last, channels = range(len(shape) - 1, 1, -1), (1,) if len(shape) > 1 else ()
    return _dense(shape, (*last, *channels, 0)), _dense(shape, (*channels, *last, 0))


def _dense(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    for dim in order:
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)
