"""The gradient at a convolution's weight; norm, FiLM and activation in front of it are recomputed on the way.

It is dW = Σ e ⊗ v of the gradient e at the output, with v recomputed from the raw input.

One program computes one tap for BM x BN (output x input) channels over a share of the voxels; the
shares are added by a second kernel in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    add_product,
    affine,
    cdiv,
    dense,
    guard,
    layout,
    load_coef,
    loop,
    scratch,
    sum_rows,
)
from .conv_fprop import constants, sizes


@dataclass(frozen=True)
class Config:
    """Tile of the weight gradient: BM output by BN input channels, BP voxels at a time."""

    bm: int
    bn: int
    bp: int
    warps: int
    stages: int


CONFIGS = (
    Config(128, 64, 64, 8, 3),
    Config(64, 64, 64, 4, 3),
    Config(64, 32, 64, 4, 3),
    Config(64, 16, 64, 4, 2),
)
"""Shipped tiles for 16-bit types."""

CONFIGS_FLOAT32 = (Config(32, 32, 32, 4, 2),)

PROGRAMS = 64 if INTERPRETED else 512
"""Programs to aim for: enough for every multiprocessor, few enough that the second stage is cheap."""


def pick(dtype: torch.dtype, channels_in: int, channels_out: int) -> Config:
    """The shipped tile that wastes least."""
    if INTERPRETED:
        return Config(64, 64, 1024, 4, 2)
    if dtype == torch.float32:
        return CONFIGS_FLOAT32[0]
    if channels_in <= 16:
        return CONFIGS[3]
    if channels_in <= 32:
        return CONFIGS[2]
    return CONFIGS[0] if channels_out >= 128 else CONFIGS[1]


def split(batch: int, voxels: int, programs: int, bp: int) -> tuple[int, int, int]:
    """(groups of samples, shares of a sample's voxels, voxels in a share).

    Samples are split first because the coefficients change with the sample.
    """
    wanted = max(1, PROGRAMS // programs)
    groups = min(batch, wanted)
    shares = max(1, min(cdiv(voxels, 4 * bp), wanted // groups))
    span = cdiv(cdiv(voxels, shares), bp) * bp
    return groups, cdiv(voxels, span), span


@triton.jit
def wgrad_kernel(
    e_ptr,
    x_ptr,
    coef_ptr,
    part_ptr,
    N,
    CI,
    CO,
    D,
    H,
    W,
    OD,
    OH,
    OW,
    groups,
    shares,
    span,
    KD: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_D: tl.constexpr,
    PD,
    PH,
    PW,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,
):
    TAPS: tl.constexpr = KD * K * K
    tap = tl.program_id(0) % TAPS
    part = tl.program_id(0) // TAPS
    group = part // shares
    share = part % shares
    kd = tap // (K * K)
    kh = (tap // K) % K
    kw = tap % K
    co = tl.program_id(1) * BM + tl.arange(0, BM)
    ci = tl.program_id(2) * BN + tl.arange(0, BN)
    comask = co < CO
    cimask = ci < CI
    voxels = OD * OH * OW
    first = share * span
    last = tl.minimum(first + span, voxels)
    acc = tl.zeros((BM, BN), tl.float32)
    for sample in loop(group, N, groups):
        n = tl.cast(sample, tl.int64)
        if HAS_COEF:
            coefs = load_coef(coef_ptr, n, ci, cimask, N, CI)
        for v0 in loop(first, last, BP):
            voxel = v0 + tl.arange(0, BP)
            ow = voxel % OW
            oh = (voxel // OW) % OH
            od = voxel // (OW * OH)
            d = od * STRIDE_D - PD + kd
            h = oh * STRIDE - PH + kh
            w = ow * STRIDE - PW + kw
            valid = voxel < last
            inside = valid & (d >= 0) & (d < D) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            e = tl.load(
                e_ptr + (n * voxels + voxel)[:, None] * CO + co[None, :],
                mask=valid[:, None] & comask[None, :],
                other=0.0,
            )
            mask = inside[:, None] & cimask[None, :]
            at = (((n * D + d) * H + h) * W + w)[:, None] * CI + ci[None, :]
            x = tl.load(x_ptr + at, mask=mask, other=0.0)
            if HAS_COEF:
                v = affine(x.to(tl.float32), coefs, ACT)
                x = tl.where(mask, v, 0.0).to(x.dtype)
            acc = add_product(tl.trans(e), x, acc, UPCAST, PRECISION)
    base = part_ptr + part.to(tl.int64) * CO * TAPS * CI
    at = (co[:, None] * TAPS + tap) * CI + ci[None, :]
    tl.store(base + at, acc, mask=comask[:, None] & cimask[None, :])


def wgrad(
    e: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    config: Config | None = None,
) -> torch.Tensor:
    """dW, of ``weight``'s shape and dtype, channels-last.

    Args:
        e: gradient at the raw output [N, Co, *T], channels-last.
        x: raw input [N, Ci, *S], channels-last; ``coef`` [7, N, Ci] and ``act`` are pending on it.
    """
    n, ci, co, *_, od, oh, ow = numbers = sizes(x, weight, e.shape[2:])
    taps = weight.shape[2:].numel()
    c = config or pick(x.dtype, ci, co)
    blocks_m, blocks_n = cdiv(co, c.bm), cdiv(ci, c.bn)
    groups, shares, span = split(n, od * oh * ow, taps * blocks_m * blocks_n, c.bp)
    partials = scratch(x, groups * shares, co * taps * ci)
    dweight = torch.empty_like(weight, memory_format=layout(weight.dim()))
    with guard(x):
        wgrad_kernel[(taps * groups * shares, blocks_m, blocks_n)](
            e,
            x,
            dense(coef, x),
            partials,
            *numbers,
            groups,
            shares,
            span,
            **constants(x, weight, coef, act, stride, padding),
            BM=c.bm,
            BN=c.bn,
            BP=c.bp,
            num_warps=c.warps,
            num_stages=c.stages,
        )
        return sum_rows(partials, dweight)
