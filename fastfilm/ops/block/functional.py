"""``conv_norm_film`` and ``norm_film``: convolution, norm, activation, channel dropout and FiLM in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .. import choice, reference, spec
from ..maps.deferred import DeferredMap, Map, plain
from ..operators import pointwise
from ..reference import distributed
from ..spec import Geometry, NormInput, Options, Plan, TailTensors, layout_of, subclasses
from .run import Call, run
from .tail import Moving


@subclasses.unwrapping
def materialise(y: Tensor, coef: Tensor, act: str = "none", *, plan: Plan | None = None) -> Tensor:
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
    plan = plan or choice.for_pass(y)
    if plan.route == "eager" or y.numel() == 0:
        return layout_of(y, reference.materialise(y, coef, act))
    return pointwise.written(y, coef, act, plan)


@subclasses.unwrapping
def moments(
    y: Tensor, pre: Tensor | None = None, act: str = "none", *, plan: Plan | None = None
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
    plan = plan or choice.for_pass(y)
    if plan.route == "eager" or y.numel() == 0:
        return reference.moments(y, pre, act)
    return pointwise.moments_of(y, NormInput(pre, act), plan)


def conv_norm_film(
    x: Map,
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
    deferred: bool | str = False,
    sync_group: distributed.Group = None,
) -> Tensor | DeferredMap:
    """Convolution, normalisation, activation, channel dropout and FiLM as one differentiable op.

    FiLM is γ·u + β per sample and channel (Perez et al. 2018, eq. 2; Lemay et al. 2021).

    Args:
        x: input [N, Ci, H, W] or [N, Ci, D, H, W], any layout, float16/bfloat16/float32/float64; or the
            ``DeferredMap`` that an earlier call returned.
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
        deferred: return the ``DeferredMap`` for the next convolution instead of a tensor, where that saves
            a pass (without gradients the composed route finishes its map in place and returns the tensor,
            unless "always" is given: for residual additions, see ``fastfilm.ops.add_act``).
        sync_group: processes over whose batches together batch norm takes its statistics in training: a process
            group, or True for the default one. Ignored where none is initialised.

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
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a torch.Tensor, got {type(weight).__name__}")
    spec.check_number("momentum", momentum)
    group = _group(sync_group, norm, training)
    number, learned = _slope(slope)
    options = Options(
        *(norm, num_groups, training, eps, activation, number),
        *(order, dropout_position, group is not None),
    )
    tensors = TailTensors(
        *(running_mean, running_var, None, norm_weight, norm_bias, bias),
        *(gamma, beta, dropout_mask, learned),
    )
    geometry = Geometry(stride, padding, dilation, transposed, output_padding, groups)  # type: ignore[arg-type]
    moving = Moving(momentum, group)
    return run(x, Call(weight, geometry, options, tensors, moving, deferred))


def norm_film(
    x: Map,
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
    sync_group: distributed.Group = None,
) -> Tensor | DeferredMap:
    """``conv_norm_film`` without its convolution, on a map that exists already.

    Args:
        x: feature map [N, C, H, W] or [N, C, D, H, W], any layout.
        norm: as in ``conv_norm_film``, like all the other arguments; ``order`` says where the activation
            and FiLM stand (its "conv" is ``x``).

    Returns:
        [N, C, *S] in x's dtype with channels-last strides, or the ``DeferredMap`` if ``deferred``.

    Raises:
        TypeError, ValueError, NotImplementedError: as ``conv_norm_film``.

    Example:
        >>> import torch, fastfilm
        >>> x, gamma = torch.randn(2, 8, 6, 6), torch.rand(2, 8)
        >>> fastfilm.norm_film(x, norm="instance", activation="leaky_relu", gamma=gamma).shape
        torch.Size([2, 8, 6, 6])
    """
    if not isinstance(x, Map):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    spec.check_number("momentum", momentum)
    group = _group(sync_group, norm, training)
    number, learned = _slope(slope)
    options = Options(
        *(norm, num_groups, training, eps, activation, number),
        *(order, dropout_position, group is not None),
    )
    tensors = TailTensors(
        *(running_mean, running_var, None, norm_weight, norm_bias, None),
        *(gamma, beta, dropout_mask, learned),
    )
    moving = Moving(momentum, group)
    return run(plain(x), Call(None, None, options, tensors, moving, deferred))


def _slope(slope: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A slope as a number or as a learned tensor."""
    return (None, slope) if isinstance(slope, Tensor) else (slope, None)


def _group(
    sync_group: distributed.Group, norm: str | None, training: bool
) -> dist.ProcessGroup | None:
    """Processes to synchronise with: batch norm in training asks others."""
    return distributed.active(sync_group) if training and norm == "batch" else None
