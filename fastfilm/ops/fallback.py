"""Triton's launchers, each with a way out: what fails to compile or to launch is PyTorch's work from then on.

A launcher that fails for the first time warns once, with the reason and the key of the call; calls with that key
then take the composed route (convolutions) or the reference (everything else). Where a backend or a route is
forced, or with FASTFILM_STRICT=1, the failure is raised. Running out of memory and bad arguments always are, and
failures inside the capture of a CUDA graph, where no kernel can be loaded: they say nothing of later calls.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, capture, conv, environment, layout, reference, spec
from .higher import after_moments, pull
from .tail import Kind, Tail
from .tiles import TILED

Key = tuple[object, ...]

Taps = Sequence[tuple[Tensor, Tensor]]
"""Index and weight [positions, T] of each axis, three of them: see ``views.taps``."""

STRICT = environment.read("FASTFILM_STRICT") == "1"

failures: dict[Key, str] = {}
"""What failed so far, and why: launcher, device, types, channels and options of the call -> reason."""

_KERNELS = "fastfilm.kernels"
_COMPOSED = "triton/composed"
_NEVER = (TypeError, ValueError, NotImplementedError, MemoryError, torch.OutOfMemoryError)
_MAYBE = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)


def recoverable(error: Exception) -> bool:
    """Whether an error says that a kernel is not to be had here, rather than that the call is wrong."""
    if isinstance(error, _NEVER):
        return False
    theirs = any(c.__module__.partition(".")[0] == "triton" for c in type(error).__mro__)
    return theirs or isinstance(error, _MAYBE)


def __getattr__(name: str) -> Any:
    """Whatever else the Triton kernels offer, without a guard."""
    return getattr(importlib.import_module(_KERNELS), name)


def _key(name: str, arguments: dict[str, Any]) -> Key:
    """What decides how a kernel is compiled, sizes of maps left out."""
    parts = [(k, _part(k, v)) for k, v in arguments.items() if k != "momentum" and v is not None]
    return (name, *parts)


def _part(argument: str, value: Any) -> object:
    if isinstance(value, Tensor):
        shape: tuple[object, ...] = ()
        if argument == "weight":
            shape = tuple(value.shape)
        elif value.dim() >= 4:
            shape = (f"{value.dim() - 2}D", value.shape[1])
        return (str(value.device), str(value.dtype).removeprefix("torch."), *shape)
    if isinstance(value, Kind):
        return value.norm, value.order, value.dropout_position, value.channels, value.uses_input
    if isinstance(value, (tuple, list)):
        return tuple(_part("", v) for v in value)
    return value


def _guarded(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The kernels' launcher of the name of ``plain``, which takes over where that fails."""
    name = plain.__name__.removeprefix("_")
    tiled = TILED.get(name)
    signature = inspect.signature(plain)

    def key(*args: Any, **options: Any) -> Key:
        return _key(name, signature.bind(*args, **options).arguments)

    def call(*given: Any, **options: Any) -> Any:
        args = [layout.values(a) if isinstance(a, Tensor) else a for a in given]
        if not failures or key(*args, **options) not in failures:
            try:
                module = sys.modules.get(_KERNELS) or importlib.import_module(_KERNELS)
                launcher = getattr(module, name)
                return launcher(*args, **options, **(tiled(*args) if tiled else {}))
            except Exception as error:
                if recoverable(error) and capture.capturing():
                    _load_again()
                    raise capture.refusal("a Triton kernel is loaded") from error
                if STRICT or backends.forced()[:2] != (None, None) or not recoverable(error):
                    raise
                _remember(key(*args, **options), error)
        return plain(*args, **options)

    call.__name__, call.__doc__ = name, plain.__doc__
    return call


def _load_again() -> None:
    """Makes Triton load at their next launch the kernels that a capture did not let it load.

    Triton makes the launcher first: where loading fails, later launches would go without a function.
    """
    modules = [m for name, m in sys.modules.items() if name.startswith(_KERNELS)]
    for kernel in {id(k): k for m in modules for k in vars(m).values()}.values():
        for cache, *_ in getattr(kernel, "device_caches", {}).values():
            for compiled in cache.values():
                if getattr(compiled, "module", compiled) is None:
                    compiled._run = None


def _remember(key: Key, error: Exception) -> None:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    failures[key] = reason
    warnings.warn(
        f"fastfilm: a Triton kernel failed, PyTorch does its work from now on: {reason} (call: {key});"
        " FASTFILM_STRICT=1 raises instead",
        RuntimeWarning,
        stacklevel=3,
    )


def _apply(y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
    """``reference.materialise``, channels-last; in y's memory if ``in_place``."""
    v = spec.channels_last(reference.materialise(y, coef, act))
    return y.copy_(v) if in_place else v


def _apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``reference.materialise`` at ``y`` (in dv's memory if ``in_place``) and ``coef``."""
    dy, dcoef = pull(lambda y, coef: reference.materialise(y, coef, act), (y, coef), dv)
    assert dy is not None and dcoef is not None
    return dv.copy_(dy) if in_place else spec.channels_last(dy), dcoef


def _moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """``reference.moments``."""
    return reference.moments(y, pre, act)


def _moments_backward(
    dy: Tensor | None, dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``reference.moments`` at ``y``, added to ``dy``, and at ``pre``."""
    e, dpre = after_moments(torch.zeros_like(y) if dy is None else dy, dstats, y, pre, act)
    return spec.channels_last(e), dpre


def _residual(
    y: Tensor,
    coef: Tensor | None,
    act: str,
    other: Tensor,
    other_coef: Tensor | None,
    slope: Tensor | None,
    outer: str,
) -> Tensor:
    """``reference.residual``."""
    return spec.channels_last(reference.residual(y, coef, act, other, other_coef, slope, outer))


def _residual_backward(
    dv: Tensor,
    y: Tensor,
    coef: Tensor | None,
    act: str,
    other: Tensor,
    other_coef: Tensor | None,
    slope: Tensor | None,
    outer: str,
    at_other: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of ``reference.residual``."""
    dy, dcoef, dother, dother_coef, dslope = pull(
        lambda y, coef, other, other_coef, slope: reference.residual(
            y, coef, act, other, other_coef, slope, outer
        ),
        (y, coef, other, other_coef, slope),
        dv,
    )
    assert dy is not None and dother is not None
    dother = spec.channels_last(dother) if at_other else None
    return spec.channels_last(dy), dcoef, dother, dother_coef, dslope


def _block_coefficients(
    kind: Kind, momentum: float, tensors: Sequence[Tensor | None], device: torch.device
) -> Tensor:
    """``Tail.defined_coefficients``."""
    mean, var, stats, weight, norm_bias, bias, gamma, beta, mask, slope = tensors
    tail = Tail(kind, momentum, weight, norm_bias, mean, var, gamma, beta, mask, slope)
    dtype = torch.float64 if kind.wide else torch.float32
    return tail.defined_coefficients(torch.empty(0, dtype=dtype, device=device), bias, stats)


def _block_coefficients_backward(
    kind: Kind, tensors: Sequence[Tensor | None], dcoef: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``Tail.defined_coefficients`` at the ``wanted`` of its tensors."""
    found = pull(lambda *given: _block_coefficients(kind, 0.0, given, dcoef.device), tensors, dcoef)
    return [t if want else None for t, want in zip(found, wanted, strict=True)]


def _geometry(stride: tuple[int, ...], padding: tuple[int, ...]) -> tuple[Any, ...]:
    dims = len(stride)
    return stride, padding, (1,) * dims, False, (0,) * dims, 1


def _fprop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    act: str,
    pre: Tensor | None,
    pre_act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """The composed route, but with the bias in y."""
    kernels, geometry = (
        backends.BACKENDS[_COMPOSED.split("/")[0]].kernels(),
        _geometry(stride, padding),
    )
    return conv.composed(
        kernels, spec.channels_last(x), weight, bias, coef, act, pre, pre_act, geometry, moments
    )


def _fprop_apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor | None,
    act: str,
    out_coef: Tensor,
    out_act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """The composed route."""
    tail = (*_geometry(stride, padding), _COMPOSED)
    return conv.conv_apply(*(x, weight, bias, coef, act, out_coef, out_act, *tail))


def _dgrad(
    e: Tensor,
    weight: Tensor,
    x: Tensor,
    coef: Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """The composed route."""
    dx, _, dcoef, _ = _composed_backward(e, x, weight, coef, act, stride, padding, True)
    return dx, None if coef is None else dcoef


def _wgrad(
    e: Tensor,
    x: Tensor,
    weight: Tensor,
    coef: Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """The composed route."""
    return _composed_backward(e, x, weight, coef, act, stride, padding, False)[1]


def _composed_backward(
    e: Tensor,
    x: Tensor,
    weight: Tensor,
    coef: Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    at_input: bool,
) -> tuple[Tensor, ...]:
    """dx, dweight and dcoef of a convolution whose gradient at the raw output is ``e``."""
    head = (e, conv.absent(e), x, weight, coef, act, None, "none", None, None)
    tail = (*_geometry(stride, padding), _COMPOSED, at_input, not at_input)
    return conv.conv_bwd(*head, *tail)


def _taken(y: Tensor, coef: Tensor | None, act: str, taps: Taps, maximum: bool) -> Tensor:
    """What ``taps`` show of a map behind its coefficients, axis after axis."""
    v = y if coef is None else reference.materialise(y, coef, act)
    for dim, (index, weight) in enumerate(taps[-(y.dim() - 2) :], start=2):
        shape = (*index.shape, *(1,) * (v.dim() - dim - 1))
        v = v.index_select(dim, index.flatten()).unflatten(dim, index.shape)
        if maximum:
            v = v.masked_fill(weight.reshape(shape) == 0, -torch.inf).max(dim + 1).values
        else:
            v = (v * weight.reshape(shape).to(v.dtype)).sum(dim + 1)
    return v


def _gather_taps(
    y: Tensor,
    coef: Tensor | None,
    act: str,
    taps: Taps,
    maximum: bool,
    out: Tensor,
    first: int,
) -> None:
    """PyTorch's indexing, sums and maxima."""
    out[:, first : first + y.shape[1]] = _taken(y, coef, act, taps, maximum)


def _gather_taps_backward(
    dout: Tensor,
    first: int,
    y: Tensor,
    coef: Tensor | None,
    act: str,
    taps: Taps,
    maximum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of PyTorch's indexing, sums and maxima."""
    part = dout[:, first : first + y.shape[1]]
    if not maximum:  # the taps are the transposed ones: they lead from the result to the map
        part = _taken(part, None, "none", taps, False)

    def shown(y: Tensor, coef: Tensor | None = None) -> Tensor:
        if maximum:
            return _taken(y, coef, act, taps, True)
        return y if coef is None else reference.materialise(y, coef, act)

    dy, *rest = pull(shown, (y,) if coef is None else (y, coef), part)
    assert dy is not None
    return spec.channels_last(dy), rest[0] if rest else None


apply = _guarded(_apply)
gather_taps = _guarded(_gather_taps)
gather_taps_backward = _guarded(_gather_taps_backward)
apply_backward = _guarded(_apply_backward)
moments = _guarded(_moments)
residual = _guarded(_residual)
residual_backward = _guarded(_residual_backward)
moments_backward = _guarded(_moments_backward)
block_coefficients = _guarded(_block_coefficients)
block_coefficients_backward = _guarded(_block_coefficients_backward)
fprop = _guarded(_fprop)
fprop_apply = _guarded(_fprop_apply)
dgrad = _guarded(_dgrad)
wgrad = _guarded(_wgrad)
