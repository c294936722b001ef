"""The sum at the end of a residual block, two feature maps [N, S, C], and its activation: one pass each way.

    v = outer(M(y; coef, act) + M(other; other_coef); slope),    one of act and outer is none

M is the affine of ``pointwise.apply``. Coefficients that are absent mean M(y) = y.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    activate,
    activate_grad,
    activate_slope_grad,
    add_affine_grad,
    add_slots,
    affine,
    block_of_map,
    cdiv,
    channels_last,
    dense,
    guard,
    load_coef,
    loop,
    power_of_two,
    row_or,
    row_sum,
    sample_and_channels,
    scratch,
    store_coef_grad,
    store_rows,
    total_sums,
)
from .pointwise import divide

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
    n, channel, cmask = sample_and_channels(C, BC)
    at, mask = block_of_map(n, tl.program_id(0).to(tl.int64), channel, cmask, S, C, BS)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
    scale2, pivot2, offset2 = _linear(other_coef_ptr, n, channel, cmask, N, C)
    r = scale2[None, :] * (other - pivot2[None, :])
    if INSIDE:
        scale, pivot, offset = _linear(coef_ptr, n, channel, cmask, N, C)
        z = scale[None, :] * (y - pivot[None, :]) + (offset + offset2)[None, :] + r
        v = activate(z, row_or(slope_ptr, channel, cmask, 0.0)[None, :], ACT)
    else:
        a, b, g, s, p, q, slope = load_coef(coef_ptr, n, channel, cmask, N, C)
        v = affine(y, (a, b, g, s + offset2, p, q, slope), ACT) + r
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
    n, channel, cmask = sample_and_channels(C, BC)
    t = tl.program_id(0)
    scale2, pivot2, offset2 = _linear(other_coef_ptr, n, channel, cmask, N, C)
    if INSIDE:
        scale, pivot, offset = _linear(coef_ptr, n, channel, cmask, N, C)
        offset += offset2
        slope = row_or(slope_ptr, channel, cmask, 0.0)
    else:
        coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
        pivot = coefs[4]
    none = tl.zeros((BS, BC), tl.float32)
    da2, sums = none, (none, none, none, none, none)
    for i in loop(iters):
        at, mask = block_of_map(n, t.to(tl.int64) * iters + i, channel, cmask, S, C, BS)
        # a masked element has dv = 0 and sits on its pivot, so it adds nothing to any sum
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.where(mask, y, pivot[None, :])
        dv = tl.load(dv_ptr + at, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
        centred2 = tl.where(mask, other - pivot2[None, :], 0.0)
        if INSIDE:
            dg, ds, da, db, dslope = sums
            centred = y - pivot[None, :]
            z = scale[None, :] * centred + offset[None, :] + scale2[None, :] * centred2
            dr = dv * activate_grad(z, slope[None, :], ACT)
            dy = dr * scale[None, :]
            da += dr * centred
            db += dr
            dslope += dv * activate_slope_grad(z, ACT)
            sums = (dg, ds, da, db, dslope)
        else:
            dr = dv
            dy, sums = add_affine_grad(dv, y, coefs, sums, ACT)
        da2 += dr * centred2
        tl.store(dy_ptr + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
        if dother_ptr is not None:
            dother = (dr * scale2[None, :]).to(dother_ptr.dtype.element_ty)
            tl.store(dother_ptr + at, dother, mask=mask)
    if INSIDE:
        _dg, _ds, da, db, dslope = sums
        da_all, db_all, dslope_all = row_sum(da), row_sum(db), row_sum(dslope)
        dg_all, ds_all = tl.zeros_like(da_all), tl.zeros_like(da_all)
    else:
        dg_all, ds_all, da_all, db_all, dslope_all = total_sums(coefs, sums, ACT)
    base = part_ptr + (n * tl.num_programs(0) + t) * SUMS * C + channel
    store_rows(base, C, cmask, (dg_all, ds_all, da_all, db_all, dslope_all, row_sum(da2)))


@triton.jit
def _store(out_ptr, coef_ptr, at, row, mask, sum_v, sum_vy):
    """Gradient of the coefficients of a map without activation, from the sums of dm and dm(y - p)."""
    a = tl.load(coef_ptr + at, mask=mask, other=0.0)
    b = tl.load(coef_ptr + at + row, mask=mask, other=0.0)
    g = tl.load(coef_ptr + at + 2 * row, mask=mask, other=0.0)
    q = tl.load(coef_ptr + at + 5 * row, mask=mask, other=0.0)
    at_g = a * sum_vy + (b - q) * sum_v
    rows = (g * sum_vy, g * sum_v, at_g, sum_v, -g * a * sum_v, -g * sum_v, a * 0.0)
    store_rows(out_ptr + at, row, mask, rows)


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
    totals, da2 = add_slots(part_ptr + n * T * SUMS * C + channel, T, C, mask, SUMS, BT, BC)
    _dg, ds, da, db, dslope = totals
    row, at = N * C, n * C + channel
    if dcoef_ptr is not None:
        if INSIDE:
            _store(dcoef_ptr, coef_ptr, at, row, mask, db, da)
        else:
            store_coef_grad(dcoef_ptr, coef_ptr, at, row, mask, totals)
    if dother_coef_ptr is not None:
        total = db if INSIDE else ds
        _store(dother_coef_ptr, other_coef_ptr, at, row, mask, total, da2)
    if dslope_ptr is not None:
        tl.store(dslope_ptr + at, dslope.to(tl.float32), mask=mask)


def residual(addends: Any) -> torch.Tensor:
    """v [N, C, *S], channels-last.

    Args:
        addends: y, coef, act, other, other_coef, slope, outer (see ``fastfilm.ops.spec.Addends``): y and other
            channels-last of one dtype, coefficients [7, N, C] and slope [C] float32.
    """
    y, coef, act, other, other_coef, slope, outer = addends
    v = channels_last(y.shape, y)
    d = divide(y, outer if act == "none" else act, reduces=True)
    # a program takes one block here, however many the gradient's take
    programs = cdiv(d.sizes[0], d.constants["BS"])
    with guard(y):
        residual_kernel[(programs, *d.grid[1:])](
            *(y, dense(coef), other, dense(other_coef), dense(slope), v, *d.sizes),
            INSIDE=act == "none",
            **d.constants,
        )
    return v


def residual_backward(
    dv: torch.Tensor, addends: Any, at_other: bool = True
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``residual`` at y, coef, other (None unless ``at_other``), other_coef and slope."""
    y, coef, act, other, other_coef, slope, outer = addends
    dy = channels_last(y.shape, y)
    dother = channels_last(y.shape, y) if at_other else None
    d = divide(y, outer if act == "none" else act, reduces=True)
    coef, other_coef, slope = dense(coef), dense(other_coef), dense(slope)
    dcoef, dother_coef = (None if c is None else torch.empty_like(c) for c in (coef, other_coef))
    _, n, channels = d.sizes
    dslope = None if slope is None else slope.new_empty((n, channels))
    partials = scratch(y, n, d.programs, 6, channels)
    inside, block = act == "none", power_of_two(channels, 1, 32)
    with guard(y):
        residual_backward_kernel[d.grid](
            *(dv, y, coef, other, other_coef, slope, dy, dother, partials, *d.sizes, d.iters),
            INSIDE=inside,
            **d.constants,
        )
        residual_grad_kernel[(n, cdiv(channels, block))](
            *(partials, coef, other_coef, dcoef, dother_coef, dslope, d.programs, n, channels),
            INSIDE=inside,
            BT=64,
            BC=block,
        )
    return dy, dcoef, dother, dother_coef, None if dslope is None else dslope.sum(0)
