"""Coefficients of a block per sample and channel, from its norm's statistics and weights, FiLM's γ and β, dropout.

The block is v = g * (act(a * (y - p) + b) - q) + s of a convolution's output y. One launch each way computes the
coefficients: one program takes a block of channels and walks over the samples. Group and layer norm, whose
statistics cross channels, are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import cdiv, guard, loop, power_of_two, row_or, scratch

NORMS = {"none": 0, "batch": 1, "instance": 2}
ORDERS = {"conv-norm-film-act": 0, "conv-norm-act-film": 1, "conv-act-norm-film": 2}
POSITIONS = {"end": 0, "film": 1, "norm": 2}

NUM_WARPS = 1


@triton.jit
def _dropout(mask, n, channel, cmask, POSITION: tl.constexpr, WHERE: tl.constexpr):
    """The dropout mask of sample n where it stands at ``WHERE``, else 1; ``mask`` is its pointer and pitch."""
    mask_ptr, pitch = mask
    return row_or(mask_ptr if POSITION == WHERE else None, n * pitch + channel, cmask, 1.0)


@triton.jit
def _batch_statistics(stats_ptr, shift, mask, channel, cmask, N, C, POSITION: tl.constexpr):
    """Mean and variance over all samples of scale * (y + shift)."""
    centre = shift * 0.0
    for n in loop(N):
        s = _dropout(mask, n, channel, cmask, POSITION, 2)
        centre += (row_or(stats_ptr, n * C + channel, cmask, 0.0) + shift) * s
    centre = centre / N
    variance = shift * 0.0
    for n in loop(N):
        s = _dropout(mask, n, channel, cmask, POSITION, 2)
        d = (row_or(stats_ptr, n * C + channel, cmask, 0.0) + shift) * s - centre
        variance += row_or(stats_ptr, (N + n) * C + channel, cmask, 0.0) * s * s + d * d
    return centre, variance / N


@triton.jit
def _statistics(
    stats_ptr, shared, shift, s, n, channel, cmask, N, C, OWN: tl.constexpr, SCALED: tl.constexpr
):
    """Centre, variance and pivot of sample n, with its OWN statistics or centre and variance that are shared."""
    centre, variance = shared
    if OWN:
        pivot = row_or(stats_ptr, n * C + channel, cmask, 0.0)
        centre = (pivot + shift) * s
        variance = row_or(stats_ptr, (N + n) * C + channel, cmask, 0.0) * s * s
    elif SCALED:
        pivot = row_or(stats_ptr, n * C + channel, cmask, 0.0)
    else:
        pivot = centre - shift
    return centre, variance, pivot


@triton.jit
def _move(ptr, channel, cmask, value, momentum):
    old = tl.load(ptr + channel, mask=cmask, other=0.0).to(tl.float32)
    new = old + momentum * (value - old)
    tl.store(ptr + channel, new.to(ptr.dtype.element_ty), mask=cmask)


@triton.jit
def block_coefficients_kernel(
    running_mean_ptr,
    running_var_ptr,
    stats_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    conv_bias_ptr,
    gamma_ptr,
    beta_ptr,
    mask_ptr,
    slope_ptr,
    coef_ptr,
    N,
    C,
    gamma_pitch,
    beta_pitch,
    mask_pitch,
    slope_pitch,
    eps,
    momentum,
    unbiased,
    slope_value,
    NORM: tl.constexpr,
    USE_INPUT: tl.constexpr,
    UPDATE: tl.constexpr,
    ORDER: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cmask = channel < C
    zero = (channel * 0).to(tl.float32)
    conv_bias = row_or(conv_bias_ptr, channel, cmask, 0.0)
    shift = zero if ORDER == 2 else conv_bias
    weight = row_or(norm_weight_ptr, channel, cmask, 1.0)
    bias = row_or(norm_bias_ptr, channel, cmask, 0.0)
    slope = row_or(slope_ptr, channel * slope_pitch, cmask, slope_value)
    mask = mask_ptr, mask_pitch
    OWN: tl.constexpr = USE_INPUT and NORM == 2
    SCALED: tl.constexpr = USE_INPUT and POSITION == 2
    centre, variance = zero, zero + 1.0
    if NORM > 0 and not USE_INPUT:
        centre = row_or(running_mean_ptr, channel, cmask, 0.0)
        variance = row_or(running_var_ptr, channel, cmask, 1.0)
    elif NORM == 1:
        centre, variance = _batch_statistics(stats_ptr, shift, mask, channel, cmask, N, C, POSITION)
        if UPDATE:
            _move(running_mean_ptr, channel, cmask, centre, momentum)
            _move(running_var_ptr, channel, cmask, variance * unbiased, momentum)
    kept_mean, kept_var = zero, zero
    for n in loop(N):
        at = n * C + channel
        s = _dropout(mask, n, channel, cmask, POSITION, 2)
        k, offset, p = zero + 1.0, shift, zero
        if NORM > 0:
            mean, var, p = _statistics(
                stats_ptr, (centre, variance), shift, s, n, channel, cmask, N, C, OWN, SCALED
            )
            kept_mean += mean
            kept_var += var
            factor = tl.div_rn(weight, tl.sqrt_rn(var + eps))
            k = factor * s
            offset = ((p + shift) * s - mean) * factor + bias
        film = row_or(gamma_ptr, n * gamma_pitch + channel, cmask, 1.0)
        film = film * _dropout(mask, n, channel, cmask, POSITION, 1)
        beta = row_or(beta_ptr, n * beta_pitch + channel, cmask, 0.0)
        end = _dropout(mask, n, channel, cmask, POSITION, 0)
        a, b, g, t, q = zero + 1.0, conv_bias, end, zero, zero
        if ORDER == 0:
            a, b = k * film, offset * film + beta
        elif ORDER == 1:
            a, b, g, t = k, offset, film * end, beta * end
        else:
            g, t, q = k * film * end, (offset * film + beta) * end, p
            p = zero
        tl.store(coef_ptr + at, a, mask=cmask)
        tl.store(coef_ptr + N * C + at, b, mask=cmask)
        tl.store(coef_ptr + 2 * N * C + at, g, mask=cmask)
        tl.store(coef_ptr + 3 * N * C + at, t, mask=cmask)
        tl.store(coef_ptr + 4 * N * C + at, p, mask=cmask)
        tl.store(coef_ptr + 5 * N * C + at, q, mask=cmask)
        tl.store(coef_ptr + 6 * N * C + at, slope, mask=cmask)
    if NORM == 2 and UPDATE:
        _move(running_mean_ptr, channel, cmask, kept_mean / N, momentum)
        _move(running_var_ptr, channel, cmask, kept_var / N * unbiased, momentum)


@triton.jit
def _give(ptr, at, value, cmask):
    if ptr is not None:
        tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=cmask)


@triton.jit
def block_coefficients_backward_kernel(
    running_mean_ptr,
    running_var_ptr,
    stats_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    conv_bias_ptr,
    gamma_ptr,
    beta_ptr,
    mask_ptr,
    dcoef_ptr,
    dstats_ptr,
    dnorm_weight_ptr,
    dnorm_bias_ptr,
    dconv_bias_ptr,
    dgamma_ptr,
    dbeta_ptr,
    dslope_ptr,
    N,
    C,
    gamma_pitch,
    beta_pitch,
    mask_pitch,
    eps,
    NORM: tl.constexpr,
    USE_INPUT: tl.constexpr,
    ORDER: tl.constexpr,
    POSITION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cmask = channel < C
    zero = (channel * 0).to(tl.float32)
    shift = zero if ORDER == 2 else row_or(conv_bias_ptr, channel, cmask, 0.0)
    weight = row_or(norm_weight_ptr, channel, cmask, 1.0)
    bias = row_or(norm_bias_ptr, channel, cmask, 0.0)
    mask = mask_ptr, mask_pitch
    OWN: tl.constexpr = USE_INPUT and NORM == 2
    SCALED: tl.constexpr = USE_INPUT and POSITION == 2
    centre, variance = zero, zero + 1.0
    if NORM > 0 and not USE_INPUT:
        centre = row_or(running_mean_ptr, channel, cmask, 0.0)
        variance = row_or(running_var_ptr, channel, cmask, 1.0)
    elif NORM == 1:
        centre, variance = _batch_statistics(stats_ptr, shift, mask, channel, cmask, N, C, POSITION)
    dweight, dbias, dshift, dslope = zero, zero, zero, zero
    shared_gamma, shared_beta, dcentre_sum, dvariance_sum = zero, zero, zero, zero
    for n in loop(N):
        at = n * C + channel
        s = _dropout(mask, n, channel, cmask, POSITION, 2)
        before = _dropout(mask, n, channel, cmask, POSITION, 1)
        end = _dropout(mask, n, channel, cmask, POSITION, 0)
        film = row_or(gamma_ptr, n * gamma_pitch + channel, cmask, 1.0) * before
        factor, inverse, away, offset = zero + 1.0, zero, zero, shift
        if NORM > 0:
            mean, var, p = _statistics(
                stats_ptr, (centre, variance), shift, s, n, channel, cmask, N, C, OWN, SCALED
            )
            inverse = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
            factor = weight * inverse
            away = (p + shift) * s - mean
            offset = away * factor + bias
        da = tl.load(dcoef_ptr + at, mask=cmask, other=0.0)
        db = tl.load(dcoef_ptr + N * C + at, mask=cmask, other=0.0)
        dg = tl.load(dcoef_ptr + 2 * N * C + at, mask=cmask, other=0.0) * end
        dt = tl.load(dcoef_ptr + 3 * N * C + at, mask=cmask, other=0.0) * end
        dslope += tl.load(dcoef_ptr + 6 * N * C + at, mask=cmask, other=0.0)
        if ORDER == 1:
            dk, doffset, dfilm, dbeta = da, db, dg, dt
        else:
            if ORDER == 0:
                dproduct, dbeta = da, db
            else:
                dproduct, dbeta = dg, dt
                dshift += db
            dk, doffset = dproduct * film, dbeta * film
            dfilm = dproduct * factor * s + dbeta * offset
        dfilm = dfilm * before
        if gamma_pitch > 0:
            _give(dgamma_ptr, at, dfilm, cmask)
        if beta_pitch > 0:
            _give(dbeta_ptr, at, dbeta, cmask)
        shared_gamma += dfilm
        shared_beta += dbeta
        if NORM == 0:
            if ORDER != 2:
                dshift += doffset
        else:
            dfactor = dk * s + doffset * away
            dbias += doffset
            dweight += dfactor * inverse
            dvariance = -0.5 * dfactor * factor * inverse * inverse
            dcentre = -doffset * factor
            if ORDER != 2:
                dshift += doffset * factor * s
            if NORM == 2 and USE_INPUT:
                if ORDER != 2:
                    dshift += dcentre * s
                _give(dstats_ptr, at, dcentre * s, cmask)
                _give(dstats_ptr, N * C + at, dvariance * s * s, cmask)
            dcentre_sum += dcentre
            dvariance_sum += dvariance
    if NORM == 1 and USE_INPUT:
        for n in loop(N):
            at = n * C + channel
            s = _dropout(mask, n, channel, cmask, POSITION, 2)
            away = (row_or(stats_ptr, at, cmask, 0.0) + shift) * s - centre
            dmean = (dcentre_sum + 2.0 * dvariance_sum * away) / N * s
            if ORDER != 2:
                dshift += dmean
            _give(dstats_ptr, at, dmean, cmask)
            _give(dstats_ptr, N * C + at, dvariance_sum / N * s * s, cmask)
    if gamma_pitch == 0:
        _give(dgamma_ptr, channel, shared_gamma, cmask)
    if beta_pitch == 0:
        _give(dbeta_ptr, channel, shared_beta, cmask)
    _give(dnorm_weight_ptr, channel, dweight, cmask)
    _give(dnorm_bias_ptr, channel, dbias, cmask)
    _give(dconv_bias_ptr, channel, dshift, cmask)
    _give(dslope_ptr, channel, dslope, cmask)


def covers_block(kind: Any) -> bool:
    """Whether these kernels compute the coefficients of such a block."""
    return kind.norm in NORMS and not kind.wide


def _pitch(t: torch.Tensor | None, channels: int) -> int:
    """Numbers from sample to sample of γ, β or a mask; 0 where all samples share one row."""
    return channels if t is not None and t.dim() == 2 and t.shape[0] > 1 else 0


def _constants(kind: Any) -> dict[str, Any]:
    return {
        "NORM": NORMS[kind.norm],
        "USE_INPUT": kind.uses_input,
        "ORDER": ORDERS[kind.order],
        "POSITION": POSITIONS[kind.dropout_position],
        "BLOCK": power_of_two(kind.channels, 16, 128),
        "num_warps": NUM_WARPS,
    }


def _readable(t: torch.Tensor | None) -> torch.Tensor | None:
    """``t`` dense with its values in its memory, which a negated view and zeros without memory have not."""
    if t is None:
        return None
    if t._is_zerotensor():
        return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t.detach().resolve_neg().contiguous() if t.is_neg() or not t.is_contiguous() else t


def block_coefficients(
    kind: Any,
    momentum: float,
    tensors: Sequence[torch.Tensor | None],
    device: torch.device,
) -> torch.Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C] of a block; moves its running statistics.

    Args:
        kind: what the block consists of (see ``fastfilm.ops.spec.Kind``); ``covers_block`` must hold.
        tensors: running mean and variance, moments [2, N, C], norm weight and bias, conv bias [C], γ, β, dropout
            mask [C], [1, C] or [N, C], slope [1] or [C]; None where absent.
    """
    n, c = kind.batch, kind.channels
    plain = [_readable(t) for t in tensors]
    coef = torch.empty((7, n, c), dtype=torch.float32, device=device)
    values = n * kind.count if kind.norm == "batch" else kind.count
    slope = plain[9]
    constants = _constants(kind)
    with guard(coef):
        block_coefficients_kernel[(cdiv(c, constants["BLOCK"]),)](
            *plain,
            coef,
            n,
            c,
            *(_pitch(t, c) for t in plain[6:9]),
            0 if slope is None or slope.numel() == 1 else 1,
            kind.eps,
            momentum,
            values / max(values - 1, 1),
            kind.slope,
            UPDATE=kind.update,
            **constants,
        )
    if kind.update:
        for theirs, ours in zip(tensors[:2], plain[:2], strict=True):
            assert theirs is not None and ours is not None
            if ours.data_ptr() != theirs.data_ptr():
                theirs.copy_(ours)
            elif not theirs.is_inference():
                # the kernel wrote without PyTorch's knowledge
                torch.autograd.graph.increment_version(theirs)
    return coef


def block_coefficients_backward(
    kind: Any,
    tensors: Sequence[torch.Tensor | None],
    dcoef: torch.Tensor,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of ``block_coefficients`` at the ``wanted`` of its tensors, in their dtypes."""
    n, c = kind.batch, kind.channels
    plain = [_readable(t) for t in tensors]
    grads = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    slope, one_slope = grads[9], grads[9] is not None and grads[9].numel() == 1
    if slope is not None and one_slope:
        slope = scratch(dcoef, c)
    constants = _constants(kind)
    with guard(dcoef):
        block_coefficients_backward_kernel[(cdiv(c, constants["BLOCK"]),)](
            *plain[:9],
            dcoef.float().contiguous(),
            *grads[2:8],
            slope,
            n,
            c,
            *(_pitch(t, c) for t in plain[6:9]),
            kind.eps,
            **constants,
        )
        if one_slope and slope is not None and grads[9] is not None:
            grads[9].copy_(slope.sum())
    return grads
