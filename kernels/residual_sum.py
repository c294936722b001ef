"""The sum of two channels-last maps [N, S, C] and its activation, in one pass each way.

    v = outer(M(y; coef, act) + M(other; other_coef); slope),    one of act and outer is none

M is the affine of ``pointwise.apply``. Coefficients that are absent mean M(y) = y.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import (
    ACT_CODES,
    activate,
    activate_grad,
    activate_slope_grad,
    add_affine_grad,
    affine,
    cdiv,
    channels_last,
    guard,
    load_coef,
    loop,
    power_of_two,
    row_sum,
    sum_affine_grad,
)
from .pointwise import NUM_WARPS, blocks

SUMS = tl.constexpr(6)
"""Per channel: dv(h - q), dv, dz(y - p), dz, dslope, and the gradient at M(other) times (other - p)."""


@triton.jit
def _linear(coef_ptr, n, channel, cmask, N, C):
    """Scale, pivot and offset [BC] of a map without activation."""
    if coef_ptr is None:
        zero = channel.to(tl.float32) * 0.0
        scale, pivot, offset = zero + 1.0, zero, zero
    else:
        a, b, g, s, p, q, _slope = load_coef(coef_ptr, n, channel, cmask, N, C)
        scale, pivot, offset = g * a, p, g * (b - q) + s
    return scale, pivot, offset


@triton.jit
def _row(ptr, channel, cmask):
    """One number a channel [BC]; 0 where there are none."""
    if ptr is None:  # noqa: SIM108 (a branch of the compiler's, not a value)
        found = channel.to(tl.float32) * 0.0
    else:
        found = tl.load(ptr + channel, mask=cmask, other=0.0)
    return found


@triton.jit
def residual_kernel(
    y_ptr,
    coef_ptr,
    other_ptr,
    other_coef_ptr,
    slope_ptr,
    v_ptr,
    S,
    N,
    C,
    INSIDE: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    voxel = tl.program_id(0).to(tl.int64) * BS + tl.arange(0, BS)
    at = (n * S + voxel)[:, None] * C + channel[None, :]
    mask = (voxel < S)[:, None] & cmask[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale2, pivot2, offset2 = _linear(other_coef_ptr, n, channel, cmask, N, C)
    r = scale2[None, :] * (other - pivot2[None, :])
    if INSIDE:
        scale, pivot, offset = _linear(coef_ptr, n, channel, cmask, N, C)
        z = scale[None, :] * (y - pivot[None, :]) + (offset + offset2)[None, :] + r
        v = activate(z, _row(slope_ptr, channel, cmask)[None, :], ACT)
    else:
        a, b, g, s, p, q, slope = load_coef(coef_ptr, n, channel, cmask, N, C)
        v = affine(y, a, b, g, s + offset2, p, q, slope, ACT) + r
    tl.store(v_ptr + at, v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def residual_backward_kernel(
    dv_ptr,
    y_ptr,
    coef_ptr,
    other_ptr,
    other_coef_ptr,
    slope_ptr,
    dy_ptr,
    dother_ptr,
    part_ptr,
    S,
    N,
    C,
    iters,
    INSIDE: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    cmask = channel < C
    scale2, pivot2, offset2 = _linear(other_coef_ptr, n, channel, cmask, N, C)
    if INSIDE:
        a, p, b = _linear(coef_ptr, n, channel, cmask, N, C)
        b += offset2
        slope = _row(slope_ptr, channel, cmask)
    else:
        a, b, g, _s, p, q, slope = load_coef(coef_ptr, n, channel, cmask, N, C)
    dg = tl.zeros((BS, BC), tl.float32)
    ds, da, db, dslope, da2 = dg, dg, dg, dg, dg
    for i in loop(iters):
        voxel = (t.to(tl.int64) * iters + i) * BS + tl.arange(0, BS)
        at = (n * S + voxel)[:, None] * C + channel[None, :]
        mask = (voxel < S)[:, None] & cmask[None, :]
        # a masked element has dv = 0 and sits on its pivot, so it adds nothing to any sum
        y = tl.where(mask, tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32), p[None, :])
        dv = tl.load(dv_ptr + at, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
        centred2 = tl.where(mask, other - pivot2[None, :], 0.0)
        if INSIDE:
            centred = y - p[None, :]
            z = a[None, :] * centred + b[None, :] + scale2[None, :] * centred2
            dr = dv * activate_grad(z, slope[None, :], ACT)
            dy = dr * a[None, :]
            da += dr * centred
            db += dr
            dslope += dv * activate_slope_grad(z, ACT)
        else:
            dr = dv
            dy, dg, ds, da, db, dslope = add_affine_grad(
                dv, y, a, b, g, p, q, slope, dg, ds, da, db, dslope, ACT
            )
        da2 += dr * centred2
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        if dother_ptr is not None:
            dother = (dr * scale2[None, :]).to(dother_ptr.dtype.element_ty)
            tl.store(dother_ptr + at, dother, mask=mask)
    if INSIDE:
        da_all, db_all, dslope_all = row_sum(da), row_sum(db), row_sum(dslope)
        dg_all, ds_all = tl.zeros_like(da_all), tl.zeros_like(da_all)
    else:
        dg_all, ds_all, da_all, db_all, dslope_all = sum_affine_grad(
            a, b, g, q, dg, ds, da, db, dslope, ACT
        )
    base = part_ptr + (n * tl.num_programs(0) + t) * SUMS * C + channel
    tl.store(base, dg_all, mask=cmask)
    tl.store(base + C, ds_all, mask=cmask)
    tl.store(base + 2 * C, da_all, mask=cmask)
    tl.store(base + 3 * C, db_all, mask=cmask)
    tl.store(base + 4 * C, dslope_all, mask=cmask)
    tl.store(base + 5 * C, row_sum(da2), mask=cmask)


@triton.jit
def _store(out_ptr, coef_ptr, at, row, mask, sum_v, sum_vy):
    """Gradient of the coefficients of a map without activation, from the sums of dm and dm(y - p)."""
    a = tl.load(coef_ptr + at, mask=mask, other=0.0)
    b = tl.load(coef_ptr + at + row, mask=mask, other=0.0)
    g = tl.load(coef_ptr + at + 2 * row, mask=mask, other=0.0)
    q = tl.load(coef_ptr + at + 5 * row, mask=mask, other=0.0)
    tl.store(out_ptr + at, (g * sum_vy).to(tl.float32), mask=mask)
    tl.store(out_ptr + at + row, (g * sum_v).to(tl.float32), mask=mask)
    tl.store(out_ptr + at + 2 * row, (a * sum_vy + (b - q) * sum_v).to(tl.float32), mask=mask)
    tl.store(out_ptr + at + 3 * row, sum_v.to(tl.float32), mask=mask)
    tl.store(out_ptr + at + 4 * row, (-g * a * sum_v).to(tl.float32), mask=mask)
    tl.store(out_ptr + at + 5 * row, (-g * sum_v).to(tl.float32), mask=mask)
    tl.store(out_ptr + at + 6 * row, a * 0.0, mask=mask)


@triton.jit
def residual_grad_kernel(
    part_ptr,
    coef_ptr,
    other_coef_ptr,
    dcoef_ptr,
    dother_coef_ptr,
    dslope_ptr,
    T,
    N,
    C,
    INSIDE: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Partial sums [N, T, 6, C] -> gradients of both coefficients [7, N, C] and of the slope [N, C]."""
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = channel < C
    base = part_ptr + n * T * SUMS * C + channel[None, :]
    dg = tl.zeros((BC,), tl.float64)
    ds = tl.zeros((BC,), tl.float64)
    da = tl.zeros((BC,), tl.float64)
    db = tl.zeros((BC,), tl.float64)
    dslope = tl.zeros((BC,), tl.float64)
    da2 = tl.zeros((BC,), tl.float64)
    for t0 in loop(0, T, BT):
        t = t0 + tl.arange(0, BT)
        m = (t < T)[:, None] & mask[None, :]
        at = base + (t.to(tl.int64) * SUMS * C)[:, None]
        dg += tl.sum(tl.load(at, mask=m, other=0.0).to(tl.float64), axis=0)
        ds += tl.sum(tl.load(at + C, mask=m, other=0.0).to(tl.float64), axis=0)
        da += tl.sum(tl.load(at + 2 * C, mask=m, other=0.0).to(tl.float64), axis=0)
        db += tl.sum(tl.load(at + 3 * C, mask=m, other=0.0).to(tl.float64), axis=0)
        dslope += tl.sum(tl.load(at + 4 * C, mask=m, other=0.0).to(tl.float64), axis=0)
        da2 += tl.sum(tl.load(at + 5 * C, mask=m, other=0.0).to(tl.float64), axis=0)
    row, at_n = N * C, n * C + channel
    if dcoef_ptr is not None:
        if INSIDE:
            _store(dcoef_ptr, coef_ptr, at_n, row, mask, db, da)
        else:
            a = tl.load(coef_ptr + at_n, mask=mask, other=0.0)
            g = tl.load(coef_ptr + at_n + 2 * row, mask=mask, other=0.0)
            out = dcoef_ptr + at_n
            tl.store(out, da.to(tl.float32), mask=mask)
            tl.store(out + row, db.to(tl.float32), mask=mask)
            tl.store(out + 2 * row, dg.to(tl.float32), mask=mask)
            tl.store(out + 3 * row, ds.to(tl.float32), mask=mask)
            tl.store(out + 4 * row, (-a * db).to(tl.float32), mask=mask)
            tl.store(out + 5 * row, (-g * ds).to(tl.float32), mask=mask)
            tl.store(out + 6 * row, dslope.to(tl.float32), mask=mask)
    if dother_coef_ptr is not None:
        total = db if INSIDE else ds
        _store(dother_coef_ptr, other_coef_ptr, at_n, row, mask, total, da2)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + at_n, dslope.to(tl.float32), mask=mask)


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _code(act: str, outer: str) -> int:
    return ACT_CODES[outer if act == "none" else act]


def residual(
    y: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    other: torch.Tensor,
    other_coef: torch.Tensor | None,
    slope: torch.Tensor | None,
    outer: str,
) -> torch.Tensor:
    """v [N, C, *S] of y and other, channels-last of one dtype; coefficients [7, N, C], slope [C], float32."""
    v = channels_last(tuple(y.shape), y)
    n, channels, space = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    bs, bc, _, programs = blocks(space, channels, n, reduces=True)
    with guard(y):
        residual_kernel[(programs, cdiv(channels, bc), n)](
            y,
            _dense(coef),
            other,
            _dense(other_coef),
            _dense(slope),
            v,
            space,
            n,
            channels,
            INSIDE=act == "none",
            ACT=_code(act, outer),
            BS=bs,
            BC=bc,
            num_warps=NUM_WARPS,
        )
    return v


def residual_backward(
    dv: torch.Tensor,
    y: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    other: torch.Tensor,
    other_coef: torch.Tensor | None,
    slope: torch.Tensor | None,
    outer: str,
    at_other: bool = True,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``residual`` at y, coef, other (None unless ``at_other``), other_coef and slope."""
    dy = channels_last(tuple(y.shape), y)
    dother = channels_last(tuple(y.shape), y) if at_other else None
    n, channels, space = y.shape[0], y.shape[1], math.prod(y.shape[2:])
    bs, bc, iters, programs = blocks(space, channels, n, reduces=True)
    coef, other_coef, slope = _dense(coef), _dense(other_coef), _dense(slope)
    dcoef, dother_coef = (None if c is None else torch.empty_like(c) for c in (coef, other_coef))
    dslope = None if slope is None else slope.new_empty((n, channels))
    partials = torch.empty((n, programs, 6, channels), dtype=torch.float32, device=y.device)
    inside, block = act == "none", power_of_two(channels, 1, 32)
    with guard(y):
        residual_backward_kernel[(programs, cdiv(channels, bc), n)](
            dv,
            y,
            coef,
            other,
            other_coef,
            slope,
            dy,
            dother,
            partials,
            space,
            n,
            channels,
            iters,
            INSIDE=inside,
            ACT=_code(act, outer),
            BS=bs,
            BC=bc,
            num_warps=NUM_WARPS,
        )
        residual_grad_kernel[(n, cdiv(channels, block))](
            partials,
            coef,
            other_coef,
            dcoef,
            dother_coef,
            dslope,
            programs,
            n,
            channels,
            INSIDE=inside,
            BT=64,
            BC=block,
        )
    return dy, dcoef, dother, dother_coef, None if dslope is None else dslope.sum(0)
