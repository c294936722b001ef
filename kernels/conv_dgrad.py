"""Gradient at a convolution's input: dv = convᵀ(e, W), then the chain rule of the input's affine.

A program computes a tile of input voxels of one sample and one depth. With stride 2 the voxels of a
tile share their parity in every dimension, so that each tap is either used by all of them or by none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    ACT_CODES,
    INTERPRETED,
    affine_grad,
    architecture,
    cdiv,
    channels_last,
    coef_grad,
    guard,
    load_coef,
    loop,
    precision,
    store_partials,
)
from .conv_fprop import Config, _format, as_3d, interpreter_tile, wide

CONFIGS = (
    Config(8, 16, 64, 64, 8, 2, archs=(90, 100)),
    Config(8, 16, 64, 32, 8, 2),
    Config(8, 16, 32, 32, 8, 2),
    Config(8, 16, 16, 16, 4, 2),
    Config(8, 8, 64, 64, 4, 2, archs=(80, 90)),
)
"""Shipped tiles for 16-bit types: bn counts input channels here, bk output channels."""

CONFIGS_FLOAT32 = (Config(8, 8, 32, 32, 4, 2), Config(4, 4, 32, 32, 4, 2))


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
    co0 = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for kd in range(KD):
        nd = d + PD - kd
        hits_d = (nd >= 0) & (nd < OD * STRIDE_D) & (nd % STRIDE_D == 0)
        plane = e_ptr + (n * OD + nd // STRIDE_D) * OH * OW * CO
        for kh in range(K):
            # + 2 K keeps the remainder's operand positive
            hits_h = hits_d & ((rh + PH - kh + 2 * K * STRIDE) % STRIDE == 0)
            nh = ih + PH - kh
            oh = nh // STRIDE
            inside_h = valid & (nh >= 0) & (oh < OH)
            for kw in range(K):
                if hits_h & ((rw + PW - kw + 2 * K * STRIDE) % STRIDE == 0):
                    nw = iw + PW - kw
                    ow = nw // STRIDE
                    inside = inside_h & (nw >= 0) & (ow < OW)
                    e_row = plane + (oh * OW + ow) * CO
                    w_col = w_ptr + ((kd * K + kh) * K + kw) * CI + ci
                    for k0 in loop(0, BK if ONE_BLOCK else CO, BK):
                        co = k0 + co0
                        e = tl.load(
                            e_row[:, None] + co[None, :],
                            mask=inside[:, None] & (co < CO)[None, :],
                            other=0.0,
                        )
                        w = tl.load(
                            w_col[None, :] + (co * (KD * K * K) * CI)[:, None],
                            mask=(co < CO)[:, None] & cimask[None, :],
                            other=0.0,
                        )
                        if UPCAST:
                            e = e.to(tl.float32)
                            w = w.to(tl.float32)
                        acc = tl.dot(e, w, acc, input_precision=PRECISION)
    at = (ih * W + iw)[:, None] * CI + ci[None, :]
    here = (n * D + d) * H * W * CI
    mask = valid[:, None] & cimask[None, :]
    if HAS_COEF:
        a, b, g, _s, p, q, slope = load_coef(coef_ptr, n, ci, cimask, N, CI)
        x = tl.load(x_ptr + here + at, mask=mask, other=0.0).to(tl.float32)
        # a masked element has dv = 0 and x = p, so it adds nothing to any sum
        x = tl.where(mask, x, p[None, :])
        dv = tl.where(mask, acc, 0.0)
        acc, dg, ds, da, db, dslope = affine_grad(dv, x, a, b, g, p, q, slope, ACT)
        store_partials(part_ptr, n * tiles + t, ci, cimask, CI, dg, ds, da, db, dslope)
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
    n, ci = x.shape[:2]
    co = weight.shape[0]
    kernel = weight.shape[2:]
    d, h, w = as_3d(x.shape[2:])
    od, oh, ow = as_3d(e.shape[2:])
    pd, ph, pw = (0, *padding) if len(padding) == 2 else padding
    s = stride[-1]
    c = config or pick(x.dtype, ci, co, -(-h // s), -(-w // s), architecture(x))
    tiles = d * s * s * cdiv(-(-h // s), c.th) * cdiv(-(-w // s), c.tw)
    dx = channels_last(tuple(x.shape), x)
    slots = tiles if coef is not None else 1
    partials = torch.empty((n, slots, 5, ci), dtype=torch.float32, device=x.device)
    coef = None if coef is None else coef.contiguous()
    with guard(x):
        dgrad_kernel[(n * tiles, cdiv(ci, c.bn))](
            e,
            weight.contiguous(memory_format=_format(weight)),
            x,
            x if coef is None else coef,
            dx,
            partials,
            n,
            ci,
            co,
            d,
            h,
            w,
            od,
            oh,
            ow,
            KD=1 if len(kernel) == 2 else kernel[0],
            K=kernel[-1],
            STRIDE=s,
            STRIDE_D=1 if len(stride) == 2 else stride[0],
            PD=pd,
            PH=ph,
            PW=pw,
            HAS_COEF=coef is not None,
            ACT=ACT_CODES[act],
            ONE_BLOCK=co <= c.bk,
            WIDE=wide(h * w * ci, oh * ow * co),
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            PRECISION=precision(x.dtype),
            TH=c.th,
            TW=c.tw,
            BN=c.bn,
            BK=c.bk,
            num_warps=c.warps,
            num_stages=c.stages,
        )
        return dx, None if coef is None else coef_grad(partials, coef)
