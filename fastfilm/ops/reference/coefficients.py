"""The [N, C]-sized algebra: moments, norm weights, γ, β and dropout become seven rows of numbers.

    v = g * (act(a * (y - p) + b; slope) - q) + s

p and q are pivots: constants near the mean of what they are subtracted from, so that neither the
value nor the sums of the backward pass lose digits when the mean is large against the deviation.
Everything here is differentiable PyTorch; it is the definition that a fused kernel must agree with.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import Kind, TailTensors, capture, direct
from . import distributed


def norm_statistics(
    stats: Tensor,
    norm: str,
    count: int,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_groups: int | None = None,
    training: bool = False,
    momentum: float = 0.1,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance that the norm divides by, and PyTorch's update of running statistics.

    Args:
        stats: [2, N, C], mean and biased variance of the raw map per sample and channel.
        count: values per sample and channel (the number of voxels).
        shift: [C], added to the raw map before the norm (the convolution's bias).
        scale: [N, C], multiplied to it after the shift (channel dropout in front of the norm).
        group: processes over which a batch norm's batch is spread.

    Returns:
        mean, var: [N or 1, C] each, of ``scale * (y + shift)``.
    """
    mean, var = stats.unbind(0)
    if shift is not None:
        mean = mean + shift
    if scale is not None:
        mean = mean * scale
        var = var * (scale * scale)
    n, channels = mean.shape

    def move(centre: Tensor, total: Tensor, unbiased: Tensor | float) -> None:
        if training and running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(centre.to(running_mean.dtype), momentum)
                running_var.lerp_((total * unbiased).to(running_var.dtype), momentum)

    if norm == "batch" and group is not None:
        centre, total, values = distributed.combined(mean, var, count, group)
        move(centre[0], total[0], values / (values - 1).clamp(min=1))
        return centre, total
    if norm == "batch":
        between, centre = torch.var_mean(mean, 0, correction=0, keepdim=True)
        total = var.mean(0, keepdim=True) + between
        move(centre[0], total[0], n * count / max(n * count - 1, 1))
        return centre, total
    if norm == "instance":
        if training and running_mean is not None:
            move(mean.mean(0), var.mean(0), count / max(count - 1, 1))
        return mean, var
    groups = 1 if norm == "layer" else num_groups
    assert groups is not None
    grouped_mean = mean.reshape(n, groups, -1)
    centre = grouped_mean.mean(2, keepdim=True)
    total = (var.reshape(n, groups, -1) + (grouped_mean - centre).square()).mean(2, keepdim=True)
    spread = (n, groups, channels // groups)
    return centre.expand(spread).reshape(n, channels), total.expand(spread).reshape(n, channels)


def of_block(
    kind: Kind,
    tensors: TailTensors,
    device: torch.device,
    momentum: float = 0.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C] of a block of ``kind``; moves its running statistics in training.

    Args:
        tensors: ``stats`` are there if the kind ``uses_input``; ``bias`` is what the raw map lacks of the
            convolution's.
        group: processes over which a batch norm's batch is spread.
    """
    mean, var, stats, weight, norm_bias, bias, *films, slope = tensors
    dtype = torch.float64 if kind.wide else torch.float32
    gamma, beta, mask = (t.unsqueeze(0) if t is not None and t.dim() == 1 else t for t in films)
    known: dict[str, Tensor] = {}
    if stats is not None:
        before = mask if kind.dropout_position == "norm" else None
        centre, total = norm_statistics(
            stats,
            kind.norm,
            kind.count,
            running_mean=mean,
            running_var=var,
            num_groups=kind.groups,
            training=kind.training,
            momentum=momentum,
            shift=None if kind.activation_first else bias,
            scale=None if before is None else before.to(stats.dtype),
            group=group,
        )
        pivot = stats.detach()[0]
        if kind.norm == "batch" and before is None:
            lifted = kind.activation_first or bias is None
            pivot = centre if lifted else centre - bias.to(centre.dtype)  # type: ignore[union-attr]
        known = {"mean": centre, "var": total, "pivot": pivot.detach()}
    elif kind.norm != "none":
        assert mean is not None and var is not None
        centre = mean.to(dtype).unsqueeze(0)
        known = {"var": var.to(dtype).unsqueeze(0), "pivot": centre.detach()}
        if not kind.activation_first and bias is not None:
            known |= {"mean": centre, "pivot": (centre - bias.to(dtype)).detach()}
        elif mask is not None and kind.dropout_position == "norm":
            known["mean"] = centre
    return coefficients(
        kind.batch,
        kind.channels,
        **known,
        eps=kind.eps,
        norm_weight=weight,
        norm_bias=norm_bias,
        conv_bias=bias,
        gamma=gamma,
        beta=beta,
        slope=kind.slope if slope is None else slope,
        order=kind.order,
        dropout_mask=mask,
        dropout_position=kind.dropout_position,
        dtype=dtype,
        device=device,
    )


def coefficients(
    batch: int,
    channels: int,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    pivot: Tensor | None = None,
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    conv_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    slope: Tensor | float | None = None,
    order: str = "conv-norm-film-act",
    dropout_mask: Tensor | None = None,
    dropout_position: str = "end",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C] of one block's pending affine.

    Args:
        mean, var: [N or 1, C], statistics of what the norm sees (no ``var``: no norm; no ``mean``: it is
            the pivot, to the last bit).
        pivot: [N or 1, C], a constant near the mean of the raw map (norm first) or of the activated
            map (activation first).
        gamma, beta, dropout_mask: [N or 1, C].
        slope: number, [1] or [C], parameter of the activation.
    """

    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype)

    gamma, beta, mask = cast(gamma), cast(beta), cast(dropout_mask)
    conv_bias, norm_weight, norm_bias = cast(conv_bias), cast(norm_weight), cast(norm_bias)

    def film(k: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(k, c) of k * x + c -> the same after the dropout in front of FiLM, and FiLM."""
        if mask is not None and dropout_position == "film":
            k, c = _mul(k, mask), (None if c is None else c * mask)
            k = mask if k is None else k
        if gamma is not None:
            k, c = _mul(k, gamma), (None if c is None else c * gamma)
            k = gamma if k is None else k
        return k, _add(c, beta)

    a = b = g = s = p = q = None
    if var is None:
        if mask is not None and dropout_position == "norm":
            raise ValueError("dropout_position='norm' needs a norm")
        inner: Tensor | None = None
    else:
        inner = torch.rsqrt(var + eps)
        if norm_weight is not None:
            inner = inner * norm_weight
    if order == "conv-act-norm-film":
        b = conv_bias
        if inner is not None:
            q = pivot
            scale = mask if dropout_position == "norm" else None
            assert pivot is not None
            lifted = pivot if scale is None else pivot * scale
            g = inner if scale is None else inner * scale
            s = norm_bias if mean is None else _add((lifted - mean) * inner, norm_bias)
        g, s = film(g, s)
    else:
        if inner is None:
            a, b = None, conv_bias
        else:
            p = pivot
            assert pivot is not None
            lifted = pivot if conv_bias is None else pivot + conv_bias
            assert inner is not None
            a = inner
            if mask is not None and dropout_position == "norm":
                lifted, a = lifted * mask, a * mask
            b = norm_bias if mean is None else _add((lifted - mean) * inner, norm_bias)
        if order == "conv-norm-film-act":
            a, b = film(a, b)
        else:
            g, s = film(g, s)
    if mask is not None and dropout_position == "end":
        g = _mul(g, mask)
        g = mask if g is None else g
        s = None if s is None else s * mask
    if isinstance(slope, (int, float)):
        slope_row: Tensor | None = torch.full((1, 1), float(slope), dtype=dtype, device=device)
    else:
        slope_row = None if slope is None else slope.to(dtype).reshape(1, -1)
    one, zero = _constants(dtype, device)
    rows = (a, b, g, s, p, q, slope_row)
    defaults = (one, zero, one, zero, zero, zero, zero)
    return torch.stack(
        [
            (d if r is None else r).expand(batch, channels)
            for r, d in zip(rows, defaults, strict=True)
        ]
    )


def _constants(dtype: torch.dtype, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """1 and 0, [1, 1] each; made once a dtype and device, unless something is tracing or capturing."""
    key = (dtype, str(device))
    found = _ONE_ZERO.get(key)
    if found is not None and direct(found[0]):
        return found
    made = (
        torch.ones((1, 1), dtype=dtype, device=device),
        torch.zeros((1, 1), dtype=dtype, device=device),
    )
    if direct(made[0]) and not torch.is_inference_mode_enabled() and not capture.capturing():
        _ONE_ZERO[key] = made
    return made


_ONE_ZERO: dict[tuple[torch.dtype, str], tuple[Tensor, Tensor]] = {}


def _mul(x: Tensor | None, y: Tensor) -> Tensor | None:
    return None if x is None else x * y


def _add(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y
