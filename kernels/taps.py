"""Pooling, resizing and concatenation of feature maps in one pass that also applies norm, FiLM and activation.

The result is written into some channels of a wider map.

Along each axis a position of the result has up to T taps: an index into the map and a weight, padded with weight
0. The result is the weighted sum, or the maximum, over all combinations. The gradient comes back in one pass as
well, through the affine and with its sums: by the transposed taps, or to the first of a window's largest elements.

A block of positions lies in one line of the map, so that the taps of depth and height are the same for all of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    dense,
    guard,
    load_coef,
    loop,
    power_of_two,
    sample_and_channels,
    scratch,
    store_sums,
)
from .pointwise import NUM_WARPS, blocks_of_a_program

Taps = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Per axis (depth, height, width; one position deep in 2D): index int32 and weight float32, [positions, T]."""


@triton.jit
def _tap(index_ptr, weight_ptr, position, t, inside, T: tl.constexpr):
    """Index and weight of tap ``t`` of positions, or of one position."""
    at = position * T + t
    return (
        tl.load(index_ptr + at, mask=inside, other=0),
        tl.load(weight_ptr + at, mask=inside, other=0.0),
    )


@triton.jit
def _line(number, lines, width, BS: tl.constexpr):
    """Of block ``number``: its line and whether there is such, its columns, and which of these there are."""
    across = tl.cdiv(width, BS)
    line = number // across
    column = (number % across) * BS + tl.arange(0, BS)
    return line, line < lines, column, column < tl.where(line < lines, width, 0)


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
    UZ: tl.constexpr,
    UY: tl.constexpr,
    UX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Map [N, S, C] -> channels first .. first + C of [N, SO, K]; S = D * H * W."""
    n, channel, cmask = sample_and_channels(C, BC)
    if HAS_COEF:
        coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
    line, there, column, inside = _line(tl.program_id(0), SO // WO, WO, BS)
    z, row = line // HO, line % HO
    # behind a sum, an affine alone is applied once: it needs the sum of the weights
    ONCE: tl.constexpr = HAS_COEF and (ACT == 0) and not MAXIMUM
    found = tl.zeros((BS, BC), tl.float32)
    weights = tl.zeros((BS,), tl.float32)
    if MAXIMUM:
        found = found - float("inf")
    for tx in tl.range(0, TX, loop_unroll_factor=UX):
        ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
        part = tl.zeros((BS, BC), tl.float32)
        weight = 0.0
        for tz in tl.range(0, TZ, loop_unroll_factor=UZ):
            az, vz = _tap(iz_ptr, wz_ptr, z, tz, there, TZ)
            for ty in tl.range(0, TY, loop_unroll_factor=UY):
                ay, vy = _tap(iy_ptr, wy_ptr, row, ty, there, TY)
                used = (inside & (vz * vy * vx != 0.0))[:, None] & cmask[None, :]
                start = (n * S + (az * H + ay).to(tl.int64) * W) * C
                at = ax[:, None] * C + channel[None, :]
                y = tl.load(y_ptr + start + at, mask=used, other=0.0).to(tl.float32)
                if ONCE:
                    part += vz * vy * (y - coefs[4][None, :])
                    weight += vz * vy
                else:
                    v = affine(y, coefs, ACT) if HAS_COEF else y
                    # the value that a written map would hold
                    v = v.to(out_ptr.dtype.element_ty).to(tl.float32)
                    if MAXIMUM:
                        found = tl.where(used & ((v > found) | (v != v)), v, found)
                    else:
                        part += tl.where(used, vz * vy * v, 0.0)
        found += vx[:, None] * part
        weights += vx * weight
    if ONCE:
        a, b, g, s, _p, q, _slope = coefs
        offset = (g * (b - q) + s)[None, :] * weights[:, None]
        found = (g * a)[None, :] * found + offset
    start = (n * SO + line.to(tl.int64) * WO) * K + first
    mask = inside[:, None] & cmask[None, :]
    out = out_ptr + start + (column[:, None] * K + channel[None, :])
    tl.store(out, found.to(out_ptr.dtype.element_ty), mask=mask)


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
    UZ: tl.constexpr,
    UY: tl.constexpr,
    UX: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of the weighted sum at y; the taps are the transposed ones."""
    n, channel, cmask = sample_and_channels(C, BC)
    program = tl.program_id(0)
    if HAS_COEF:
        coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
    none = tl.zeros((BS, BC), tl.float32)
    sums = (none, none, none, none, none)
    for i in loop(iters):
        line, there, column, inside = _line(program * iters + i, S // W, W, BS)
        z, row = line // H, line % H
        dv = tl.zeros((BS, BC), tl.float32)
        for tx in tl.range(0, TX, loop_unroll_factor=UX):
            ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
            part = tl.zeros((BS, BC), tl.float32)
            for tz in tl.range(0, TZ, loop_unroll_factor=UZ):
                az, vz = _tap(iz_ptr, wz_ptr, z, tz, there, TZ)
                for ty in tl.range(0, TY, loop_unroll_factor=UY):
                    ay, vy = _tap(iy_ptr, wy_ptr, row, ty, there, TY)
                    used = (inside & (vz * vy * vx != 0.0))[:, None] & cmask[None, :]
                    start = (n * SO + (az * HO + ay).to(tl.int64) * WO) * K + first
                    at = ax[:, None] * K + channel[None, :]
                    d = tl.load(dout_ptr + start + at, mask=used, other=0.0)
                    part += vz * vy * d.to(tl.float32)
            dv += vx[:, None] * part
        start = (n * S + line.to(tl.int64) * W) * C
        at = column[:, None] * C + channel[None, :]
        mask = inside[:, None] & cmask[None, :]
        dy = dv
        if HAS_COEF:
            y = tl.load(y_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
            y = tl.where(mask, y, coefs[4][None, :])
            dy, sums = add_affine_grad(dv, y, coefs, sums, ACT)
        tl.store(dy_ptr + start + at, dy.to(dy_ptr.dtype.element_ty), mask=mask)
    if HAS_COEF:
        slot = n * tl.num_programs(0) + program
        store_sums(part_ptr, slot, channel, cmask, C, coefs, sums, ACT)


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
    UZ: tl.constexpr,
    UY: tl.constexpr,
    UX: tl.constexpr,
    HAS_COEF: tl.constexpr,
    ACT: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradient of the maximum at y, which is zero before; windows must not overlap."""
    n, channel, cmask = sample_and_channels(C, BC)
    program = tl.program_id(0)
    if HAS_COEF:
        coefs = load_coef(coef_ptr, n, channel, cmask, N, C)
    none = tl.zeros((BS, BC), tl.float32)
    sums = (none, none, none, none, none)
    for i in loop(iters):
        line, there, column, inside = _line(program * iters + i, SO // WO, WO, BS)
        z, row = line // HO, line % HO
        best = tl.zeros((BS, BC), tl.float32) - float("inf")
        where = tl.zeros((BS, BC), tl.int32)
        for tz in tl.range(0, TZ, loop_unroll_factor=UZ):
            az, vz = _tap(iz_ptr, wz_ptr, z, tz, there, TZ)
            for ty in tl.range(0, TY, loop_unroll_factor=UY):
                ay, vy = _tap(iy_ptr, wy_ptr, row, ty, there, TY)
                start = (n * S + (az * H + ay).to(tl.int64) * W) * C
                for tx in tl.range(0, TX, loop_unroll_factor=UX):
                    ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
                    used = (inside & (vz * vy * vx != 0.0))[:, None] & cmask[None, :]
                    at = ax[:, None] * C + channel[None, :]
                    y = tl.load(y_ptr + start + at, mask=used, other=0.0).to(tl.float32)
                    v = affine(y, coefs, ACT) if HAS_COEF else y
                    v = v.to(y_ptr.dtype.element_ty).to(tl.float32)
                    larger = used & ((v > best) | (v != v))
                    best = tl.where(larger, v, best)
                    where = tl.where(larger, (tz * TY + ty) * TX + tx, where)
        start = (n * SO + line.to(tl.int64) * WO) * K + first
        mask = inside[:, None] & cmask[None, :]
        at = column[:, None] * K + channel[None, :]
        d = tl.load(dout_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
        for tz in tl.range(0, TZ, loop_unroll_factor=UZ):
            az, vz = _tap(iz_ptr, wz_ptr, z, tz, there, TZ)
            for ty in tl.range(0, TY, loop_unroll_factor=UY):
                ay, vy = _tap(iy_ptr, wy_ptr, row, ty, there, TY)
                start = (n * S + (az * H + ay).to(tl.int64) * W) * C
                for tx in tl.range(0, TX, loop_unroll_factor=UX):
                    ax, vx = _tap(ix_ptr, wx_ptr, column, tx, inside, TX)
                    used = (inside & (vz * vy * vx != 0.0))[:, None] & cmask[None, :]
                    at = ax[:, None] * C + channel[None, :]
                    dv = tl.where(used & (where == (tz * TY + ty) * TX + tx), d, 0.0)
                    dy = dv
                    if HAS_COEF:
                        y = tl.load(y_ptr + start + at, mask=used, other=0.0).to(tl.float32)
                        y = tl.where(used, y, coefs[4][None, :])
                        dy, sums = add_affine_grad(dv, y, coefs, sums, ACT)
                    tl.store(dy_ptr + start + at, dy.to(dy_ptr.dtype.element_ty), mask=used)
    if HAS_COEF:
        slot = n * tl.num_programs(0) + program
        store_sums(part_ptr, slot, channel, cmask, C, coefs, sums, ACT)


class Form(NamedTuple):
    """How a kernel is launched: elements of a block [BS, BC], taps that are read at the same time, warps."""

    elements: int
    loads: int
    warps: int

    def unrolled(self, tz: int, ty: int, tx: int) -> dict[str, int]:
        """How often the loop over each axis' taps is unrolled: the inner ones first."""
        left, found = self.loads, {}
        for name, taps in (("UY", ty), ("UZ", tz), ("UX", tx)):
            found[name] = taps if taps <= left else 1
            left = left // taps if taps <= left else 1
        return found


FORMS = {
    "gather": Form(2048, 8, NUM_WARPS),
    "gather_backward": Form(2048, 8, 2 * NUM_WARPS),
    # the elements of a window need registers, too
    "maximum_backward": Form(1024, 4, NUM_WARPS),
}


@functools.lru_cache(maxsize=4096)
def blocks(
    size: Sequence[int], channels: int, batch: int, elements: int
) -> tuple[int, int, int, int]:
    """(BS, BC, blocks per program, programs per sample) for positions ``size``, a block in one line."""
    width, lines = size[-1], math.prod(size[:-1])
    bc = power_of_two(channels, 1, 128)
    bs = power_of_two(width, 1, elements // bc)
    total = lines * cdiv(width, bs)
    iters = blocks_of_a_program(total, batch)
    return bs, bc, iters, cdiv(total, iters)


def _arguments(
    form: Form,
    y: torch.Tensor,
    coef: torch.Tensor | None,
    act: str,
    taps: Taps,
    wider: torch.Tensor,
    block: tuple[int, int],
) -> tuple[list[Any], dict[str, Any]]:
    """Tap tensors and sizes, and constants of a launch; ``wider`` is the map of the result, ``block`` (BS, BC)."""
    (n, c, *size), (_, k, *out) = y.shape, wider.shape
    sizes = [math.prod(size), *size[-2:], math.prod(out), *out[-2:], n, c, k]
    constants = {f"T{axis}": taps[i][0].shape[1] for i, axis in enumerate("ZYX")}
    constants |= form.unrolled(*constants.values())
    constants |= {"HAS_COEF": coef is not None, "ACT": ACT_CODES[act]}
    constants |= {"BS": block[0], "BC": block[1], "num_warps": form.warps}
    return [*(t for pair in taps for t in pair), *sizes], constants


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
    form, size = FORMS["gather"], out.shape[2:]
    n, c = y.shape[:2]
    bs, bc, *_ = blocks(size, c, n, form.elements)
    programs = math.prod(size[:-1]) * cdiv(size[-1], bs)
    given, constants = _arguments(form, y, coef, act, taps, out, (bs, bc))
    with guard(y):
        gather_kernel[(programs, cdiv(c, bc), n)](
            y, dense(coef, y), out, *given, first, MAXIMUM=maximum, **constants
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
    form = FORMS["maximum_backward" if maximum else "gather_backward"]
    n, c = y.shape[:2]
    dy = channels_last(y.shape, y)
    if maximum:
        dy.zero_()  # windows need not cover every position
    size = dout.shape[2:] if maximum else y.shape[2:]
    bs, bc, iters, programs = blocks(size, c, n, form.elements)
    given, constants = _arguments(form, y, coef, act, taps, dout, (bs, bc))
    coef = dense(coef)
    partials = scratch(y, n, programs, 5, 0 if coef is None else c)
    kernel = maximum_backward_kernel if maximum else gather_backward_kernel
    with guard(y):
        kernel[(programs, cdiv(c, bc), n)](
            dout, y, dense(coef, y), dy, partials, *given, first, iters, **constants
        )
        return dy, None if coef is None else coef_grad(partials, coef)
