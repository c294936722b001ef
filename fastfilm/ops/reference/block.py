"""The definition of right: the whole op and each of its parts in eager, differentiable PyTorch.

Works on any device, in any floating point type including float64, and to any order of derivative (behind
PyTorch's own norms in ``normalise``: to the second; their third derivatives are wrong).
Tests and benchmarks import it; the ``reference`` backend runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import spec
from ..spec import Addends


def activation(x: Tensor, name: str, slope: Tensor | float | None = None) -> Tensor:
    """Activation ``name`` (see ``spec.ACTIVATIONS``) of ``x`` [N, C, *S].

    Args:
        slope: negative slope (leaky_relu, prelu) or alpha (elu): a number, or a tensor that
            broadcasts against ``x``.
    """
    if name == "none":
        return x
    if name == "relu":
        return torch.relu(x)
    if slope is None:
        slope = spec.DEFAULT_SLOPE.get(name, 0.0)
    if name in ("leaky_relu", "prelu"):
        return torch.where(x > 0, x, x * slope)
    if name == "elu":
        # exp only of the negative part: a large positive x must not turn the gradient into NaN
        # (``clamp`` has no gradient at its bound from PyTorch 2.14 on)
        return torch.where(x > 0, x, slope * torch.expm1(torch.where(x > 0, 0.0, x)))
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    raise ValueError(f"activation must be one of {', '.join(spec.ACTIVATIONS)}, got {name!r}")


def spread(t: Tensor, ndim: int) -> Tensor:
    """[..., C] -> [..., C, 1, 1(, 1)] for a feature map of ``ndim`` dimensions."""
    return t.reshape(t.shape + (1,) * (ndim - 2))


def materialise(y: Tensor, coef: Tensor, act: str) -> Tensor:
    """v = g * (act(a * (y - p) + b) - q) + s.

    Args:
        y: raw feature map [N, C, *S].
        coef: coefficients [7, N, C], rows a, b, g, s, p, q, slope (``spec.A`` …).
        act: activation name.

    Returns:
        [N, C, *S] in y's dtype; computed in coef's dtype.
    """
    return _affine(y, coef, act).to(y.dtype)


def _affine(y: Tensor, coef: Tensor, act: str) -> Tensor:
    """``materialise`` before it is rounded to y's dtype."""
    a, b, g, s, p, q, slope = (spread(row, y.dim()) for row in coef)
    z = a * (y.to(coef.dtype) - p) + b
    return g * (activation(z, act, slope) - q) + s


def residual(addends: Addends) -> Tensor:
    """v = outer(M(y; coef, act) + M(other; other_coef, "none"); slope), M being ``materialise``.

    Returns:
        [N, C, *S] in y's dtype; computed in float32, or float64 for a float64 ``y``.
    """
    y, coef, act, other, other_coef, slope, outer = addends
    wide = spec.accumulate_dtype(y)
    first = y.to(wide) if coef is None else _affine(y, coef, act)
    second = other.to(wide) if other_coef is None else _affine(other, other_coef, "none")
    parameter = 0.0 if slope is None else spread(slope.to(wide), y.dim())
    return activation(first + second, outer, parameter).to(y.dtype)


def moments(y: Tensor, pre: Tensor | None = None, act: str = "none") -> Tensor:
    """Mean and biased variance over space of u = act(y + shift), per sample and channel.

    Args:
        y: raw feature map [N, C, *S].
        pre: None, or [2, C]: shift and slope of the activation in front of the norm.
        act: activation in front of the norm.

    Returns:
        [2, N, C]: mean and variance, float32 (float64 for a float64 ``y``).
    """
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    u = y.to(dtype)
    if pre is not None:
        shift, slope = spread(pre.to(dtype), y.dim())
        u = activation(u + shift, act, slope)
    space = tuple(range(2, y.dim()))
    mean = u.mean(space)
    centred = u - spread(mean, y.dim())
    return torch.stack([mean, (centred * centred).mean(space)])


class _ContiguousGrad(torch.autograd.Function):
    """Identity with a contiguous gradient, under ``torch.func`` transforms too.

    PyTorch 2.13's instance norm returns a wrong gradient on the CPU for a batch of one when the gradient
    arrives channels-last (relative error above 1 in float64).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class _ContiguousGradForward(_ContiguousGrad):
    """``_ContiguousGrad`` inside forward-mode differentiation; Dynamo follows no function with a ``jvp``."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def _mixes(u: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether PyTorch's norms take these types: all that of ``u``, or all float32 beside a 16-bit ``u``."""
    types = {t.dtype for t in tensors if t is not None}
    return types <= {u.dtype} or (types == {torch.float32} and u.dtype.itemsize == 2)


def _negated(*tensors: Tensor | None) -> bool:
    return not torch.compiler.is_compiling() and any(t is not None and t.is_neg() for t in tensors)


def normalise(
    u: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_groups: int | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """PyTorch's own normalisation ``norm`` of ``u`` [N, C, *S]; updates running statistics in place."""
    if norm == "none" or (norm == "instance" and u.shape[0] == 0):
        return u
    tensors = (weight, bias, running_mean, running_var)
    if norm in ("group", "layer") and u.device.type == "cuda":
        given = [t.dtype for t in (weight, bias) if t is not None]
        wide = functools.reduce(torch.promote_types, given, u.dtype)
        if {*given, u.dtype} != {wide}:  # PyTorch's kernel takes one type alone
            w, b = (None if t is None else t.to(wide) for t in (weight, bias))
            rest = num_groups, training, momentum, eps
            return normalise(u.to(wide), norm, w, b, None, None, *rest).to(u.dtype)
    if not _mixes(u, tensors) or _negated(running_mean, running_var):
        # PyTorch refuses these types together, and does not move statistics that it negates when it reads them
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        w, b, mean, var = (None if t is None else t.to(wide).resolve_neg() for t in tensors)
        v = normalise(u, norm, w, b, mean, var, num_groups, training, momentum, eps)
        for t, moved in zip(tensors[2:], (mean, var), strict=True):
            if t is not None and moved is not None and moved is not t:
                t.copy_(moved)
        return v
    if norm == "batch":
        return F.batch_norm(u, running_mean, running_var, weight, bias, training, momentum, eps)
    if norm == "instance":
        use_input = training or running_mean is None
        v = F.instance_norm(u, running_mean, running_var, weight, bias, use_input, momentum, eps)
        forward = torch.autograd.forward_ad._current_level >= 0
        return (_ContiguousGradForward if forward else _ContiguousGrad).apply(v)
    groups = 1 if norm == "layer" else num_groups
    assert groups is not None
    if u.numel() == 0 and not torch.compiler.is_compiling():
        # PyTorch 2.14 refuses maps without positions; the affine's gradients are 0
        v = u if weight is None else u * spread(weight, u.dim()).to(u.dtype)
        return v if bias is None else v + spread(bias, u.dim()).to(u.dtype)
    if spec.transformed():
        u = u.contiguous()  # PyTorch's derivatives and batches of it take no other layout
    return F.group_norm(u, groups, weight, bias, eps)


def block_tail(
    y: Tensor,
    *,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_groups: int | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    slope: Tensor | float | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    order: str = "conv-norm-film-act",
    dropout_mask: Tensor | None = None,
    dropout_position: str = "end",
) -> Tensor:
    """All of a block that follows its convolution, one eager step after another.

    γ, β and the dropout mask (already divided by 1 - p) are [N, C] or [1, C].
    """

    def drop(u: Tensor, position: str) -> Tensor:
        if dropout_mask is None or position != dropout_position:
            return u
        return u * spread(dropout_mask, u.dim()).to(u.dtype)

    def film(u: Tensor) -> Tensor:
        u = drop(u, "film")
        if gamma is not None:
            u = u * spread(gamma, u.dim()).to(u.dtype)
        if beta is not None:
            u = u + spread(beta, u.dim()).to(u.dtype)
        return u

    def normed(u: Tensor) -> Tensor:
        return normalise(
            drop(u, "norm"),
            norm,
            norm_weight,
            norm_bias,
            running_mean,
            running_var,
            num_groups,
            training,
            momentum,
            eps,
        )

    if isinstance(slope, Tensor):
        slope = spread(slope.to(y.dtype), y.dim()) if slope.dim() else slope.to(y.dtype)

    def acted(u: Tensor) -> Tensor:
        return activation(u, act, slope)

    if order == "conv-norm-film-act":
        v = acted(film(normed(y)))
    elif order == "conv-norm-act-film":
        v = film(acted(normed(y)))
    elif order == "conv-act-norm-film":
        v = film(normed(acted(y)))
    else:
        raise ValueError(f"order must be one of {', '.join(spec.ORDERS)}, got {order!r}")
    return drop(v, "end")
