"""Pointwise passes over a channels-last map [N, S, C]: the affine and its gradient.

One program takes a block of voxels and channels of one sample, so that the coefficients are vectors.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from .common import (
    ACT_CODES,
    add_affine_grad,
    affine,
    cdiv,
    channels_last,
    coef_grad,
    guard,
    load_coef,
    loop,
    power_of_two,
    store_partials,
    sum_affine_grad,
)

ELEMENTS = 4096
"""Elements of one block [BS, BC]; a kernel that also reduces takes half, to stay in registers."""

NUM_WARPS = 4

MAX_SLOTS = 2048
"""Partial results over all samples; a longer map gives each program several blocks."""


@functools.lru_cache(maxsize=4096)
def blocks(space: int, channels: int, batch: int, reduces: bool) -> tuple[int, int, int, int]:
    """(BS, BC, blocks per program, programs per sample) for a map [N, S, C]."""
    bc = power_of_two(channels, 1, 128)
    bs = power_of_two(space, 1, ELEMENTS // (2 * bc) if reduces else ELEMENTS // bc)
    total = cdiv(space, bs)
    iters = max(1, cdiv(total * batch, MAX_SLOTS)) if reduces else 1
    return bs, bc, iters, cdiv(total, iters)


@triton.jit
def apply_kernel(
    y_ptr, coef_ptr, v_ptr, S, N, C, ACT: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr
):
    n = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    a, b, g, s, p, q, slope = load_coef(coef_ptr, n, channel, cmask, N, C)
    voxel = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    at = (n * S + voxel)[:, None] * C + channel[None, :]
    mask = (voxel < S)[:, None] & cmask[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    v = affine(y, a, b, g, s, p, q, slope, ACT)
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)


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
    n = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    a, b, g, _s, p, q, slope = load_coef(coef_ptr, n, channel, cmask, N, C)
    dg = tl.zeros((BS, BC), tl.float32)
    ds, da, db, dslope = dg, dg, dg, dg
    for i in loop(0, iters, num_stages=3):  # the next blocks on their way
        voxel = (t.to(tl.int64) * iters + i) * BS + tl.arange(0, BS)
        at = (n * S + voxel)[:, None] * C + channel[None, :]
        mask = (voxel < S)[:, None] & cmask[None, :]
        # a masked element has dv = 0 and y = p, so it adds nothing to any sum
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, y, p[None, :])
        dv = tl.load(dv_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dy, dg, ds, da, db, dslope = add_affine_grad(
            dv, y, a, b, g, p, q, slope, dg, ds, da, db, dslope, ACT
        )
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    dg_all, ds_all, da_all, db_all, dslope_all = sum_affine_grad(
        a, b, g, q, dg, ds, da, db, dslope, ACT
    )
    slot = n * tl.num_programs(0) + t
    store_partials(part_ptr, slot, channel, cmask, C, dg_all, ds_all, da_all, db_all, dslope_all)


def apply(y: torch.Tensor, coef: torch.Tensor, act: str, in_place: bool = False) -> torch.Tensor:
    """v = g * (act(a * (y - p) + b) - q) + s for y [N, C, *S] channels-last, coef [7, N, C] float32."""
    v = y if in_place else channels_last(tuple(y.shape), y)
    n, channels, space = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    bs, bc, _, programs = blocks(space, channels, n, reduces=False)
    with guard(y):
        apply_kernel[(programs, cdiv(channels, bc), n)](
            y,
            coef.contiguous(),
            v,
            space,
            n,
            channels,
            ACT=ACT_CODES[act],
            BS=bs,
            BC=bc,
            num_warps=NUM_WARPS,
        )
    return v


def apply_backward(
    dv: torch.Tensor, y: torch.Tensor, coef: torch.Tensor, act: str, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy [N, C, *S] (in dv's memory if ``in_place``) and dcoef [7, N, C] of ``apply``."""
    dy = dv if in_place else channels_last(tuple(y.shape), y)
    n, channels, space = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    bs, bc, iters, programs = blocks(space, channels, n, reduces=True)
    coef = coef.contiguous()
    partials = torch.empty((n, programs, 5, channels), dtype=torch.float32, device=y.device)
    with guard(y):
        apply_backward_kernel[(programs, cdiv(channels, bc), n)](
            dv,
            y,
            coef,
            dy,
            partials,
            space,
            n,
            channels,
            iters,
            ACT=ACT_CODES[act],
            BS=bs,
            BC=bc,
            num_warps=NUM_WARPS,
        )
        return dy, coef_grad(partials, coef)
