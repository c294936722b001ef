"""Functions that the Triton kernels of this folder share.

For kernels: activations and their gradients, the affine v = g * (act(a * (y - p) + b) - q) + s of a feature map,
and sums over a map. For launchers: memory, and the kernels that add up partial sums.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
import triton.language as tl

ACT_CODES = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "prelu": 2,
    "elu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
}

COLUMNS, WARPS = 8, 8
"""Channels (32 bytes of a row) and warps of a program that adds up partial results."""

SLOTS, SHARE = 1056, 128
"""Partial results of a sample that one stage adds up at most, and that one program of a stage before it does."""

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

ADDS_IN_ROWS = tl.constexpr(INTERPRETED)
"""Whether ``tl.sum`` adds row after row (numpy, interpreted) and not as a tree (a GPU)."""


def _interpreted_loop(*bounds: Any, num_stages: int = 1) -> range:
    """``range`` over scalars of Triton's interpreter, which holds them as arrays [1].

    Triton 3.6 makes an index of one by ``int(array)``, which NumPy refuses from 2.4 on.
    """
    return range(*(b.handle.data.item() if isinstance(b, tl.tensor) else int(b) for b in bounds))


loop = _interpreted_loop if INTERPRETED else tl.range
"""``range`` in a kernel where a bound is known at run time only."""


def guard(t: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one for a launch; nothing where it is, and on the CPU."""
    if t.is_cuda and t.device.index != torch.cuda.current_device():
        return torch.cuda.device(t.device)
    return contextlib.nullcontext()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own function takes many times as long on the host."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """Precision of a float32 dot: IEEE unless PyTorch's own convolutions may use tf32."""
    if dtype != torch.float32:
        return "ieee"
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        # after a caller has set PyTorch's newer, finer flags, this one cannot be read
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def architecture(t: torch.Tensor) -> int:
    """Target whose tiles fit the tensor's GPU: 80, 90 or 100 (80 for other Ampere-like instruction sets)."""
    if not t.is_cuda:
        return 90
    major = torch.cuda.get_device_capability(t.device)[0]
    return {9: 90, 10: 100}.get(major, 80)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two that is >= n, kept within [low, high]."""
    return max(low, min(high, 1 << max(n - 1, 0).bit_length()))


def layout(dims: int) -> torch.memory_format:
    """The channels-last layout of a tensor with 4 or 5 dimensions."""
    return torch.channels_last if dims == 4 else torch.channels_last_3d


def channels_last(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Uninitialised channels-last map of ``shape`` in ``like``'s dtype."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=layout(len(shape))
    )


def scratch(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Uninitialised float32 [*shape] on ``like``'s device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def dense(t: torch.Tensor | None, absent: torch.Tensor | None = None) -> torch.Tensor | None:
    """``t`` contiguous; ``absent``, which a kernel does not read, where there is none."""
    return absent if t is None else t.contiguous()


# a default value: with a global in a function that kernels call, Triton 3.6 makes their cache keys depend on
# which kernel came first in the process
@triton.jit
def row_sum(x, IN_ROWS: tl.constexpr = ADDS_IN_ROWS):
    """Sum over rows [R, BC] -> [BC]; interpreted, float64 stands in for the GPU's tree."""
    if IN_ROWS:  # noqa: SIM108 (a branch of the compiler's, not a value)
        total = tl.sum(x.to(tl.float64), axis=0).to(tl.float32)
    else:
        total = tl.sum(x, axis=0)
    return total


@triton.jit
def _expm1(z):
    # Kahan: (u - 1) * z / log(u) has no cancellation where u = exp(z) is near 1
    u = tl.exp(z)
    d = u - 1.0
    near = d * (z / tl.log(tl.where(d == 0.0, 2.0, u)))
    return tl.where(d == 0.0, z, tl.where(d == -1.0, -1.0, near))


@triton.jit
def _tanh(z):
    return 2.0 * tl.sigmoid(2.0 * z) - 1.0


@triton.jit
def activate(z, slope, ACT: tl.constexpr):
    """act(z); NaN stays NaN."""
    if ACT == 1:
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACT == 2:
        z = tl.where(z > 0.0, z, z * slope)
    elif ACT == 3:
        z = tl.where(z > 0.0, z, slope * _expm1(tl.minimum(z, 0.0)))
    elif ACT == 4:
        z = z * tl.sigmoid(z)
    elif ACT == 5:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == 6:
        z = 0.5 * z * (1.0 + _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    return z


@triton.jit
def activate_grad(z, slope, ACT: tl.constexpr):
    """act'(z), of z's shape."""
    if ACT == 0:
        d = z * 0.0 + 1.0
    elif ACT == 1:
        d = tl.where(z > 0.0, 1.0, 0.0)
    elif ACT == 2:
        d = tl.where(z > 0.0, 1.0, z * 0.0 + slope)
    elif ACT == 3:
        d = tl.where(z > 0.0, 1.0, slope * tl.exp(tl.minimum(z, 0.0)))
    elif ACT == 4:
        k = tl.sigmoid(z)
        d = k * (1.0 + z * (1.0 - k))
    elif ACT == 5:
        d = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(
            -0.5 * z * z
        )
    else:
        tl.static_assert(ACT == 6, "no derivative for this activation")
        t = _tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        d = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.7978845608028654 * (
            1.0 + 0.134145 * z * z
        )
    return d


@triton.jit
def activate_slope_grad(z, ACT: tl.constexpr):
    """d act / d slope: z where it is negative (leaky), exp(z) - 1 there (elu)."""
    if ACT == 2:
        d = tl.where(z > 0.0, 0.0, z)
    elif ACT == 3:
        d = tl.where(z > 0.0, 0.0, _expm1(tl.minimum(z, 0.0)))
    else:
        d = z * 0.0
    return d


@triton.jit
def dithered(x, at, dtype: tl.constexpr):
    """x in a 16-bit type: the value above or below, each with the probability that keeps the mean.

    ``at``, a number of each element's own, takes the place of chance. To the nearest, the sum of a value of this
    type and of less than half its last place would always be the value itself: a small gradient that all places
    of a map have in common would vanish, though the sum over the map is made of it.
    """
    if (dtype == tl.bfloat16) or (dtype == tl.float16):
        LOST: tl.constexpr = 16 if dtype == tl.bfloat16 else 13
        h = at.to(tl.uint32) * 0x9E3779B1
        h = (h ^ (h >> 15)) * 0x2C1B3C6D
        bits = x.to(tl.uint32, bitcast=True) + (h >> (32 - LOST))
        found = ((bits >> LOST) << LOST).to(tl.float32, bitcast=True)
        x = tl.where(x != x, x, found)
    return x.to(dtype)


@triton.jit
def row_or(ptr, at, mask, absent):
    """Numbers at ``at`` as float32; ``absent`` where there is no tensor."""
    if ptr is None:
        row = (at * 0).to(tl.float32) + absent
    else:
        row = tl.load(ptr + at, mask=mask, other=absent).to(tl.float32)
    return row


@triton.jit
def store_rows(ptr, pitch, mask, rows):
    """Stores a tuple of rows [BC] as float32, ``pitch`` numbers apart."""
    for i in tl.static_range(len(rows)):
        tl.store(ptr + i * pitch, rows[i].to(tl.float32), mask=mask)


@triton.jit
def load_coef(coef_ptr, n, channel, mask, N, C):
    """The coefficients a, b, g, s, p, q, slope of sample n: a tuple of rows [BC]."""
    base = coef_ptr + n * C + channel
    row = N * C
    a = tl.load(base, mask=mask, other=0.0)
    b = tl.load(base + row, mask=mask, other=0.0)
    g = tl.load(base + 2 * row, mask=mask, other=0.0)
    s = tl.load(base + 3 * row, mask=mask, other=0.0)
    p = tl.load(base + 4 * row, mask=mask, other=0.0)
    q = tl.load(base + 5 * row, mask=mask, other=0.0)
    slope = tl.load(base + 6 * row, mask=mask, other=0.0)
    return a, b, g, s, p, q, slope


@triton.jit
def load_pre(pre_ptr, channel, mask, C, HAS_PRE: tl.constexpr):
    """Shift and slope [BC] of the activation in front of a norm; 0 without one."""
    first = pre_ptr if HAS_PRE else None
    second = pre_ptr + C if HAS_PRE else None
    return row_or(first, channel, mask, 0.0), row_or(second, channel, mask, 0.0)


@triton.jit
def sample_and_channels(C, BC: tl.constexpr):
    """A program's sample, its channels [BC], and which of these there are; grid (blocks, channels, samples)."""
    n = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    return n, channel, channel < C


@triton.jit
def block_of_map(n, block, channel, cmask, S, C, BS: tl.constexpr):
    """Offsets [BS, BC] of a block of voxels in a map [N, S, C], and which of these there are."""
    voxel = block * BS + tl.arange(0, BS)
    at = (n * S + voxel)[:, None] * C + channel[None, :]
    return at, (voxel < S)[:, None] & cmask[None, :]


@triton.jit
def affine(y, coefs, ACT: tl.constexpr):
    """v = g * (act(a * (y - p) + b) - q) + s for y [R, BC] float32 and coefficients [BC]."""
    a, b, g, s, p, q, slope = coefs
    z = a[None, :] * (y - p[None, :]) + b[None, :]
    return g[None, :] * (activate(z, slope[None, :], ACT) - q[None, :]) + s[None, :]


@triton.jit
def add_affine_grad(dv, y, coefs, sums, ACT: tl.constexpr):
    """Gradient at y [R, BC], and ``sums`` with this block's terms added.

    ``sums`` is a tuple of five [R, BC]: of dv * (act(z) - q), dv, dz * (y - p), dz, dslope; z = a * (y - p) + b.
    To add rows up takes far longer than the rest, so a kernel does it once, by ``store_sums``. Without an
    activation two of the sums tell the others.
    """
    a, b, g, _s, p, q, slope = coefs
    dg, ds, da, db, dslope = sums
    centred = y - p[None, :]
    ds += dv
    if ACT == 0:
        da += dv * centred
        dy = dv * g[None, :] * a[None, :]
    else:
        z = a[None, :] * centred + b[None, :]
        dz = dv * g[None, :] * activate_grad(z, slope[None, :], ACT)
        dg += dv * (activate(z, slope[None, :], ACT) - q[None, :])
        da += dz * centred
        db += dz
        if (ACT == 2) or (ACT == 3):
            dslope += dv * g[None, :] * activate_slope_grad(z, ACT)
        dy = dz * a[None, :]
    return dy, (dg, ds, da, db, dslope)


@triton.jit
def total_sums(coefs, sums, ACT: tl.constexpr):
    """The ``sums`` of ``add_affine_grad`` [R, BC] over rows: five rows [BC]."""
    a, b, g, _s, _p, q, _slope = coefs
    dg, ds, da, db, dslope = sums
    ds_all = row_sum(ds)
    da_all = row_sum(da)
    if ACT == 0:
        dg_all = a * da_all + (b - q) * ds_all
        da_all = g * da_all
        db_all = g * ds_all
    else:
        dg_all = row_sum(dg)
        db_all = row_sum(db)
    dslope_all = ds_all * 0.0
    if (ACT == 2) or (ACT == 3):
        dslope_all = row_sum(dslope)
    return dg_all, ds_all, da_all, db_all, dslope_all


@triton.jit
def store_sums(ptr, slot, channel, mask, C, coefs, sums, ACT: tl.constexpr):
    """The ``sums`` of ``add_affine_grad`` over rows, as one slot [5, C]; every slot has a single writer."""
    totals = total_sums(coefs, sums, ACT)
    store_rows(ptr + slot * 5 * C + channel, C, mask, totals)


@triton.jit
def add_slots(base, T, C, mask, ROWS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Rows of slots [T, ROWS, C] from ``base`` on, 5 or 6 of them, added over T in a fixed order and float64."""
    dg = tl.zeros((BC,), tl.float64)
    ds, da, db, dslope, more = dg, dg, dg, dg, dg
    for t0 in loop(0, T, BT):
        t = t0 + tl.arange(0, BT)
        m = (t < T)[:, None] & mask[None, :]
        at = base[None, :] + (t.to(tl.int64) * ROWS * C)[:, None]
        dg += tl.sum(tl.load(at, mask=m, other=0.0).to(tl.float64), axis=0)
        ds += tl.sum(tl.load(at + C, mask=m, other=0.0).to(tl.float64), axis=0)
        da += tl.sum(tl.load(at + 2 * C, mask=m, other=0.0).to(tl.float64), axis=0)
        db += tl.sum(tl.load(at + 3 * C, mask=m, other=0.0).to(tl.float64), axis=0)
        dslope += tl.sum(tl.load(at + 4 * C, mask=m, other=0.0).to(tl.float64), axis=0)
        if ROWS == 6:
            more += tl.sum(tl.load(at + 5 * C, mask=m, other=0.0).to(tl.float64), axis=0)
    return (dg, ds, da, db, dslope), more


@triton.jit
def store_coef_grad(out_ptr, coef_ptr, at, row, mask, totals):
    """Gradient of coefficients [7, N, C] from five sums; the rows of ``coef_ptr`` are ``row`` numbers apart."""
    dg, ds, da, db, dslope = totals
    a = tl.load(coef_ptr + at, mask=mask, other=0.0)
    g = tl.load(coef_ptr + 2 * row + at, mask=mask, other=0.0)
    store_rows(out_ptr + at, row, mask, (da, db, dg, ds, -a * db, -g * ds, dslope))


@triton.jit
def coef_grad_kernel(part_ptr, coef_ptr, out_ptr, T, N, C, BT: tl.constexpr, BC: tl.constexpr):
    """Partial sums [N, T, 5, C] -> dcoef [7, N, C]."""
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = channel < C
    totals, _ = add_slots(part_ptr + n * T * 5 * C + channel, T, C, mask, 5, BT, BC)
    store_coef_grad(out_ptr, coef_ptr, n * C + channel, N * C, mask, totals)


@triton.jit
def sum_rows_kernel(part_ptr, out_ptr, R, W, share, BR: tl.constexpr, BW: tl.constexpr):
    """[N, R, W] float32 -> [N, shares, W]: ``share`` rows at a time, added in a fixed order and float64."""
    column = tl.program_id(0) * BW + tl.arange(0, BW)
    mask = column < W
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, R)
    base = part_ptr + tl.program_id(2).to(tl.int64) * R * W + column[None, :]
    total = tl.zeros((BW,), tl.float64)
    for r0 in loop(first, last, BR):
        r = r0 + tl.arange(0, BR)
        at = base + r.to(tl.int64)[:, None] * W
        rows = tl.load(at, mask=(r < last)[:, None] & mask[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float64), axis=0)
    slot = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    out = out_ptr + slot * W + column
    tl.store(out, total.to(tl.float32).to(out_ptr.dtype.element_ty), mask=mask)


def _sum_rows(partials: torch.Tensor, out: torch.Tensor, share: int) -> torch.Tensor:
    n, rows, width = partials.shape
    block = power_of_two(width // 128, COLUMNS, 128)
    sum_rows_kernel[(cdiv(width, block), cdiv(rows, share), n)](
        partials, out, rows, width, share,
        BR=power_of_two(share, 1, 4096 // block), BW=block, num_warps=WARPS,
    )  # fmt: skip
    return out


def sum_rows(partials: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Sums float32 ``partials`` [R, W] over R into ``out`` (W values, any float dtype)."""
    return _sum_rows(partials[None], out, partials.shape[0])


def share_of(slots: int) -> int:
    """Partial results of a sample that one program puts together, so that at most ``SLOTS`` remain."""
    return max(SHARE, cdiv(slots, SLOTS))


def coef_grad(partials: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
    """dcoef [7, N, C] from partial sums [N, T, 5, C]."""
    n, tiles, _, channels = partials.shape
    if tiles > SLOTS:
        share, rows = share_of(tiles), partials.flatten(2)
        tiles = cdiv(tiles, share)
        partials = _sum_rows(rows, scratch(partials, n, tiles, 5, channels), share)
    out = torch.empty_like(coef)
    coef_grad_kernel[(n, cdiv(channels, COLUMNS))](
        partials, coef, out, tiles, n, channels, BT=power_of_two(tiles, 1, 256), BC=COLUMNS,
        num_warps=WARPS,
    )  # fmt: skip
    return out


@triton.jit
def add_product(x, w, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x @ w; ``UPCAST`` to float32 first, for the interpreter's wrong product of bfloat16."""
    if UPCAST:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision=PRECISION)


@triton.jit
def tile_moments(u, valid, count):
    """Mean and sum of squared deviations [BC] over the valid rows of u [R, BC]."""
    u = tl.where(valid[:, None], u, 0.0)
    mean = row_sum(u) / count
    d = tl.where(valid[:, None], u - mean[None, :], 0.0)
    # the mean of the deviations is the part that rounding took from the first sum
    rest = row_sum(d) / count
    return mean + rest, row_sum(d * d) - count * rest * rest


@triton.jit
def store_moments(ptr, count_ptr, slot, channel, mask, C, mean, m2, count):
    """One slot of moment partials: mean and M2 [2, C], and its number of values."""
    store_rows(ptr + slot * 2 * C + channel, C, mask, (mean, m2))
    tl.store(count_ptr + slot + channel * 0, count + channel * 0.0, mask=channel == 0)


@triton.jit
def merge_moments_kernel(
    part_ptr,
    count_ptr,
    out_ptr,
    out_count_ptr,
    T,
    C,
    share,
    pitch,
    LAST: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """Slots (count, mean, M2) [N, T] -> slots [N, shares] of ``share`` of them each (Chan et al. 1983).

    ``LAST``: one share, of which mean and variance [2, N, C] are written, ``pitch`` numbers apart.
    """
    n = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    mask = channel < C
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, T)
    base = part_ptr + n * T * 2 * C + channel[None, :]
    total = tl.zeros((BC,), tl.float64)
    mean = tl.zeros((BC,), tl.float64)
    for t0 in loop(first, last, BT):
        t = t0 + tl.arange(0, BT)
        m = (t < last)[:, None] & mask[None, :]
        count = tl.load(count_ptr + n * T + t, mask=t < last, other=0.0).to(tl.float64)
        mean_t = tl.load(base + (t.to(tl.int64) * 2 * C)[:, None], mask=m, other=0.0)
        mean += tl.sum(count[:, None] * mean_t.to(tl.float64), axis=0)
        total += tl.sum(count, axis=0)
    mean = mean / total
    m2 = tl.zeros((BC,), tl.float64)
    for t0 in loop(first, last, BT):
        t = t0 + tl.arange(0, BT)
        m = (t < last)[:, None] & mask[None, :]
        count = tl.load(count_ptr + n * T + t, mask=t < last, other=0.0).to(tl.float64)
        at = base + (t.to(tl.int64) * 2 * C)[:, None]
        d = tl.where(m, tl.load(at, mask=m, other=0.0).to(tl.float64) - mean[None, :], 0.0)
        m2 += tl.sum(tl.load(at + C, mask=m, other=0.0) + count[:, None] * d * d, axis=0)
    if LAST:
        out = out_ptr + n * C + channel
        store_rows(out, pitch, mask, (mean, m2 / total))
    else:
        slot = n * tl.num_programs(0) + tl.program_id(0)
        store_moments(out_ptr, out_count_ptr, slot, channel, mask, C, mean, m2, total)


def finish_moments(partials: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean and variance [2, N, C] from partials [N, T, 2, C] and counts [N, T]."""
    n, tiles, _, channels = partials.shape
    blocks = cdiv(channels, COLUMNS)
    if tiles > SLOTS:
        share = share_of(tiles)
        shares = cdiv(tiles, share)
        fewer, fewer_counts = scratch(partials, n, shares, 2, channels), scratch(counts, n, shares)
        merge_moments_kernel[(shares, blocks, n)](
            partials, counts, fewer, fewer_counts, tiles, channels, share, 0,
            LAST=False, BT=power_of_two(share, 1, 512), BC=COLUMNS, num_warps=WARPS,
        )  # fmt: skip
        partials, counts, tiles = fewer, fewer_counts, shares
    out = scratch(partials, 2, n, channels)
    merge_moments_kernel[(1, blocks, n)](
        partials, counts, out, out, tiles, channels, tiles, n * channels,
        LAST=True, BT=power_of_two(tiles, 1, 512), BC=COLUMNS, num_warps=WARPS,
    )  # fmt: skip
    return out
