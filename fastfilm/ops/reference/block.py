"""The reference of a block: the whole and each of its parts in eager, differentiable PyTorch.

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
from ..spec import Addends, Kind, TailTensors


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


def normalise(u: Tensor, kind: Kind, tensors: TailTensors, momentum: float = 0.0) -> Tensor:
    """PyTorch's own normalisation of ``u`` [N, C, *S]; updates running statistics in place."""
    norm, eps = kind.norm, kind.eps
    if norm == "none" or (norm == "instance" and u.shape[0] == 0):
        return u
    running_mean, running_var, _, weight, bias, *_ = tensors
    if norm in spec.SAMPLE_NORMS:
        running_mean = running_var = None
        if u.device.type == "cuda":
            given = [t.dtype for t in (weight, bias) if t is not None]
            wide = functools.reduce(torch.promote_types, given, u.dtype)
            if {*given, u.dtype} != {wide}:  # PyTorch's kernel takes tensors of one type
                cast = (None if t is None else t.to(wide) for t in (weight, bias))
                return normalise(u.to(wide), kind, TailTensors(None, None, None, *cast)).to(u.dtype)
    held = (running_mean, running_var, weight, bias)
    if not _mixes(u, held) or _negated(running_mean, running_var):
        # PyTorch refuses these types together, and does not move statistics that are negated views
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        mean, var, *affine = (None if t is None else t.to(wide).resolve_neg() for t in held)
        v = normalise(u, kind, TailTensors(mean, var, None, *affine), momentum)
        for t, moved in ((running_mean, mean), (running_var, var)):
            if t is not None and moved is not None and moved is not t:
                t.copy_(moved)
        return v
    if norm == "batch":
        return F.batch_norm(u, *held, kind.uses_input, momentum, eps)
    if norm == "instance":
        v = F.instance_norm(u, *held, kind.uses_input, momentum, eps)
        forward = torch.autograd.forward_ad._current_level >= 0
        return (_ContiguousGradForward if forward else _ContiguousGrad).apply(v)
    if norm not in ("group", "layer"):
        raise ValueError(f"the reference has no norm {norm!r}")
    if u.numel() == 0 and not torch.compiler.is_compiling():
        # PyTorch 2.14 refuses maps without positions; the affine's gradients are 0
        v = u if weight is None else u * spread(weight, u.dim()).to(u.dtype)
        return v if bias is None else v + spread(bias, u.dim()).to(u.dtype)
    if spec.transformed():
        u = u.contiguous()  # PyTorch's derivatives and batches of it take no other layout
    return F.group_norm(u, kind.groups, weight, bias, eps)


def block_tail(y: Tensor, kind: Kind, tensors: TailTensors, momentum: float = 0.0) -> Tensor:
    """A block behind its convolution, one eager step after another; ``y`` has the convolution's bias."""
    gamma, beta, mask = films(tensors)
    slope: Tensor | float = kind.slope
    if tensors.slope is not None:
        slope = tensors.slope.to(y.dtype)
        slope = spread(slope, y.dim()) if slope.dim() else slope

    def drop(u: Tensor, position: str) -> Tensor:
        if mask is None or position != kind.dropout_position:
            return u
        return u * spread(mask, u.dim()).to(u.dtype)

    def film(u: Tensor) -> Tensor:
        u = drop(u, "film")
        if gamma is not None:
            u = u * spread(gamma, u.dim()).to(u.dtype)
        if beta is not None:
            u = u + spread(beta, u.dim()).to(u.dtype)
        return u

    def normed(u: Tensor) -> Tensor:
        return normalise(drop(u, "norm"), kind, tensors, momentum)

    def acted(u: Tensor) -> Tensor:
        return activation(u, kind.activation, slope)

    if kind.order == "conv-norm-film-act":
        v = acted(film(normed(y)))
    elif kind.order == "conv-norm-act-film":
        v = film(acted(normed(y)))
    else:
        v = film(normed(acted(y)))
    return drop(v, "end")


def films(tensors: TailTensors) -> tuple[Tensor | None, ...]:
    """γ, β and the dropout mask, [N, C] or [1, C]."""
    return tuple([t.unsqueeze(0) if t is not None and t.dim() == 1 else t for t in tensors[6:9]])
