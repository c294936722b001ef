"""The gradient at a convolution's input, taken back through the norm, FiLM and activation in front of it as well.

It is dv = convᵀ(e, W) of the gradient e at the output, then the chain rule of the input's affine.

A program computes a tile of input voxels of one sample and one depth. With stride 2 the voxels of a
tile share their parity in every dimension, so that each tap is either used by all of them or by none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    INTERPRETED,
    add_affine_grad,
    add_product,
    architecture,
    cdiv,
    channels_last,
    coef_grad,
    dense,
    guard,
    load_coef,
    loop,
    scratch,
    store_sums,
)
from .conv_fprop import (
    CONFIGS_FLOAT32,
    Config,
    constants,
    following,
    interpreter_tile,
    sizes,
    weight_rows,
)

CONFIGS = (
    Config(8, 16, 64, 64, 8, 2, archs=(90, 100)),
    Config(8, 16, 64, 32, 8, 2),
    Config(8, 16, 32, 32, 8, 2),
    Config(8, 16, 16, 16, 4, 2),
    Config(8, 8, 64, 64, 4, 2, archs=(80, 90)),
)
"""Shipped tiles for 16-bit types: bn counts input channels here, bk output channels."""


def pick(
    dtype: torch.dtype, channels_in: int, channels_out: int, height: int, width: int, target: int
) -> Config:
    """The shipped tile for ``target`` that wastes least: channels first, then the size of the map."""
    if INTERPRETED:
        return interpreter_tile(height, width)
    if dtype == torch.float32:
        return CONFIGS_FLOAT32[0] if height * width > 64 else CONFIGS_FLOAT32[1]
    if height * width <= 64:
        order = [4, 1]
    elif channels_in <= 16:
        order = [3]
    elif channels_in <= 32:
        order = [2]
    else:
        order = [1] if channels_out <= 32 else [0, 1]
    return next(CONFIGS[i] for i in order if target in CONFIGS[i].archs)


@triton.jit
def taps_from(first, K: tl.constexpr, STRIDE: tl.constexpr):
    """Number of the taps first, first + STRIDE, ... below K."""
    return (K - first + STRIDE - 1) // STRIDE


@triton.jit
def dgrad_kernel(
    e_ptr,
    w_ptr,
    x_ptr,
    coef_ptr,
    dx_ptr,
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
    KD: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDE_D: tl.constexpr,
    PD,
    PH,
    PW,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TH: tl.constexpr,
    TW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BM: tl.constexpr = TH * TW
    # a tile lives on the grid of voxels with its own parity (rh, rw); depth has no tile
    tiles_h = tl.cdiv(tl.cdiv(H, STRIDE), TH)
    tiles_w = tl.cdiv(tl.cdiv(W, STRIDE), TW)
    tiles = D * STRIDE * STRIDE * tiles_h * tiles_w
    n = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    tw = t % tiles_w
    th = (t // tiles_w) % tiles_h
    parity = (t // (tiles_w * tiles_h)) % (STRIDE * STRIDE)
    d = t // (tiles_w * tiles_h * STRIDE * STRIDE)
    rh = parity // STRIDE
    rw = parity % STRIDE
    row = tl.arange(0, BM)
    ih = (th * TH + row // TW) * STRIDE + rh
    iw = (tw * TW + row % TW) * STRIDE + rw
    valid = (ih < H) & (iw < W)
    if WIDE:
        ih = ih.to(tl.int64)
        iw = iw.to(tl.int64)
    ci = tl.program_id(1) * BN + tl.arange(0, BN)
    cimask = ci < CI
    acc = tl.zeros((BM, BN), tl.float32)
    # only the taps of this parity, and in depth those that meet a plane, so that no load is conditional
    last = (d + PD) // STRIDE_D
    low = tl.maximum(last - OD + 1, 0)
    first_d, first_h, first_w = (d + PD) % STRIDE_D, (rh + PH) % STRIDE, (rw + PW) % STRIDE
    planes = tl.minimum(taps_from(first_d, KD, STRIDE_D), last + 1) - low
    taps = planes * taps_from(first_h, K, STRIDE) * taps_from(first_w, K, STRIDE)
    kd, kh, kw, k0 = first_d + low * STRIDE_D, first_h, first_w, 0
    for _ in loop(taps * (1 if ONE_BLOCK else tl.cdiv(CO, BK))):
        nh, nw = ih + PH - kh, iw + PW - kw
        oh, ow = nh // STRIDE, nw // STRIDE
        inside = valid & (nh >= 0) & (oh < OH) & (nw >= 0) & (ow < OW)
        e_row = e_ptr + (n * OD + (d + PD - kd) // STRIDE_D) * OH * OW * CO + (oh * OW + ow) * CO
        w_col = w_ptr + ((kd * K + kh) * K + kw) * CI + ci
        co = k0 + tl.arange(0, BK)
        e = tl.load(
            e_row[:, None] + co[None, :], mask=inside[:, None] & (co < CO)[None, :], other=0.0
        )
        w = tl.load(
            w_col[None, :] + (co * (KD * K * K) * CI)[:, None],
            mask=(co < CO)[:, None] & cimask[None, :],
            other=0.0,
        )
        acc = add_product(e, w, acc, UPCAST, PRECISION)
        kd, kh, kw, k0 = following(
            kd, kh, kw, k0, first_h, first_w, CO, K, STRIDE, STRIDE_D, ONE_BLOCK, BK
        )
    at = (ih * W + iw)[:, None] * CI + ci[None, :]
    here = (n * D + d) * H * W * CI
    mask = valid[:, None] & cimask[None, :]
    if HAS_COEF:
        coefs = load_coef(coef_ptr, n, ci, cimask, N, CI)
        x = tl.load(x_ptr + here + at, mask=mask, other=0.0).to(tl.float32)
        # a masked element has dv = 0 and x = p, so it adds nothing to any sum
        x = tl.where(mask, x, coefs[4][None, :])
        dv = tl.where(mask, acc, 0.0)
        none = tl.zeros_like(dv)
        acc, sums = add_affine_grad(dv, x, coefs, (none, none, none, none, none), ACT)
        store_sums(part_ptr, n * tiles + t, ci, cimask, CI, coefs, sums, ACT)
    tl.store(dx_ptr + here + at, acc.to(dx_ptr.dtype.element_ty), mask=mask)


def dgrad(
    e: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx [N, Ci, *S] channels-last, and dcoef [7, N, Ci] (None without ``coef``).

    Args:
        e: gradient at the raw output [N, Co, *T], channels-last.
        weight: [Co, Ci, *K].
        x: the raw input [N, Ci, *S] that the forward pass read.
    """
    n, ci, co, d, h, w, _, oh, ow = numbers = sizes(x, weight, e.shape[2:])
    s = stride[-1]
    c = config or pick(x.dtype, ci, co, cdiv(h, s), cdiv(w, s), architecture(x))
    tiles = d * s * s * cdiv(cdiv(h, s), c.th) * cdiv(cdiv(w, s), c.tw)
    dx = channels_last(x.shape, x)
    partials = scratch(x, n, 1 if coef is None else tiles, 5, ci)
    coef = dense(coef)
    with guard(x):
        dgrad_kernel[(n * tiles, cdiv(ci, c.bn))](
            e,
            weight_rows(weight),
            x,
            dense(coef, x),
            dx,
            partials,
            *numbers,
            **constants(x, weight, coef, act, stride, padding),
            **c.constants(co, h * w * ci, oh * ow * co),
        )
        return dx, None if coef is None else coef_grad(partials, coef)
