"""The definition of right: the whole op and each of its parts in eager, differentiable PyTorch.

Works on any device, in any floating point type including float64, and to any order of derivative (behind
PyTorch's own norms in ``normalise``: to the second; their third derivatives are wrong).
Tests and benchmarks import it; the ``reference`` backend runs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import spec


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


def unsafe_channels_last(x: Tensor) -> bool:
    """Whether the vendor's convolution must not see ``x``, or weights beside it, channels-last.

    oneDNN (PyTorch 2.13, CPU) crashes or returns garbage for some padded convolutions of channels-last maps
    with a dimension of size 1: in bfloat16, and in 3D also in float32 with groups.
    """
    return (
        (x.dim() == 5 or x.dtype == torch.bfloat16) and 1 in x.shape[2:] and x.device.type == "cpu"
    )


_Sizes = tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def _faults(
    size: _Sizes,
    kernel: _Sizes,
    stride: _Sizes,
    padding: _Sizes,
    dilation: _Sizes,
    transposed: bool,
    output_padding: _Sizes,
) -> tuple[bool, bool, bool]:
    """Whether a kernel stands in padding, the last axis of a strided result has one position, and the kernel
    is longer than the map on a padded axis."""
    out = tuple(
        spec.conv_output_size(size, kernel, stride, padding, dilation, transposed, output_padding)
    )
    if transposed:
        size, out = out, size  # those of the convolution whose gradient this one is
    thin = any(n == 1 and p > 0 for n, p in zip(size, padding, strict=True))
    stands = thin or (any(padding) and spec.has_idle_taps(size, kernel, stride, padding, dilation))
    each = zip(size, kernel, padding, dilation, strict=True)
    longer = any(p > 0 and n < (k - 1) * d + 1 for n, k, p, d in each)
    return stands, max(stride) > 1 and out[-1] == 1, longer


def precautions(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    weight_gradient: bool,
) -> tuple[bool, bool]:
    """Whether a convolution and its gradients are computed in float32, and whether its map is padded before.

    On a CPU, in any layout, oneDNN (PyTorch 2.13) crashes now and then at padded maps one voxel thick and where
    taps of the kernel meet nothing but padding. With AMX its bfloat16 kernels use memory there that nobody wrote,
    and also at a stride where the last axis of the result has one position. With AVX-512 the weight gradient
    goes wrong where the kernel (with its dilation) is deeper than a 3D map that is padded in depth, as 3×3×3 is
    on two planes: the loop over the depth takes a kernel to reach over one end of the map at a time. In bfloat16
    it reads other planes, some of which nobody wrote; in float32 it writes behind its buffers at a stride.
    No form was found for which height and width do the same; such maps are too small to trust that for time.
    A graph for all sizes, which are not known then, computes 16-bit types in float32.

    Args:
        weight_gradient: whether this call computes the gradient at the weight, or may be asked for it later.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return False, False
    half = x.dtype.itemsize == 2
    if any(isinstance(n, torch.SymInt) for n in (*x.shape, *weight.shape)):
        return half, False
    stands, narrow, longer = _faults(
        tuple(x.shape[2:]),
        tuple(weight.shape[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        transposed,
        tuple(output_padding),
    )
    before = stands or (longer and weight_gradient)
    return half and (before or narrow), before


def padded(x: Tensor, padding: Sequence[int]) -> Tensor:
    """``x`` [N, C, *S] with as many zeros in front and behind; gradients of cropping."""
    return F.pad(x, [p for p in reversed(padding) for _ in range(2)])


def cropped(x: Tensor, padding: Sequence[int]) -> Tensor:
    """``x`` [N, C, *S] without so many voxels in front and behind; gradients of padding."""
    for d, p in enumerate(padding):
        x = x.narrow(d + 2, p, x.shape[d + 2] - 2 * p)
    return x


def guarded(
    convolve: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    weight_gradient: bool,
) -> Tensor | None:
    """``convolve`` of these arguments with the ``precautions`` that they need; None where they need none."""
    rest = dilation, transposed, output_padding
    wide, before = precautions(x, weight, stride, padding, *rest, weight_gradient)
    if wide:
        added = None if bias is None else bias.float()
        y = convolve(x.float(), weight.float(), added, stride, padding, *rest, groups)
        return y.to(x.dtype)
    if before:
        v = x if transposed else padded(x, padding)
        y = convolve(v, weight, bias, stride, [0] * len(padding), *rest, groups)
        return cropped(y, padding) if transposed else y
    return None


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The vendor's convolution [N, Ci, *S] -> [N, Co, *T]; weight as in ``torch.nn.Conv*``."""
    geometry = (stride, padding, dilation, transposed, output_padding, groups)
    y = guarded(convolution, x, weight, bias, *geometry, weight_gradient=True)
    if y is not None:
        return y
    if unsafe_channels_last(x):
        x, weight = x.contiguous(), weight.contiguous()
    return torch.convolution(x, weight, bias, *geometry)


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


def residual(
    y: Tensor,
    coef: Tensor | None,
    act: str,
    other: Tensor,
    other_coef: Tensor | None,
    slope: Tensor | None,
    outer: str,
) -> Tensor:
    """v = outer(M(y; coef, act) + M(other; other_coef, "none"); slope), M being ``materialise``.

    Args:
        y, other: raw feature maps [N, C, *S].
        coef, other_coef: [7, N, C] each; None: M(y) = y.
        slope: [C], of ``outer``; None: 0.

    Returns:
        [N, C, *S] in y's dtype; computed in float32, or float64 for a float64 ``y``.
    """
    wide = torch.float64 if y.dtype == torch.float64 else torch.float32
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


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs: tensors may be batches, whose layout cannot be asked for."""
    running = not torch.compiler.is_compiling()
    return running and torch._C._functorch.peek_interpreter_stack() is not None


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
    if transformed():
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
