"""The op that users call: convolution, normalisation, activation, channel dropout and FiLM as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backends, conv, pointwise, recipe, reference, spec
from .coefficients import coefficients
from .library import direct
from .tail import Tail, accumulate_dtype


@dataclass
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
        if _is_eager(self.plan):
            return materialise(self.raw, self.coef, self.act, plan=self.plan)
        return pointwise.materialise(self.raw, self.coef, self.act, self.plan)


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
    plan = plan or recipe.pointwise_plan(y)
    if _is_eager(plan) or y.numel() == 0:
        return _layout_of(y, reference.materialise(y, coef, act))
    return pointwise.materialise(y, coef, act, plan)


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
    plan = plan or recipe.pointwise_plan(y)
    if _is_eager(plan) or y.numel() == 0:
        return reference.moments(y, pre, act)
    return pointwise.moments(y, pre, act, plan)


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
        deferred: return the ``Pending`` map for the next convolution instead of a tensor, where that saves
            a pass (without gradients the composed route finishes its map in place and returns the tensor).

    Returns:
        [N, Co, *T] in x's dtype with channels-last strides (the reference backend keeps x's layout).

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
    raw, weight = _autocast(raw, weight)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    options: dict[str, Any] = {
        "norm": norm,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "num_groups": num_groups,
        "training": training,
        "eps": eps,
        "activation": activation,
        "slope": slope,
        "gamma": gamma,
        "beta": beta,
        "order": order,
        "dropout_mask": dropout_mask,
        "dropout_position": dropout_position,
    }
    how, tail = _recipe(raw, weight, bias, geometry, momentum, options)
    kind, plan, kernels, geometry = how.kind, how.plan, how.kernels, how.geometry
    if kernels is None:
        v = x.materialise().to(raw.dtype) if isinstance(x, Pending) else raw
        y = reference.convolution(
            v, weight, None if bias is None else bias.to(weight.dtype), *geometry
        )
        v = _layout_of(v, tail.eager(y))
        return _identity(v) if deferred else v

    coef, x_act = (x.coef, x.act) if isinstance(x, Pending) else (None, "none")
    # without gradients nobody needs the raw map, and finishing it in place beats a pass of its own later
    finish = how.composed and not torch.is_grad_enabled()
    added = None
    if bias is not None and (kind.activation_first or kind.norm == "none"):
        # added before the raw map is rounded, where a sum near 0 must keep its sign
        added = bias.to(raw.dtype)
        if kind.uses_input:
            # the op gives its gradient; only what rounding took from it is left for the coefficients
            exact = added.dtype == bias.dtype
            rest = None if exact else (bias.to(accumulate_dtype(raw)) - added).detach()
        else:
            # its gradient comes with the coefficients'
            added = added.detach()
            rest = bias.to(accumulate_dtype(raw)) - added
        bias = rest
    if kind.uses_input:
        pre = tail.pre(bias, raw, biased=added is not None)
        y, stats = conv.conv(
            raw, weight, added, coef, x_act, pre, kind.pre_activation, *geometry, True, plan
        )
        out_coef = tail.coefficients(raw, bias, stats, kernels)
    else:
        out_coef = tail.coefficients(raw, bias, None, kernels)
        if (not deferred or finish) and not _needs_grad(raw, weight, coef, out_coef):
            return conv.finished(
                raw, weight, added, coef, x_act, out_coef, kind.activation, *geometry, plan
            )
        y, _ = conv.conv(raw, weight, added, coef, x_act, None, "none", *geometry, False, plan)
    if finish:
        return pointwise.finish(y, out_coef, kind.activation, plan)
    pending = Pending(y, out_coef, kind.activation, plan)
    return pending if deferred else pending.materialise()


def norm_film(
    x: Tensor,
    *,
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
    """What ``conv_norm_film`` does behind its convolution, on a map that exists already.

    Args:
        x: feature map [N, C, H, W] or [N, C, D, H, W], any layout.
        norm: as in ``conv_norm_film``, like all the other arguments; ``order`` says where the activation
            and FiLM stand (its "conv" is ``x``).

    Returns:
        [N, C, *S] in x's dtype with channels-last strides, or the ``Pending`` map if ``deferred``.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``conv_norm_film``.

    Example:
        >>> import torch, fastfilm
        >>> x, gamma = torch.randn(2, 8, 6, 6), torch.rand(2, 8)
        >>> fastfilm.norm_film(x, norm="instance", activation="leaky_relu", gamma=gamma).shape
        torch.Size([2, 8, 6, 6])
    """
    options: dict[str, Any] = {
        "norm": norm,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "running_mean": running_mean,
        "running_var": running_var,
        "num_groups": num_groups,
        "training": training,
        "eps": eps,
        "activation": activation,
        "slope": slope,
        "gamma": gamma,
        "beta": beta,
        "order": order,
        "dropout_mask": dropout_mask,
        "dropout_position": dropout_position,
    }
    how, tail = _recipe(x, None, None, (), momentum, options)
    kind, plan, kernels = how.kind, how.plan, how.kernels
    if kernels is None:
        v = _layout_of(x, tail.eager(x))
        return _identity(v) if deferred else v
    stats = None
    if kind.uses_input:
        stats = moments(x, tail.pre(None, x), kind.pre_activation, plan=plan)
    coef = tail.coefficients(x, None, stats, kernels)
    pending = Pending(x, coef, kind.activation, plan)
    return pending if deferred else pending.materialise()


def _recipe(
    raw: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    momentum: float,
    options: dict[str, Any],
) -> tuple[recipe.Recipe, Tail]:
    """How a call is served, and its tail; the checks run for each form of call once."""
    known = isinstance(raw, Tensor) and direct(raw)
    found = None
    if known:
        key = (
            *map(recipe.form, (raw, weight, bias)),
            geometry,
            *map(recipe.form, options.values()),
            backends.forced(),
        )
        found = recipe.find(key)
    if found is None:
        if weight is None:
            found = recipe.of_map(raw, options)
        else:
            found = recipe.of_convolution(raw, weight, bias, *geometry, options)
        if known:
            recipe.keep(key, found)
    slope = options["slope"]
    return found, Tail(
        found.kind,
        momentum,
        options["norm_weight"],
        options["norm_bias"],
        options["running_mean"],
        options["running_var"],
        options["gamma"],
        options["beta"],
        options["dropout_mask"],
        slope.reshape(-1) if isinstance(slope, Tensor) else None,
    )


def _identity(v: Tensor) -> Pending:
    coef = coefficients(v.shape[0], v.shape[1], dtype=accumulate_dtype(v), device=v.device)
    return Pending(v, coef, "none", "reference/eager")


def _layout_of(x: Tensor, v: Tensor) -> Tensor:
    """``v`` channels-last if ``x`` is: some of PyTorch's norms fall back to contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=spec.channels_last_format(x.dim())):
        return v
    return spec.channels_last(v)


def _is_eager(plan: str) -> bool:
    return plan.endswith("/eager")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _autocast(raw: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where autocast is on."""
    if isinstance(raw, Tensor) and raw.dtype != torch.float64:
        device = raw.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            return raw.to(dtype), weight.to(dtype)
    return raw, weight
