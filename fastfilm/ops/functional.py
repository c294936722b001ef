"""The op that users call: convolution, normalisation, activation, channel dropout and FiLM as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import backends, reference, spec
from .coefficients import coefficients, norm_statistics
from .conv import stats_like


@dataclass(frozen=True)
class Pending:
    """A feature map of which only the raw part is in memory: v = g * (act(a * (y - p) + b) - q) + s.

    Attributes:
        raw: y [N, C, *S], channels-last.
        coef: rows a, b, g, s, p, q, slope [7, N, C], float32.
        act: name of the activation.
        plan: the backend that materialises it.
    """

    raw: Tensor
    coef: Tensor
    act: str
    plan: str

    @property
    def shape(self) -> torch.Size:
        """Shape of the feature map [N, C, *S]."""
        return self.raw.shape

    def materialise(self) -> Tensor:
        """The feature map itself [N, C, *S], in the raw map's dtype."""
        return materialise(self.raw, self.coef, self.act, plan=self.plan)


def materialise(y: Tensor, coef: Tensor, act: str = "none", *, plan: str | None = None) -> Tensor:
    """v = g * (act(a * (y - p) + b; slope) - q) + s, in one pass.

    Args:
        y: raw map [N, C, *S], float16, bfloat16, float32 or float64.
        coef: rows a, b, g, s, p, q, slope [7, N, C], float32 (float64 for a float64 map).
        act: one of ``fastfilm.ops.spec.ACTIVATIONS``.
        plan: backend choice; None chooses as ``conv_norm_film`` does.

    Returns:
        [N, C, *S], y's dtype, channels-last.
    """
    spec.check_feature_map("y", y)
    act = spec.choice("act", act, spec.ACTIVATIONS)
    if coef.shape != (spec.COEF_ROWS, *y.shape[:2]):
        raise ValueError(
            f"coef must have shape {(spec.COEF_ROWS, *y.shape[:2])}, got {tuple(coef.shape)}"
        )
    spec.check_same_device(y=y, coef=coef)
    plan = plan or _pointwise_plan(y)
    if _is_eager(plan) or y.numel() == 0:
        return spec.channels_last(reference.materialise(y, coef, act))
    return torch.ops.fastfilm.materialise(y, coef, act, plan)


def moments(
    y: Tensor, pre: Tensor | None = None, act: str = "none", *, plan: str | None = None
) -> Tensor:
    """Mean and biased variance over space, per sample and channel, of act(y + shift).

    Args:
        y: feature map [N, C, *S].
        pre: None, or [2, C] float32: shift and slope of ``act``.
        act: activation in front of the norm.

    Returns:
        [2, N, C] mean and variance, float32 (float64 for a float64 map).
    """
    spec.check_feature_map("y", y)
    act = spec.choice("act", act, spec.ACTIVATIONS)
    if pre is not None and pre.shape != (2, y.shape[1]):
        raise ValueError(f"pre must have shape (2, {y.shape[1]}), got {tuple(pre.shape)}")
    plan = plan or _pointwise_plan(y)
    if _is_eager(plan) or y.numel() == 0:
        return reference.moments(y, pre, act)
    return torch.ops.fastfilm.moments(y, pre, act, plan)


def conv_norm_film(
    x: Tensor | Pending,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int | Sequence[int] = 0,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_groups: int | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    slope: float | Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    order: str = "conv-norm-film-act",
    dropout_mask: Tensor | None = None,
    dropout_position: str = "end",
    deferred: bool = False,
) -> Tensor | Pending:
    """Convolution, normalisation, activation, channel dropout and FiLM as one differentiable op.

    FiLM is γ·u + β per sample and channel (Perez et al. 2018, eq. 2; Lemay et al. 2021).

    Args:
        x: input [N, Ci, H, W] or [N, Ci, D, H, W], any layout, float16/bfloat16/float32/float64; or the
            ``Pending`` map that an earlier call returned.
        weight: [Co, Ci/groups, *K], or [Ci, Co/groups, *K] if ``transposed``; x's dtype.
        bias: [Co] or None.
        stride, padding, dilation, output_padding: an integer or one per spatial dimension, as in
            ``torch.nn.functional.conv2d``; kernel sizes come from ``weight``.
        norm: None, "batch", "instance", "group" (with ``num_groups``) or "layer" (one group).
        norm_weight, norm_bias: [Co] affine of the norm, each optional.
        running_mean, running_var: [Co]; batch and instance norm update them in place in training and use
            them in evaluation, as PyTorch does.
        training: use the statistics of the batch (batch norm; instance norm with running statistics).
        activation: None, "relu", "leaky_relu", "prelu", "elu", "silu", "gelu" (erf) or "gelu_tanh".
        slope: negative slope (leaky_relu: 0.01; prelu: tensor [1] or [Co]) or alpha of elu (1.0).
        gamma, beta: [N, Co], [1, Co] or [Co], any floating point dtype; each optional.
        order: "conv-norm-film-act", "conv-norm-act-film" or "conv-act-norm-film".
        dropout_mask: channel dropout, [N, Co], already divided by 1 - p.
        dropout_position: "end" (default), "film" (in front of FiLM) or "norm" (in front of the norm).
        deferred: return the ``Pending`` map for the next convolution instead of a tensor.

    Returns:
        [N, Co, *T] in x's dtype with channels-last strides.

    Raises:
        TypeError: integer images, tensors of mixed dtypes.
        ValueError: shapes, devices or names that do not fit; the message names the argument.
        NotImplementedError: the forced backend cannot serve the call.

    Example:
        >>> import torch, fastfilm
        >>> x, weight = torch.randn(2, 3, 16, 16), torch.randn(8, 3, 3, 3)
        >>> gamma, beta = torch.rand(2, 8), torch.rand(2, 8)
        >>> y = fastfilm.conv_norm_film(x, weight, padding=1, norm="instance", activation="relu",
        ...                             gamma=gamma, beta=beta)
        >>> y.shape
        torch.Size([2, 8, 16, 16])
    """
    raw = x.raw if isinstance(x, Pending) else x
    dims = spec.check_feature_map("x", raw)
    raw, weight = _autocast(raw, weight)
    norm = spec.choice("norm", norm, spec.NORMS)
    act = spec.choice("activation", activation, spec.ACTIVATIONS)
    order = spec.choice("order", order, spec.ORDERS)
    dropout_position = spec.choice("dropout_position", dropout_position, spec.DROPOUT_POSITIONS)
    stride = spec.as_tuple("stride", stride, dims, 1)
    padding = spec.as_tuple("padding", padding, dims)
    dilation = spec.as_tuple("dilation", dilation, dims, 1)
    output_padding = spec.as_tuple("output_padding", output_padding, dims)
    channels = _check_weight(raw, weight, groups, transposed)
    for name, vector in (
        ("bias", bias),
        ("norm_weight", norm_weight),
        ("norm_bias", norm_bias),
        ("running_mean", running_mean),
        ("running_var", running_var),
    ):
        spec.check_channel_vector(name, vector, channels)
    batch = raw.shape[0]
    gamma = spec.check_film("gamma", gamma, batch, channels)
    beta = spec.check_film("beta", beta, batch, channels)
    dropout_mask = spec.check_film("dropout_mask", dropout_mask, batch, channels)
    slope = _check_slope(act, slope, channels)
    spec.check_same_device(
        x=raw,
        weight=weight,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        running_mean=running_mean,
        running_var=running_var,
        gamma=gamma,
        beta=beta,
        dropout_mask=dropout_mask,
        slope=slope if isinstance(slope, Tensor) else None,
    )
    if norm == "group" and (num_groups is None or num_groups < 1 or channels % num_groups):
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must be given together")
    if norm == "batch" and not training and running_mean is None:
        raise ValueError("norm='batch' with training=False needs running_mean and running_var")
    if dropout_mask is not None and dropout_position == "norm" and norm == "none":
        raise ValueError("dropout_position='norm' needs a norm")
    size = spec.conv_output_size(
        raw.shape[2:], weight.shape[2:], stride, padding, dilation, transposed, output_padding
    )
    if any(s < 0 for s in size) or (min(size) == 0 and raw.numel() > 0 and not transposed):
        raise ValueError(
            f"kernel {tuple(weight.shape[2:])} is larger than the padded input {tuple(raw.shape[2:])}"
            f" (padding {padding})"
        )
    uses_input = norm in ("group", "layer") or (
        norm == "batch" and training or norm == "instance" and (training or running_mean is None)
    )
    _check_count(norm, uses_input, batch, channels, num_groups, size)

    plan = backends.choose(
        backends.Request(
            device=raw.device.type,
            dtype=raw.dtype,
            dims=dims,
            kernel=tuple(weight.shape[2:]),
            stride=stride,
            dilation=dilation,
            groups=groups,
            transposed=transposed,
            channels=(raw.shape[1], channels),
            output=tuple(size),
            batch=batch,
        )
    )
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if _is_eager(plan) or raw.numel() == 0 or 0 in size or weight.numel() == 0:
        v = x.materialise().to(raw.dtype) if isinstance(x, Pending) else raw
        y = reference.convolution(
            v, weight, None if bias is None else bias.to(weight.dtype), *geometry
        )
        v = reference.block_tail(
            y,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            running_mean=running_mean,
            running_var=running_var,
            num_groups=num_groups,
            training=training,
            momentum=momentum,
            eps=eps,
            act=act,
            slope=slope,
            gamma=gamma,
            beta=beta,
            order=order,
            dropout_mask=dropout_mask,
            dropout_position=dropout_position,
        )
        v = spec.channels_last(v)
        return _identity(v) if deferred else v

    coef, x_act = (x.coef, x.act) if isinstance(x, Pending) else (None, "none")
    act_first = order == "conv-act-norm-film"
    pre = None
    if act_first and uses_input and (act != "none" or bias is not None):
        pre = _pre_activation(bias, slope, channels, stats_like(raw).dtype, raw.device)
    pre_act = act if act_first else "none"
    tail = {
        "eps": eps,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "conv_bias": bias,
        "gamma": gamma,
        "beta": beta,
        "slope": slope,
        "order": order,
        "dropout_mask": dropout_mask,
        "dropout_position": dropout_position,
        "dtype": torch.float64 if raw.dtype == torch.float64 else torch.float32,
        "device": raw.device,
    }
    if not uses_input:
        known = {}
        if norm != "none":
            assert running_mean is not None and running_var is not None
            centre = running_mean.to(tail["dtype"]).unsqueeze(0)
            pivot = centre if act_first or bias is None else centre - bias.to(tail["dtype"])
            known = {
                "mean": centre,
                "var": running_var.to(tail["dtype"]).unsqueeze(0),
                "pivot": pivot.detach(),
            }
        out_coef = coefficients(batch, channels, **known, **tail)
        if not deferred and not _needs_grad(raw, weight, coef, out_coef):
            return torch.ops.fastfilm.conv_apply(
                raw, weight, coef, x_act, out_coef, act, *geometry, plan
            )
        y, _ = torch.ops.fastfilm.conv(
            raw, weight, coef, x_act, None, "none", *geometry, False, plan
        )
    else:
        y, stats = torch.ops.fastfilm.conv(
            raw, weight, coef, x_act, pre, pre_act, *geometry, True, plan
        )
        mask = dropout_mask if dropout_position == "norm" else None
        mean, var = norm_statistics(
            stats,
            norm,
            math.prod(size),
            running_mean=running_mean,
            running_var=running_var,
            num_groups=num_groups,
            training=training,
            momentum=momentum,
            shift=None if act_first else bias,
            scale=None if mask is None else mask.to(stats.dtype),
        )
        pivot = stats[0].detach()
        if norm == "batch" and mask is None:
            pivot = (mean if act_first or bias is None else mean - bias.to(mean.dtype)).detach()
        out_coef = coefficients(batch, channels, mean=mean, var=var, pivot=pivot, **tail)
    pending = Pending(y, out_coef, act, plan)
    return pending if deferred else pending.materialise()


def _identity(v: Tensor) -> Pending:
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    coef = coefficients(v.shape[0], v.shape[1], dtype=dtype, device=v.device)
    return Pending(v, coef, "none", "reference/eager")


def _is_eager(plan: str) -> bool:
    return plan.endswith("/eager")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _pointwise_plan(y: Tensor) -> str:
    dims = y.dim() - 2
    one = (1,) * dims
    return backends.choose(backends.Request(y.device.type, y.dtype, dims, one, one, one))


def _autocast(raw: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where autocast is on; TypeError if their dtypes differ otherwise."""
    device = raw.device.type
    if torch.is_autocast_enabled(device) and raw.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return raw.to(dtype), weight.to(dtype)
    if weight.dtype != raw.dtype:
        raise TypeError(
            f"weight must have x's dtype {raw.dtype}, got {weight.dtype} (use torch.autocast to mix them)"
        )
    return raw, weight


def _check_weight(raw: Tensor, weight: Tensor, groups: int, transposed: bool) -> int:
    """Output channels; ValueError if the weight does not fit the input."""
    if weight.dim() != raw.dim():
        raise ValueError(
            f"weight must have {raw.dim()} dimensions for an input {tuple(raw.shape)}, got {tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive integer, got {groups!r}")
    expected = weight.shape[0] if transposed else weight.shape[1] * groups
    if raw.shape[1] != expected:
        raise ValueError(
            f"x must have {expected} channels for weight {tuple(weight.shape)} and groups {groups},"
            f" got {raw.shape[1]}"
        )
    if weight.shape[0] % groups:
        raise ValueError(f"groups must divide weight.shape[0] = {weight.shape[0]}, got {groups}")
    return weight.shape[1] * groups if transposed else weight.shape[0]


def _check_slope(act: str, slope: float | Tensor | None, channels: int) -> float | Tensor | None:
    if act not in spec.DEFAULT_SLOPE:
        if slope is not None:
            raise ValueError(f"slope has no meaning for activation {act!r}, got {slope!r}")
        return None
    if slope is None:
        return spec.DEFAULT_SLOPE[act]
    if isinstance(slope, Tensor):
        if slope.numel() not in (1, channels) or slope.dim() > 1 or not slope.is_floating_point():
            raise ValueError(
                f"slope must be floating point with 1 or {channels} values, got {slope.dtype} {tuple(slope.shape)}"
            )
        return slope.reshape(-1)
    return float(slope)


def _check_count(
    norm: str, uses_input: bool, batch: int, channels: int, num_groups: int | None, size: Sequence[int]
) -> None:
    """PyTorch's refusal to normalise a single value."""
    if not uses_input or batch == 0:
        return
    voxels = math.prod(size)
    shape = (batch, channels, *size)
    if norm == "batch" and batch * voxels == 1:
        raise ValueError(f"norm='batch' needs more than 1 value per channel when training, got {shape}")
    if norm == "instance" and voxels == 1:
        raise ValueError(f"norm='instance' needs more than 1 spatial element, got {shape}")
    if norm in ("group", "layer"):
        groups = num_groups if norm == "group" else 1
        assert groups is not None
        if batch * (channels // groups) * voxels == 1:
            raise ValueError(f"norm={norm!r} needs more than 1 value per group, got {shape}")


def _pre_activation(
    bias: Tensor | None,
    slope: float | Tensor | None,
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """[2, C]: shift and slope of an activation in front of the norm."""
    zero = torch.zeros(channels, dtype=dtype, device=device)
    shift = zero if bias is None else bias.to(dtype)
    if isinstance(slope, Tensor):
        row = slope.to(dtype).expand(channels)
    else:
        row = zero if slope is None else torch.full_like(zero, slope)
    return torch.stack([shift, row])
