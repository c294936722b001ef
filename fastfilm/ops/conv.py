"""The convolution op: pending affine of its input in front, moments of its output behind.

    y, stats = conv(x, weight, bias, coef, act, pre, pre_act, …)

x is the producer's raw map; coef and act say what is pending on it (None: nothing). bias is added
before y is rounded to its dtype, by the plans of which ``adds_bias`` says so; it has a gradient where there are
moments with ``pre`` (whose shift is then a constant), and is a constant otherwise. Only x, y and
[N, C]-sized numbers are kept for backward; the activated input is recomputed. In backward

    e   = dy + du/dy · (dmean + 2 (u - mean) dvar) / |S|      gradient at the raw output
    dv  = convᵀ(e, W),   dW = Σ v ⊗ e
    dx, dcoef from dv and x by the chain rule of the affine

PyTorch differentiates everything that happens to the moments afterwards, so the normalisation's
backward arrives as dmean and dvar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import higher, spec, vendor
from .backends import BACKENDS
from .library import define, differentiable, direct
from .tail import accumulate_dtype

_CONV = (
    "Tensor weight, Tensor? bias, Tensor? coef, str act, Tensor? pre, str pre_act, int[] stride, int[] padding,"
    " int[] dilation, bool transposed, int[] output_padding, int groups, bool moments, str plan"
)


def adds_bias(plan: str) -> bool:
    """Whether a plan's convolution adds its bias; elsewhere y lacks it, and it is pending behind y.

    A GPU's vendor would add it in a pass of its own, over the rounded map, and our passes read that map anyway.
    """
    return not plan.endswith("/composed") or plan.startswith("cpu/")


def stats_like(y: Tensor) -> Tensor:
    """Uninitialised [2, N, C] for the moments of ``y``."""
    shape = (2, y.shape[0], y.shape[1])
    return torch.empty(shape, dtype=accumulate_dtype(y), device=y.device)


def raw_like(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised channels-last feature map of ``shape`` beside ``x``."""
    return torch.empty(
        tuple(shape),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=spec.channels_last_format(len(shape)),
    )


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """No numbers, in place of a result that is not wanted; tensor classes may redefine ``new_empty``."""
    return (
        like.new_empty(0)
        if type(like) is Tensor and dtype is None
        else Tensor.new_empty(like, 0, dtype=dtype)
    )


def laid_out_like(grad: Tensor, weight: Tensor) -> Tensor:
    """A weight's gradient with the strides of ``torch.empty_like(weight)``, as the shape function promises."""
    if grad.stride() == weight.stride():
        return grad
    like = torch.empty_like(weight)
    return grad if grad.stride() == like.stride() else like.copy_(grad)


def _convolution(
    kernels: ModuleType,
    v: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Any, ...],
    keep: spec.Keep | None = None,
) -> Tensor:
    """The composed route's convolution, channels-last: the backend's own where it is the faster one."""
    if hasattr(kernels, "convolve") and kernels.covers_convolution(
        v, weight, geometry, packed=keep is not None
    ):
        y: Tensor = kernels.convolve(v, weight, bias, geometry[1], stride=geometry[0], keep=keep)
        return y
    return spec.channels_last(vendor.convolution(v, weight, bias, *geometry, keep))  # type: ignore[call-arg]


def _gradients(
    kernels: ModuleType,
    e: Tensor,
    v: Tensor,
    weight: Tensor,
    geometry: tuple[Any, ...],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The composed route's gradients at the map and at the weight, each the backend's own where it is faster."""
    dgrad = wgrad = False
    if hasattr(kernels, "covers_gradients"):
        dgrad, wgrad = kernels.covers_gradients(v, weight, geometry)
    stride, padding, _, transposed, *_ = geometry
    rest = needs[0] and not dgrad, needs[1] and not wgrad
    dv = dw = None
    if any(rest):
        dv, dw = vendor.convolution_backward(e, v, weight, *geometry, rest)  # type: ignore[call-arg]
    if needs[0] and dgrad:
        if transposed:
            dv = kernels.convolve(e, weight, None, padding, stride=stride)
        else:
            dv = kernels.convolve_dgrad(e, weight, padding)
    if needs[1] and wgrad:
        given, read = (v, e) if transposed else (e, v)
        dw = kernels.convolve_wgrad(given, read, weight, padding, stride)
    return dv, dw


def conv_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    act: str,
    pre: Tensor | None,
    pre_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    moments: bool,
    plan: str,
    keep: spec.Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """Implementation of ``fastfilm::conv``; see the module docstring.

    Args:
        keep: where the vendor's form of the weight is kept, if anywhere.
    """
    name, route = plan.split("/")
    kernels = BACKENDS[name].kernels()
    x = spec.channels_last(x)
    if route == "fused":
        return kernels.fprop(
            x, weight, bias, coef, act, pre, pre_act, tuple(stride), tuple(padding), moments
        )
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    added = bias if adds_bias(plan) else None
    return composed(kernels, x, weight, added, coef, act, pre, pre_act, geometry, moments, keep)


def composed(
    kernels: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    act: str,
    pre: Tensor | None,
    pre_act: str,
    geometry: tuple[Any, ...],
    moments: bool,
    keep: spec.Keep | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution between passes of ``kernels``; ``bias`` is added before y is rounded."""
    v = x if coef is None else kernels.apply(x, coef, act)
    y = _convolution(kernels, v, weight, bias, geometry, keep)
    stats = kernels.moments(y, pre, pre_act) if moments else absent(y, torch.float32)
    return y, stats


def _conv_gradients(
    dy: Tensor,
    dstats: Tensor,
    x: Tensor,
    weight: Tensor,
    coef: Tensor | None,
    act: str,
    pre: Tensor | None,
    pre_act: str,
    y: Tensor | None,
    stats: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    plan: str,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dcoef, dpre; None where not needed.

    With moments and ``pre``, dpre's first row is the gradient of the bias.
    """
    name, route = plan.split("/")
    kernels = BACKENDS[name].kernels()
    x, e = spec.channels_last(x), spec.channels_last(dy)
    dx = dweight = dcoef = dpre = None
    if y is not None and stats is not None:
        e, dpre = kernels.moments_backward(e, dstats, y, stats, pre, pre_act)
    if route == "fused":
        if need_input:
            dx, dcoef = kernels.dgrad(e, weight, x, coef, act, tuple(stride), tuple(padding))
        if need_weight:
            dw = kernels.wgrad(e, x, weight, coef, act, tuple(stride), tuple(padding))
            dweight = laid_out_like(dw, weight)
        return dx, dweight, dcoef, dpre
    v = x if coef is None else kernels.apply(x, coef, act)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    dv, dw = _gradients(kernels, e, v, weight, geometry, (need_input, need_weight))
    if need_weight:
        assert dw is not None
        dweight = laid_out_like(dw, weight)
    if need_input:
        assert dv is not None
        dx = spec.channels_last(dv)
        if coef is not None:
            del v
            dx, dcoef = kernels.apply_backward(dx, x, coef, act, in_place=True)
    return dx, dweight, dcoef, dpre


def conv_bwd(dy: Tensor, dstats: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Implementation of ``fastfilm::conv_backward``: dx, dweight, dcoef, dpre (empty where not needed)."""
    found = _conv_gradients(dy, dstats, x, *rest)
    return tuple([absent(x) if t is None else t for t in found])


def _output_shape(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> list[int]:
    size = spec.conv_output_size(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, transposed, output_padding
    )
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    return [x.shape[0], channels, *size]


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    act: str,
    pre: Tensor | None,
    pre_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    moments: bool,
    plan: str,
) -> tuple[Tensor, Tensor]:
    y = raw_like(
        x, _output_shape(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    )
    return y, stats_like(y) if moments else absent(y, torch.float32)


def _conv_bwd_fake(
    dy: Tensor,
    dstats: Tensor,
    x: Tensor,
    weight: Tensor,
    coef: Tensor | None,
    act: str,
    pre: Tensor | None,
    pre_act: str,
    y: Tensor | None,
    stats: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_input, need_weight = rest[-2:]
    return (
        raw_like(x, x.shape) if need_input else absent(x),
        torch.empty_like(weight) if need_weight else absent(x),
        torch.empty_like(coef) if coef is not None and need_input else absent(x),
        torch.empty_like(pre) if pre is not None and y is not None else absent(x),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, coef, act, pre, pre_act, *rest = inputs
    *conv, moments, plan = rest
    y, stats = output if moments else (None, None)
    ctx.save_for_backward(x, weight, coef, pre, y, stats)
    ctx.act, ctx.pre_act, ctx.conv, ctx.plan = act, pre_act, conv, plan


def _backward(ctx: Any, dy: Tensor, dstats: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, coef, pre, y, stats = ctx.saved_tensors
    need_input = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
    need_weight = ctx.needs_input_grad[1]
    # with create_graph the operator is the one that has a second derivative
    short = direct(dy) and not torch.is_grad_enabled()
    op: Callable[..., Any] = _conv_gradients if short else torch.ops.fastfilm.conv_backward
    dx, dweight, dcoef, dpre = op(
        dy,
        dstats,
        x,
        weight,
        coef,
        ctx.act,
        pre,
        ctx.pre_act,
        y,
        stats,
        *ctx.conv,
        ctx.plan,
        need_input,
        need_weight,
    )
    if dpre is not None and not dpre.numel():
        dpre = None
    return (
        dx if ctx.needs_input_grad[0] else None,
        dweight if need_weight else None,
        dpre[0].to(dy.dtype) if ctx.needs_input_grad[2] and dpre is not None else None,
        dcoef if ctx.needs_input_grad[3] else None,
        None,
        dpre if ctx.needs_input_grad[5] else None,
        *(None,) * 9,
    )


def conv_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    act: str,
    out_coef: Tensor,
    out_act: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    plan: str,
    keep: spec.Keep | None = None,
) -> Tensor:
    """Implementation of ``fastfilm::conv_apply``: the finished block where its affine is known (inference).

    Args:
        keep: where the vendor's form of the weight is kept, if anywhere.
    """
    name, route = plan.split("/")
    kernels = BACKENDS[name].kernels()
    x = spec.channels_last(x)
    if route == "fused":
        return kernels.fprop_apply(
            x, weight, bias, coef, act, out_coef, out_act, tuple(stride), tuple(padding)
        )
    v = x if coef is None else kernels.apply(x, coef, act)
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    if hasattr(kernels, "convolve") and kernels.covers_convolution(
        v, weight, geometry, True, keep is not None
    ):
        affine = out_coef, out_act
        finished: Tensor = kernels.convolve(v, weight, bias, padding, *affine, stride, keep)
        return finished
    # what the backend does not finish it does not convolve either: the rule only widens
    y = spec.channels_last(vendor.convolution(v, weight, bias, *geometry, keep))
    return kernels.apply(y, out_coef, out_act, in_place=True)


def _conv_apply_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    stride, padding, dilation, transposed, output_padding, groups = rest[5:11]
    return raw_like(
        x, _output_shape(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    )


define(
    f"conv(Tensor x, {_CONV}) -> (Tensor, Tensor)",
    conv_fwd,
    _conv_fake,
    backward=_backward,
    setup=_setup,
    cast=3,
)
define(
    "conv_backward(Tensor dy, Tensor dstats, Tensor x, Tensor weight, Tensor? coef, str act, Tensor? pre,"
    " str pre_act, Tensor? y, Tensor? stats, int[] stride, int[] padding, int[] dilation, bool transposed,"
    " int[] output_padding, int groups, str plan, bool need_input, bool need_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    conv_bwd,
    _conv_bwd_fake,
    backward=higher.conv_backward_backward,
    setup=higher.conv_backward_setup,
)
define(
    "conv_apply(Tensor x, Tensor weight, Tensor? bias, Tensor? coef, str act, Tensor out_coef,"
    " str out_act, int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding,"
    " int groups, str plan) -> Tensor",
    conv_apply,
    _conv_apply_fake,
    cast=3,
)

_eager_conv = differentiable(conv_fwd, _setup, _backward)


def conv(*args: Any, short: bool, keep: spec.Keep | None = None) -> tuple[Tensor, Tensor]:
    """``fastfilm::conv``; ``short``: all its tensors are ``direct``."""
    if short and not torch.is_grad_enabled():
        return conv_fwd(*args, keep=keep)  # type: ignore[misc]
    y, stats = (_eager_conv if short else torch.ops.fastfilm.conv)(*args)
    return y, stats


def finished(*args: Any, short: bool, keep: spec.Keep | None = None) -> Tensor:
    """``fastfilm::conv_apply``; ``short``: all its tensors are ``direct``."""
    if short and not torch.is_grad_enabled():
        return conv_apply(*args, keep=keep)  # type: ignore[misc]
    v: Tensor = torch.ops.fastfilm.conv_apply(*args)
    return v
