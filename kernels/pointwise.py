"""One pass over a feature map [N, S, C]: v = g * (act(a * (y - p) + b) - q) + s per sample and channel.

A norm, FiLM and an activation are applied so once their coefficients are known. One program takes a block of
voxels and channels of one sample, so that the coefficients are vectors.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .common import (
    ACT_CODES,
    SLOTS,
    add_affine_grad,
    affine,
    block_of_map,
    cdiv,
    channels_last,
    coef_grad,
    guard,
    load_coef,
    loop,
    power_of_two,
    sample_and_channels,
    scratch,
    store_sums,
)

ELEMENTS = 4096
"""Elements of one block [BS, BC]; a kernel that also reduces takes half, to stay in registers."""

NUM_WARPS = 4

MAX_SLOTS = 2048
"""Partial results over all samples, and ``SLOTS`` of one; a longer map gives each program several blocks."""


def blocks_of_a_program(total: int, batch: int) -> int:
    """Of ``total`` blocks in each sample, as many for a program as the limits on partial results ask for."""
    return max(1, cdiv(total * batch, MAX_SLOTS), cdiv(total, SLOTS))


@functools.lru_cache(maxsize=4096)
def blocks(space: int, channels: int, batch: int, reduces: bool) -> tuple[int, int, int, int]:
    """(BS, BC, blocks per program, programs per sample) for a map [N, S, C]."""
    bc = power_of_two(channels, 1, 128)
    bs = power_of_two(space, 1, ELEMENTS // (2 * bc) if reduces else ELEMENTS // bc)
    total = cdiv(space, bs)
    iters = blocks_of_a_program(total, batch) if reduces else 1
    return bs, bc, iters, cdiv(total, iters)


class Division(NamedTuple):
    """S, N and C of a map, and how the programs of a pass divide it: blocks per program, programs per sample."""

    sizes: tuple[int, int, int]
    iters: int
    programs: int
    grid: tuple[int, int, int]
    constants: dict[str, int]


def divide(y: torch.Tensor, act: str, reduces: bool) -> Division:
    """The division of a pass over ``y`` by ``blocks``, and constants of its launch."""
    n, c, space = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    bs, bc, iters, programs = blocks(space, c, n, reduces)
    constants = {"ACT": ACT_CODES[act], "BS": bs, "BC": bc, "num_warps": NUM_WARPS}
    return Division((space, n, c), iters, programs, (programs, cdiv(c, bc), n), constants)


@triton.jit
def apply_kernel(
    y_ptr, coef_ptr, v_ptr, S, N, C, ACT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    n, channel, cmask = sample_and_channels(C, BC)
    coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
    at, mask = block_of_map(n, tl.program_id(0).to(tl.int64), channel, cmask, S, C, BS)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(v_ptr + at, affine(y, coefs, ACT).to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def apply_backward_kernel(
    dv_ptr,
    y_ptr,
    coef_ptr,
    dy_ptr,
    part_ptr,
    S,
    N,
    C,
    iters,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    n, channel, cmask = sample_and_channels(C, BC)
    t = tl.program_id(0)
    coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
    pivot = coefs[4]
    none = tl.zeros((BS, BC), tl.float32)
    sums = (none, none, none, none, none)
    for i in loop(0, iters, num_stages=3):  # the next blocks are loading meanwhile
        at, mask = block_of_map(n, t.to(tl.int64) * iters + i, channel, cmask, S, C, BS)
        # a masked element has dv = 0 and y = p, so it adds nothing to any sum
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, y, pivot[None, :])
        dv = tl.load(dv_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy, sums = add_affine_grad(dv, y, coefs, sums, ACT)
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    store_sums(part_ptr, n * tl.num_programs(0) + t, channel, cmask, C, coefs, sums, ACT)


def apply(y: torch.Tensor, coef: torch.Tensor, act: str, in_place: bool = False) -> torch.Tensor:
    """v = g * (act(a * (y - p) + b) - q) + s for y [N, C, *S] channels-last, coef [7, N, C] float32."""
    v = y if in_place else channels_last(y.shape, y)
    d = divide(y, act, reduces=False)
    with guard(y):
        apply_kernel[d.grid](y, coef.contiguous(), v, *d.sizes, **d.constants)
    return v


def apply_backward(
    dv: torch.Tensor, y: torch.Tensor, coef: torch.Tensor, act: str, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [N, C, *S] (in dv's memory if ``in_place``) and dcoef [7, N, C] of ``apply``."""
    dy = dv if in_place else channels_last(y.shape, y)
    coef = coef.contiguous()
    d = divide(y, act, reduces=True)
    partials = scratch(y, y.shape[0], d.programs, 5, y.shape[1])
    with guard(y):
        apply_backward_kernel[d.grid](dv, y, coef, dy, partials, *d.sizes, d.iters, **d.constants)
        return dy, coef_grad(partials, coef)
