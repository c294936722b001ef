"""What a consumer sees of a map, written in one pass: behind its affine, pooled or resized, into a wider map.

Along each axis a position of the result has up to T taps: an index into the map and a weight, padded with weight
0. The result is the weighted sum, or the maximum, over all combinations. The gradient comes back in one pass as
well, through the affine and with its sums: by the transposed taps, or to the first of a window's largest elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    ACT_CODES,
    affine,
    affine_grad,
    channels_last,
    coef_grad,
    guard,
    load_coef,
    loop,
    store_partials,
)
from .pointwise import NUM_WARPS, blocks

Taps = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Per axis (depth, height, width; one position deep in 2D): index int32 and weight float32, [positions, T]."""


@triton.jit
def _affine_of(y, coefs, ACT: tl.constexpr, HAS_COEF: tl.constexpr):
    if HAS_COEF:
        a, b, g, s, p, q, slope = coefs
        y = affine(y, a, b, g, s, p, q, slope, ACT)
    return y


@triton.jit
def _coefs(coef_ptr, n, channel, cmask, N, C, HAS_COEF: tl.constexpr):
    if HAS_COEF:
        coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
    else:
        zero = channel.to(tl.float32) * 0.0
        coefs = (zero, zero, zero, zero, zero, zero, zero)
    return coefs


@triton.jit
def _tap(index_ptr, weight_ptr, position, t, inside, T: tl.constexpr):
    at = position * T + t
    return (
        tl.load(index_ptr + at, mask=inside, other=0),
        tl.load(weight_ptr + at, mask=inside, other=0.0),
    )


@triton.jit
def gather_kernel(
    y_ptr,
    coef_ptr,
    out_ptr,
    iz_ptr,
    wz_ptr,
    iy_ptr,
    wy_ptr,
    ix_ptr,
    wx_ptr,
    S,
    H,
    W,
    SO,
    HO,
    WO,
    N,
    C,
    K,
    first,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Map [N, S, C] -> channels first .. first + C of [N, SO, K]; S = D * H * W."""
    n = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    coefs = _coefs(coef_ptr, n, channel, cmask, N, C, HAS_COEF)
    voxel = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    inside = voxel < SO
    z, rest = voxel // (HO * WO), voxel % (HO * WO)
    row, column = rest // WO, rest % WO
    found = tl.zeros((BS, BC), tl.float32)
    if MAXIMUM:
        found = found - float("inf")
    for tz in range(TZ):
        az, vz = _tap(iz_ptr, wz_ptr, z, tz, inside, TZ)
        for ty in range(TY):
            ay, vy = _tap(iy_ptr, wy_ptr, row, ty, inside, TY)
            for tx in range(TX):
                ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
                weight = vz * vy * vx
                at = (n * S + (az.to(tl.int64) * H + ay) * W + ax)[:, None] * C + channel[None, :]
                used = (inside & (weight != 0.0))[:, None] & cmask[None, :]
                y = tl.load(y_ptr + at, mask=used, other=0.0).to(tl.float32)
                v = _affine_of(y, coefs, ACT, HAS_COEF)
                # the value that a written map would hold
                v = v.to(out_ptr.dtype.element_ty).to(tl.float32)
                if MAXIMUM:
                    found = tl.where(used & ((v > found) | (v != v)), v, found)
                else:
                    found += tl.where(used, weight[:, None] * v, 0.0)
    at = (n * SO + voxel)[:, None] * K + first + channel[None, :]
    mask = inside[:, None] & cmask[None, :]
    tl.store(out_ptr + at, found.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gather_backward_kernel(
    dout_ptr,
    y_ptr,
    coef_ptr,
    dy_ptr,
    part_ptr,
    iz_ptr,
    wz_ptr,
    iy_ptr,
    wy_ptr,
    ix_ptr,
    wx_ptr,
    S,
    H,
    W,
    SO,
    HO,
    WO,
    N,
    C,
    K,
    first,
    iters,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of the weighted sum at y; the taps are the transposed ones."""
    n = tl.program_id(2).to(tl.int64)
    program = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    a, b, g, _s, p, q, slope = _coefs(coef_ptr, n, channel, cmask, N, C, HAS_COEF)
    dg = tl.zeros((BC,), tl.float32)
    ds = tl.zeros((BC,), tl.float32)
    da = tl.zeros((BC,), tl.float32)
    db = tl.zeros((BC,), tl.float32)
    dslope = tl.zeros((BC,), tl.float32)
    for i in loop(iters):
        voxel = (program.to(tl.int64) * iters + i) * BS + tl.arange(0, BS)
        inside = voxel < S
        z, rest = voxel // (H * W), voxel % (H * W)
        row, column = rest // W, rest % W
        dv = tl.zeros((BS, BC), tl.float32)
        for tz in range(TZ):
            az, vz = _tap(iz_ptr, wz_ptr, z, tz, inside, TZ)
            for ty in range(TY):
                ay, vy = _tap(iy_ptr, wy_ptr, row, ty, inside, TY)
                for tx in range(TX):
                    ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
                    weight = vz * vy * vx
                    to = n * SO + (az.to(tl.int64) * HO + ay) * WO + ax
                    used = (inside & (weight != 0.0))[:, None] & cmask[None, :]
                    at = to[:, None] * K + first + channel[None, :]
                    d = tl.load(dout_ptr + at, mask=used, other=0.0).to(tl.float32)
                    dv += tl.where(used, weight[:, None] * d, 0.0)
        at = (n * S + voxel)[:, None] * C + channel[None, :]
        mask = inside[:, None] & cmask[None, :]
        dy = dv
        if HAS_COEF:
            y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
            y = tl.where(mask, y, p[None, :])
            dy, dg_i, ds_i, da_i, db_i, dslope_i = affine_grad(dv, y, a, b, g, p, q, slope, ACT)
            dg += dg_i
            ds += ds_i
            da += da_i
            db += db_i
            dslope += dslope_i
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    if HAS_COEF:
        slot = n * tl.num_programs(0) + program
        store_partials(part_ptr, slot, channel, cmask, C, dg, ds, da, db, dslope)


@triton.jit
def maximum_backward_kernel(
    dout_ptr,
    y_ptr,
    coef_ptr,
    dy_ptr,
    part_ptr,
    iz_ptr,
    wz_ptr,
    iy_ptr,
    wy_ptr,
    ix_ptr,
    wx_ptr,
    S,
    H,
    W,
    SO,
    HO,
    WO,
    N,
    C,
    K,
    first,
    iters,
    TZ: tl.constexpr,
    TY: tl.constexpr,
    TX: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of the maximum at y, which is zero before; windows must not overlap."""
    n = tl.program_id(2).to(tl.int64)
    program = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    coefs = _coefs(coef_ptr, n, channel, cmask, N, C, HAS_COEF)
    a, b, g, _s, p, q, slope = coefs
    dg = tl.zeros((BC,), tl.float32)
    ds = tl.zeros((BC,), tl.float32)
    da = tl.zeros((BC,), tl.float32)
    db = tl.zeros((BC,), tl.float32)
    dslope = tl.zeros((BC,), tl.float32)
    for i in loop(iters):
        voxel = (program.to(tl.int64) * iters + i) * BS + tl.arange(0, BS)
        inside = voxel < SO
        z, rest = voxel // (HO * WO), voxel % (HO * WO)
        row, column = rest // WO, rest % WO
        best = tl.zeros((BS, BC), tl.float32) - float("inf")
        where = tl.zeros((BS, BC), tl.int32)
        for tz in range(TZ):
            az, vz = _tap(iz_ptr, wz_ptr, z, tz, inside, TZ)
            for ty in range(TY):
                ay, vy = _tap(iy_ptr, wy_ptr, row, ty, inside, TY)
                for tx in range(TX):
                    ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
                    at = (n * S + (az.to(tl.int64) * H + ay) * W + ax)[:, None] * C + channel[
                        None, :
                    ]
                    used = (inside & (vz * vy * vx != 0.0))[:, None] & cmask[None, :]
                    y = tl.load(y_ptr + at, mask=used, other=0.0).to(tl.float32)
                    v = _affine_of(y, coefs, ACT, HAS_COEF)
                    v = v.to(y_ptr.dtype.element_ty).to(tl.float32)
                    larger = used & ((v > best) | (v != v))
                    best = tl.where(larger, v, best)
                    where = tl.where(larger, (tz * TY + ty) * TX + tx, where)
        at = (n * SO + voxel)[:, None] * K + first + channel[None, :]
        mask = inside[:, None] & cmask[None, :]
        d = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        for tz in range(TZ):
            az, vz = _tap(iz_ptr, wz_ptr, z, tz, inside, TZ)
            for ty in range(TY):
                ay, vy = _tap(iy_ptr, wy_ptr, row, ty, inside, TY)
                for tx in range(TX):
                    ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
                    at = (n * S + (az.to(tl.int64) * H + ay) * W + ax)[:, None] * C + channel[
                        None, :
                    ]
                    used = (inside & (vz * vy * vx != 0.0))[:, None] & cmask[None, :]
                    dv = tl.where(used & (where == (tz * TY + ty) * TX + tx), d, 0.0)
                    dy = dv
                    if HAS_COEF:
                        y = tl.load(y_ptr + at, mask=used, other=0.0).to(tl.float32)
                        y = tl.where(used, y, p[None, :])
                        dy, dg_i, ds_i, da_i, db_i, dslope_i = affine_grad(
                            dv, y, a, b, g, p, q, slope, ACT
                        )
                        dg += dg_i
                        ds += ds_i
                        da += da_i
                        db += db_i
                        dslope += dslope_i
                    tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=used)
    if HAS_COEF:
        slot = n * tl.num_programs(0) + program
        store_partials(part_ptr, slot, channel, cmask, C, dg, ds, da, db, dslope)


def _arguments(
    y: torch.Tensor, coef: torch.Tensor | None, act: str, taps: Taps, size: Sequence[int], wide: int
) -> tuple[list[Any], list[int], dict[str, Any]]:
    """Tap tensors, sizes, and constants of a launch; ``size`` is the result's."""
    *_, h, w = y.shape
    *_, ho, wo = size
    space, out = y[0, 0].numel(), 1
    for s in size:
        out *= s
    numbers = [space, h, w, out, ho, wo, y.shape[0], y.shape[1], wide]
    constants = {f"T{axis}": taps[i][0].shape[1] for i, axis in enumerate("ZYX")}
    constants |= {"HAS_COEF": coef is not None, "ACT": ACT_CODES[act]}
    return [t for pair in taps for t in pair], numbers, constants


def tile(space: int, channels: int, batch: int) -> tuple[int, int]:
    """(BS, BC) of ``gather_kernel``: that of a kernel that reduces, since taps want registers too."""
    return blocks(space, channels, batch, reduces=True)[:2]


def gather_taps(
    y: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    taps: Taps,
    maximum: bool,
    out: torch.Tensor,
    first: int,
) -> None:
    """Writes what ``taps`` show of a map behind its coefficients into channels ``first`` on of ``out``.

    Args:
        y: [N, C, *S], channels-last.
        coef: [7, N, C] float32; None: the map as it is.
        out: [N, K, *T], channels-last, y's dtype.
    """
    tensors, numbers, constants = _arguments(y, coef, act, taps, out.shape[2:], out.shape[1])
    n, c = y.shape[:2]
    space = out[0, 0].numel()
    bs, bc = tile(space, c, n)
    with guard(y):
        gather_kernel[(triton.cdiv(space, bs), triton.cdiv(c, bc), n)](
            y,
            y if coef is None else coef.contiguous(),
            out,
            *tensors,
            *numbers,
            first,
            MAXIMUM=maximum,
            BS=bs,
            BC=bc,
            num_warps=NUM_WARPS,
            **constants,
        )


def gather_taps_backward(
    dout: torch.Tensor,
    first: int,
    y: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    taps: Taps,
    maximum: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of ``gather_taps`` at y [N, C, *S] and coef [7, N, C].

    Args:
        dout: gradient at ``out``, channels-last.
        taps: those of the forward pass for the maximum, whose windows must not overlap; else the transposed.
    """
    tensors, numbers, constants = _arguments(y, coef, act, taps, dout.shape[2:], dout.shape[1])
    n, c = y.shape[:2]
    dy = channels_last(tuple(y.shape), y)
    if maximum:
        dy.zero_()  # a window does not reach everywhere
    space = dout[0, 0].numel() if maximum else y[0, 0].numel()
    bs, bc, iters, programs = blocks(space, c, n, reduces=True)
    plain = None if coef is None else coef.contiguous()
    partials = torch.empty(
        (n, programs, 5, c if coef is not None else 0), dtype=torch.float32, device=y.device
    )
    kernel = maximum_backward_kernel if maximum else gather_backward_kernel
    with guard(y):
        kernel[(programs, triton.cdiv(c, bc), n)](
            dout,
            y,
            y if plain is None else plain,
            dy,
            partials,
            *tensors,
            *numbers,
            first,
            iters,
            BS=bs,
            BC=bc,
            num_warps=NUM_WARPS,
            **constants,
        )
        return dy, None if plain is None else coef_grad(partials, plain)
