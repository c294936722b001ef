"""Launchers of the Triton kernels: where one fails to compile or to launch, PyTorch does its work from then on.

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

from ..settings import environment, forced
from ..spec import (
    Addends,
    Geometry,
    Gradient,
    Kind,
    NormInput,
    Output,
    Pending,
    Source,
    SourceGradient,
    capture,
    dense,
    views,
)
from ..spec.views import View
from . import eager, plain_convolutions, tiles

Key = tuple[object, ...]

STRICT = environment.read("FASTFILM_STRICT") == "1"

failures: dict[Key, str] = {}
"""Failures so far: launcher, device, types, channels and options of the call -> reason."""

_KERNELS = "fastfilm.kernels"
_NEVER = (TypeError, ValueError, NotImplementedError, MemoryError, torch.OutOfMemoryError)
_MAYBE = (RuntimeError, OSError, ImportError, subprocess.SubprocessError)


def recoverable(error: Exception) -> bool:
    """Whether an error says that a kernel is not to be had here, rather than that the call is wrong."""
    if isinstance(error, _NEVER):
        return False
    theirs = any(c.__module__.partition(".")[0] == "triton" for c in type(error).__mro__)
    return theirs or isinstance(error, _MAYBE)


reads_sources = False
convolves = False
workspace = eager.workspace


def _kernels() -> Any:
    return sys.modules.get(_KERNELS) or importlib.import_module(_KERNELS)


def covers_block(kind: Kind) -> bool:
    """Whether the kernels have a block's coefficients: for all norms but group and layer."""
    covered: bool = _kernels().covers_block(kind)
    return covered


def _key(name: str, arguments: dict[str, Any]) -> Key:
    """The arguments that decide how a kernel is compiled, sizes of maps left out."""
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
    if isinstance(value, Source):
        value = value[:4]  # the ledger does not change the kernel
    if isinstance(value, (tuple, list)):
        return tuple(_part("", v) for v in value)
    return value


def _guarded(
    plain: Callable[..., Any], launch: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """The kernels' launcher of the name of ``plain``, which takes over where that fails.

    Args:
        launch: the launcher, where the kernels' own has other arguments.
    """
    name = plain.__name__
    signature = inspect.signature(plain)

    def key(*args: Any, **options: Any) -> Key:
        return _key(name, signature.bind(*args, **options).arguments)

    def call(*given: Any, **options: Any) -> Any:
        args = [_held(a) for a in given]
        if not failures or key(*args, **options) not in failures:
            try:
                launcher = launch or getattr(_kernels(), name)
                return launcher(*args, **options)
            except Exception as error:
                if recoverable(error) and capture.capturing():
                    _load_again()
                    raise capture.refusal("a Triton kernel is loaded") from error
                if STRICT or forced() != (None, None) or not recoverable(error):
                    raise
                _remember(key(*args, **options), error)
        return plain(*args, **options)

    call.__name__, call.__doc__ = name, plain.__doc__
    return call


def _held(value: Any) -> Any:
    """Tensors with their values in their memory."""
    if isinstance(value, Addends):
        return Addends(*map(_held, value))
    return dense.values(value) if isinstance(value, Tensor) else value


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


def _is_maximum(view: View | None) -> bool:
    return view is not None and view.kind == "max"


def _gather(source: Source, out: Tensor, first: int) -> None:
    raw, coef, act, view, _ = source
    taps = views.taps(view, tuple(raw.shape[2:]), False, raw.device)
    _kernels().gather_taps(dense.values(raw), coef, act, taps, _is_maximum(view), out, first)


def _gather_backward(dv: Tensor, first: int, source: Source) -> SourceGradient:
    raw, coef, act, view, _ = source
    maximum = _is_maximum(view)
    if maximum and not views.disjoint(view):
        return _overlapping(dv, first, source)
    taps = views.taps(view, tuple(raw.shape[2:]), not maximum, raw.device)
    given = dv, first, dense.values(raw), coef, act, taps, maximum
    found: SourceGradient = _kernels().gather_taps_backward(*given)
    return found


def _overlapping(dv: Tensor, first: int, source: Source) -> SourceGradient:
    """A maximum over windows that overlap: PyTorch's gradient of the pooling, at the map behind its affine."""
    raw, coef, act, view, _ = source
    written = raw if coef is None else apply(raw, coef, act)
    return eager.gather_backward(dv, first, Source(written, view=view))


def covers_sources(sources: Sequence[Source]) -> bool:
    """Whether the convolutions read such sources as they are: one raw map and what is pending on it."""
    return len(sources) == 1 and sources[0].view is None


def _fprop(
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    norm_input: NormInput | None = None,
    finish: Pending | None = None,
) -> tuple[Tensor, Tensor]:
    ((raw, coef, act, *_),) = sources
    front = dense.values(raw), weight, bias, coef, act, *(norm_input or NormInput())
    size = geometry.output_size(raw.shape[2:], weight.shape[2:])
    tile = tiles.measured("fprop", raw, weight, geometry.stride, size)
    tile["out_coef"], tile["out_act"] = finish or Pending()
    walk, moments = (geometry.stride, geometry.padding), norm_input is not None
    found: tuple[Tensor, Tensor] = _kernels().fprop(*front, *walk, moments, **tile)
    return found


def _dgrad(
    gradient: Gradient,
    weight: Tensor,
    outputs: Sequence[Output],
    size: tuple[int, ...],
    geometry: Geometry,
) -> list[SourceGradient]:
    ((_, raw, coef, act, *_),) = outputs
    assert raw is not None
    read, walk = (weight, dense.values(raw), coef, act), (geometry.stride, geometry.padding)
    dy = dense.values(gradient.dy)
    tile = tiles.measured("dgrad", dy, weight, geometry.stride, dy.shape[2:])
    return [_kernels().dgrad(dy, *read, *walk, **tile)]


def _wgrad(
    gradient: Gradient,
    sources: Sequence[Source],
    weight: Tensor,
    geometry: Geometry,
    sums: bool = False,
) -> tuple[Tensor, None]:
    ((raw, coef, act, *_),) = sources
    read, walk = (dense.values(raw), weight, coef, act), (geometry.stride, geometry.padding)
    dy = dense.values(gradient.dy)
    tile = tiles.measured("wgrad", dy, weight, geometry.stride, dy.shape[2:])
    return _kernels().wgrad(dy, *read, *walk, **tile), None


apply = _guarded(eager.apply)
apply_backward = _guarded(eager.apply_backward)
moments = _guarded(eager.moments)
moments_backward = _guarded(eager.moments_backward)
residual = _guarded(eager.residual)
residual_backward = _guarded(eager.residual_backward)
gather = _guarded(eager.gather, _gather)
gather_backward = _guarded(eager.gather_backward, _gather_backward)
block_coefficients = _guarded(eager.block_coefficients)
block_coefficients_backward = _guarded(eager.block_coefficients_backward)
fprop = _guarded(plain_convolutions.fprop, _fprop)
dgrad = _guarded(plain_convolutions.dgrad, _dgrad)
wgrad = _guarded(plain_convolutions.wgrad, _wgrad)
