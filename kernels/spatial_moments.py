"""Mean and variance of a feature map [N, S, C] per sample and channel, and their gradient.

They are what batch, instance, group and layer norm are made of. Two stages: each program combines its blocks into
(count, mean, sum of squared deviations M2); a second kernel combines those.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    activate,
    activate_grad,
    activate_slope_grad,
    channels_last,
    dense,
    dithered,
    finish_moments,
    guard,
    load_pre,
    loop,
    row_sum,
    sample_and_channels,
    scratch,
    store_moments,
    store_rows,
    sum_rows,
)
from .pointwise import divide


@triton.jit
def _block(
    y_ptr, n, start, channel, cmask, shift, slope, S, C, ACT: tl.constexpr, BS: tl.constexpr
):
    """act(y + shift) [BS, BC] of the voxels from ``start`` on, zero beyond the map, and which there are."""
    voxel = start + tl.arange(0, BS)
    valid = voxel < S
    at = (n * S + voxel)[:, None] * C + channel[None, :]
    y = tl.load(y_ptr + at, mask=valid[:, None] & cmask[None, :], other=0.0).to(tl.float32)
    u = activate(y + shift[None, :], slope[None, :], ACT)
    return tl.where(valid[:, None], u, 0.0), valid


@triton.jit
def moments_kernel(
    y_ptr,
    pre_ptr,
    part_ptr,
    count_ptr,
    S,
    C,
    iters,
    HAS_PRE: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    n, channel, cmask = sample_and_channels(C, BC)
    t = tl.program_id(0)
    shift, slope = load_pre(pre_ptr, channel, cmask, C, HAS_PRE)
    first = t.to(tl.int64) * iters * BS
    # sums of deviations from the first block's mean: the variance is at least that between this block and the
    # rest, so that taking one sum from the other costs at most log2(iters) bits
    u, valid = _block(y_ptr, n, first, channel, cmask, shift, slope, S, C, ACT, BS)
    near = row_sum(u) / tl.maximum(tl.sum(valid.to(tl.float32), axis=0), 1.0)
    total = tl.zeros((BS, BC), tl.float32)
    squares = tl.zeros((BS, BC), tl.float32)
    for i in loop(0, iters, num_stages=3):  # the next blocks are loading meanwhile
        u, valid = _block(y_ptr, n, first + i * BS, channel, cmask, shift, slope, S, C, ACT, BS)
        d = tl.where(valid[:, None], u - near[None, :], 0.0)
        total += d
        squares += d * d
    seen = (tl.minimum(first + iters * BS, S) - tl.minimum(first, S)).to(tl.float32)
    rest = row_sum(total) / tl.maximum(seen, 1.0)
    m2 = row_sum(squares) - seen * rest * rest
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # a NaN stays NaN
    slot = n * tl.num_programs(0) + t
    store_moments(part_ptr, count_ptr, slot, channel, cmask, C, near + rest, m2, seen)


@triton.jit
def moments_backward_kernel(
    dy_ptr,
    dstats_ptr,
    y_ptr,
    stats_ptr,
    pre_ptr,
    e_ptr,
    part_ptr,
    S,
    N,
    C,
    iters,
    HAS_DY: tl.constexpr,
    HAS_PRE: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    n, channel, cmask = sample_and_channels(C, BC)
    t = tl.program_id(0)
    shift, slope = load_pre(pre_ptr, channel, cmask, C, HAS_PRE)
    at_nc = n * C + channel
    scale = tl.div_rn(1.0, S.to(tl.float32))  # Triton's / is off by up to two last places
    dmean = tl.load(dstats_ptr + at_nc, mask=cmask, other=0.0) * scale
    dvar = tl.load(dstats_ptr + N * C + at_nc, mask=cmask, other=0.0) * (2.0 * scale)
    mean = tl.load(stats_ptr + at_nc, mask=cmask, other=0.0)
    dshift = tl.zeros((BS, BC), tl.float32)
    dslope = dshift
    for i in loop(0, iters, num_stages=3):  # the next blocks are loading meanwhile
        # as ``block_of_map`` does, in the order of statements that takes ten registers less here
        voxel = (t.to(tl.int64) * iters + i) * BS + tl.arange(0, BS)
        mask = (voxel < S)[:, None] & cmask[None, :]
        at = (n * S + voxel)[:, None] * C + channel[None, :]
        z = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32) + shift[None, :]
        u = activate(z, slope[None, :], ACT)
        du = dmean[None, :] + (u - mean[None, :]) * dvar[None, :]
        dz = du * activate_grad(z, slope[None, :], ACT)
        if HAS_DY:
            dz += tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_PRE:
            # of the whole gradient: taken apart, the two halves of it nearly cancel
            dshift += tl.where(mask, dz, 0.0)
            if (ACT == 2) or (ACT == 3):
                dslope += tl.where(mask, du * activate_slope_grad(z, ACT), 0.0)
        tl.store(e_ptr + at, dithered(dz, at, e_ptr.dtype.element_ty), mask=mask)
    if HAS_PRE:
        base = part_ptr + (n * tl.num_programs(0) + t) * 2 * C + channel
        store_rows(base, C, cmask, (row_sum(dshift), row_sum(dslope)))


def moments(y: torch.Tensor, pre: torch.Tensor | None, act: str) -> torch.Tensor:
    """Mean and biased variance [2, N, C] float32 of act(y + shift), y [N, C, *S] channels-last."""
    d = divide(y, act, reduces=True)
    space, n, channels = d.sizes
    partials, counts = scratch(y, n, d.programs, 2, channels), scratch(y, n, d.programs)
    with guard(y):
        moments_kernel[d.grid](
            y,
            dense(pre, y),
            partials,
            counts,
            space,
            channels,
            d.iters,
            HAS_PRE=pre is not None,
            **d.constants,
        )
        return finish_moments(partials, counts)


def moments_backward(
    dy: torch.Tensor | None,
    dstats: torch.Tensor,
    y: torch.Tensor,
    stats: torch.Tensor,
    pre: torch.Tensor | None,
    act: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """e = dy + gradient through the moments [N, C, *S], and dpre [2, C] (None without ``pre``).

    dpre's first row is the sum of e: the gradient of the shift, and of a bias that y already has.
    """
    d = divide(y, act, reduces=pre is not None)
    e = channels_last(y.shape, y)
    slots = 1 if pre is None else y.shape[0] * d.programs
    partials = scratch(y, slots, 2 * y.shape[1])
    with guard(y):
        moments_backward_kernel[d.grid](
            y if dy is None else dy,
            dstats.contiguous(),
            y,
            stats,
            dense(pre, y),
            e,
            partials,
            *d.sizes,
            d.iters,
            HAS_DY=dy is not None,
            HAS_PRE=pre is not None,
            **d.constants,
        )
        return e, None if pre is None else sum_rows(partials, torch.empty_like(pre))
