"""The [N, C]-sized algebra of a block, one launch each way: moments, norm, γ, β and dropout to coefficients.

One program takes a block of channels and walks over the samples. Group and layer norm, whose statistics cross
channels, are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import cdiv, guard, loop, power_of_two

NORMS = {"none": 0, "batch": 1, "instance": 2}
ORDERS = {"conv-norm-film-act": 0, "conv-norm-act-film": 1, "conv-act-norm-film": 2}
POSITIONS = {"end": 0, "film": 1, "norm": 2}

NUM_WARPS = 1


@triton.jit
def _row(ptr, at, cmask, absent: tl.constexpr):
    """float32 numbers at ``at``; ``absent`` where there is no tensor."""
    if ptr is None:
        row = (at * 0).to(tl.float32) + absent
    else:
        row = tl.load(ptr + at, mask=cmask, other=absent).to(tl.float32)
    return row


@triton.jit
def _dropout(mask_ptr, at, cmask, POSITION: tl.constexpr, WHERE: tl.constexpr):
    """The dropout mask where it stands at ``WHERE``, else 1."""
    if POSITION == WHERE:  # noqa: SIM108 (a branch of the compiler's, not a value)
        row = _row(mask_ptr, at, cmask, 1.0)
    else:
        row = (at * 0).to(tl.float32) + 1.0
    return row


@triton.jit
def _batch_statistics(
    stats_ptr, shift, mask_ptr, mask_pitch, channel, cmask, N, C, POSITION: tl.constexpr
):
    """Mean and variance over all samples of scale * (y + shift)."""
    centre = shift * 0.0
    for n in loop(N):
        s = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 2)
        centre += (_row(stats_ptr, n * C + channel, cmask, 0.0) + shift) * s
    centre = centre / N
    variance = shift * 0.0
    for n in loop(N):
        s = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 2)
        d = (_row(stats_ptr, n * C + channel, cmask, 0.0) + shift) * s - centre
        variance += _row(stats_ptr, (N + n) * C + channel, cmask, 0.0) * s * s + d * d
    return centre, variance / N


@triton.jit
def _statistics(
    stats_ptr,
    running_mean_ptr,
    running_var_ptr,
    centre,
    variance,
    shift,
    s,
    n,
    channel,
    cmask,
    N,
    C,
    NORM: tl.constexpr,
    USE_INPUT: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Centre, variance and pivot of sample n; ``centre`` and ``variance`` are those of the batch."""
    if not USE_INPUT:
        centre = _row(running_mean_ptr, channel, cmask, 0.0)
        variance = _row(running_var_ptr, channel, cmask, 1.0)
        pivot = centre - shift
    elif NORM == 2:
        pivot = _row(stats_ptr, n * C + channel, cmask, 0.0)
        centre = (pivot + shift) * s
        variance = _row(stats_ptr, (N + n) * C + channel, cmask, 0.0) * s * s
    elif SCALED:
        pivot = _row(stats_ptr, n * C + channel, cmask, 0.0)
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
    conv_bias = _row(conv_bias_ptr, channel, cmask, 0.0)
    shift = zero if ORDER == 2 else conv_bias
    weight = _row(norm_weight_ptr, channel, cmask, 1.0)
    bias = _row(norm_bias_ptr, channel, cmask, 0.0)
    if slope_ptr is None:
        slope = zero + slope_value
    else:
        slope = tl.load(slope_ptr + channel * slope_pitch, mask=cmask, other=0.0).to(tl.float32)
    centre, variance = zero, zero + 1.0
    if NORM == 1 and USE_INPUT:
        centre, variance = _batch_statistics(
            stats_ptr, shift, mask_ptr, mask_pitch, channel, cmask, N, C, POSITION
        )
        if UPDATE:
            _move(running_mean_ptr, channel, cmask, centre, momentum)
            _move(running_var_ptr, channel, cmask, variance * unbiased, momentum)
    kept_mean, kept_var = zero, zero
    for n in loop(N):
        at = n * C + channel
        s = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 2)
        k, offset, p = zero + 1.0, shift, zero
        if NORM > 0:
            mean, var, p = _statistics(
                stats_ptr,
                running_mean_ptr,
                running_var_ptr,
                centre,
                variance,
                shift,
                s,
                n,
                channel,
                cmask,
                N,
                C,
                NORM,
                USE_INPUT,
                POSITION == 2,
            )
            kept_mean += mean
            kept_var += var
            factor = tl.div_rn(weight, tl.sqrt_rn(var + eps))
            k = factor * s
            offset = ((p + shift) * s - mean) * factor + bias
        film = _row(gamma_ptr, n * gamma_pitch + channel, cmask, 1.0)
        film = film * _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 1)
        beta = _row(beta_ptr, n * beta_pitch + channel, cmask, 0.0)
        end = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 0)
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
    shift = zero if ORDER == 2 else _row(conv_bias_ptr, channel, cmask, 0.0)
    weight = _row(norm_weight_ptr, channel, cmask, 1.0)
    bias = _row(norm_bias_ptr, channel, cmask, 0.0)
    centre, variance = zero, zero + 1.0
    if NORM == 1 and USE_INPUT:
        centre, variance = _batch_statistics(
            stats_ptr, shift, mask_ptr, mask_pitch, channel, cmask, N, C, POSITION
        )
    dweight, dbias, dshift, dslope = zero, zero, zero, zero
    shared_gamma, shared_beta, dcentre_sum, dvariance_sum = zero, zero, zero, zero
    for n in loop(N):
        at = n * C + channel
        s = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 2)
        before = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 1)
        end = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 0)
        film = _row(gamma_ptr, n * gamma_pitch + channel, cmask, 1.0) * before
        factor, inverse, away, offset = zero + 1.0, zero, zero, shift
        if NORM > 0:
            mean, var, p = _statistics(
                stats_ptr,
                running_mean_ptr,
                running_var_ptr,
                centre,
                variance,
                shift,
                s,
                n,
                channel,
                cmask,
                N,
                C,
                NORM,
                USE_INPUT,
                POSITION == 2,
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
            s = _dropout(mask_ptr, n * mask_pitch + channel, cmask, POSITION, 2)
            away = (_row(stats_ptr, at, cmask, 0.0) + shift) * s - centre
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
                # written behind PyTorch's back
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
        slope = torch.empty(c, dtype=torch.float32, device=dcoef.device)
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
