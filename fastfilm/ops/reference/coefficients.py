"""The [N, C]-sized algebra: moments, norm weights, γ, β and dropout become seven rows of numbers.

    v = g * (act(a * (y - p) + b; slope) - q) + s

p and q are pivots: constants near the mean of what they are subtracted from, so that neither the
value nor the sums of the backward pass lose digits when the mean is large against the deviation.
Everything here is differentiable PyTorch; it is the definition that a fused kernel must agree with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..spec import Kind, TailTensors, capture, direct
from . import distributed
from .block import films


class Statistics(NamedTuple):
    """Mean and variance of a norm, with the pivot of its map.

    Attributes:
        mean, var: [N or 1, C], of what the norm sees; without ``mean`` it is the pivot, to the last bit.
        pivot: [N or 1, C], a constant near the mean of the raw map (norm first) or of the activated map
            (activation first).
    """

    mean: Tensor | None
    var: Tensor
    pivot: Tensor


def norm_statistics(
    kind: Kind, tensors: TailTensors, momentum: float = 0.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [N or 1, C] of what the norm sees of the map: mask * (y + bias), from its moments.

    Moves the running statistics as PyTorch does.

    Args:
        tensors: the bias counts where the norm comes first, the mask where dropout stands in front of the norm.
        group: processes over which a batch norm's batch is spread.
    """
    running_mean, running_var, stats, _, _, bias, *_ = tensors
    assert stats is not None
    mean, var = stats.unbind(0)
    if bias is not None and not kind.activation_first:
        mean = mean + bias
    *_, mask = films(tensors)
    if mask is not None and kind.dropout_position == "norm":
        scale = mask.to(stats.dtype)
        mean = mean * scale
        var = var * (scale * scale)
    n, channels = mean.shape

    def move(centre: Tensor, total: Tensor, unbiased: Tensor | float) -> None:
        if kind.update and running_mean is not None and running_var is not None:
            with torch.no_grad():
                running_mean.lerp_(centre.to(running_mean.dtype), momentum)
                running_var.lerp_((total * unbiased).to(running_var.dtype), momentum)

    if kind.norm == "batch" and group is not None:
        centre, total, values = distributed.combined(mean, var, kind.count, group)
        move(centre[0], total[0], values / (values - 1).clamp(min=1))
        return centre, total
    if kind.norm == "batch":
        between, centre = torch.var_mean(mean, 0, correction=0, keepdim=True)
        total = var.mean(0, keepdim=True) + between
        move(centre[0], total[0], n * kind.count / max(n * kind.count - 1, 1))
        return centre, total
    if kind.norm == "instance":
        if kind.update and running_mean is not None:
            move(mean.mean(0), var.mean(0), kind.count / max(kind.count - 1, 1))
        return mean, var
    if kind.norm not in ("group", "layer"):
        raise ValueError(f"the reference has no statistics for norm {kind.norm!r}")
    grouped_mean = mean.reshape(n, kind.groups, -1)
    centre = grouped_mean.mean(2, keepdim=True)
    grouped_var = var.reshape(n, kind.groups, -1)
    total = (grouped_var + (grouped_mean - centre).square()).mean(2, keepdim=True)
    wide = (n, kind.groups, channels // kind.groups)
    return centre.expand(wide).reshape(n, channels), total.expand(wide).reshape(n, channels)


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
    mean, var, stats, _, _, bias, *_ = tensors
    dtype = torch.float64 if kind.wide else torch.float32
    dropped = kind.dropout_position == "norm" and tensors.dropout_mask is not None
    seen: Statistics | None = None
    if stats is not None:
        centre, total = norm_statistics(kind, tensors, momentum, group)
        pivot = stats.detach()[0]
        if kind.norm == "batch" and not dropped:
            lifted = kind.activation_first or bias is None
            pivot = centre if lifted else centre - bias.to(centre.dtype)  # type: ignore[union-attr]
        seen = Statistics(centre, total, pivot.detach())
    elif kind.norm != "none":
        assert mean is not None and var is not None
        centre, total = mean.to(dtype).unsqueeze(0), var.to(dtype).unsqueeze(0)
        seen = Statistics(centre if dropped else None, total, centre.detach())
        if not kind.activation_first and bias is not None:
            seen = Statistics(centre, total, (centre - bias.to(dtype)).detach())
    return _rows(kind, tensors, seen, device)


def _rows(
    kind: Kind, tensors: TailTensors, seen: Statistics | None, device: torch.device
) -> Tensor:
    """``of_block`` behind the statistics; None: there is no norm."""
    dtype = torch.float64 if kind.wide else torch.float32
    weight, norm_bias, bias, gamma, beta, mask = (
        None if t is None else t.to(dtype) for t in (*tensors[3:6], *films(tensors))
    )

    def film(k: Tensor | None, c: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """(k, c) of k * x + c -> the same after the dropout in front of FiLM, and FiLM."""
        if mask is not None and kind.dropout_position == "film":
            k, c = _mul(k, mask), (None if c is None else c * mask)
            k = mask if k is None else k
        if gamma is not None:
            k, c = _mul(k, gamma), (None if c is None else c * gamma)
            k = gamma if k is None else k
        return k, _add(c, beta)

    if seen is None and mask is not None and kind.dropout_position == "norm":
        raise ValueError("dropout_position='norm' needs a norm")
    a = b = g = s = p = q = None
    k, c = None, None if kind.activation_first else bias
    if seen is not None:
        mean, var, pivot = seen
        inner = torch.rsqrt(var + kind.eps)
        if weight is not None:
            inner = inner * weight
        lifted = pivot if c is None else pivot + c
        k = inner
        if mask is not None and kind.dropout_position == "norm":
            lifted, k = lifted * mask, k * mask
        c = norm_bias if mean is None else _add((lifted - mean) * inner, norm_bias)
        p, q = (None, pivot) if kind.activation_first else (pivot, None)
    if kind.order == "conv-norm-film-act":
        a, b = film(k, c)
    elif kind.order == "conv-norm-act-film":
        a, b = k, c
        g, s = film(None, None)
    else:
        b = bias
        g, s = film(k, c)
    if mask is not None and kind.dropout_position == "end":
        g = _mul(g, mask)
        g = mask if g is None else g
        s = None if s is None else s * mask
    if tensors.slope is None:
        slope = torch.full((1, 1), kind.slope, dtype=dtype, device=device)
    else:
        slope = tensors.slope.to(dtype).reshape(1, -1)
    one, zero = _constants(dtype, device)
    defaults = (one, zero, one, zero, zero, zero, zero)
    rows = zip((a, b, g, s, p, q, slope), defaults, strict=True)
    shape = kind.batch, kind.channels
    return torch.stack([(d if r is None else r).expand(shape) for r, d in rows])


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
