"""Launchers of the CUDA kernels on channels-last maps in GPU memory.

The maths is that of ``reference``; each map is read and written once, sums have one writer a slot. What has no
CUDA kernel (views, residual sums, the algebra of a block) is Triton's work, or PyTorch's where there is no Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfilm import _CUDA

from . import fallback
from .backends import Request

_TRITON = importlib.util.find_spec("triton") is not None
_PLAIN = ("residual", "residual_backward")


def __getattr__(name: str) -> Any:
    if name.startswith("__") or not (_TRITON or name in _PLAIN):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(fallback, name if _TRITON else f"_{name}")


def why_not(request: Request) -> str | None:
    """Why no layout of the fused convolution fits into the current GPU for a request; None if one does."""
    size = (16,) * request.dims
    try:
        _convolution(
            request.dtype,
            1,
            request.channels,
            tuple(n * s for n, s in zip(size, request.stride, strict=True)),
            size,
            request.kernel,
            request.stride,
            tuple(k // 2 for k in request.kernel),
            _device(None),
        ).check()
    except RuntimeError as error:
        return str(error)
    return None if request.batch <= 65535 else f"batch must be <= 65535, got {request.batch}"


_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
_ACTIVATIONS = {
    "none": 0,
    "relu": 1,
    "leaky_relu": 2,
    "prelu": 2,
    "elu": 3,
    "silu": 4,
    "gelu": 5,
    "gelu_tanh": 6,
}
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _map(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """``t`` [N, C, *S], checked: its type, its layout and, with ``like``, that map's shape and type."""
    if t.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {t.dtype}")
    if t.dim() not in _FORMATS:
        raise ValueError(f"{name} must be [N, C, H, W] or [N, C, D, H, W], got {tuple(t.shape)}")
    if not t.is_contiguous(memory_format=_FORMATS[t.dim()]):
        raise ValueError(
            f"{name} must be dense in channels-last order, got shape {tuple(t.shape)} with strides {t.stride()}"
        )
    if like is not None and (t.shape != like.shape or t.dtype != like.dtype):
        raise ValueError(
            f"{name} must be {tuple(like.shape)} of {like.dtype}, got {tuple(t.shape)} of {t.dtype}"
        )
    return t


def _numbers(name: str, t: Tensor, *shape: int) -> Tensor:
    """``t`` float32 and contiguous; ValueError unless it has ``shape``."""
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    return t.float().contiguous()


def _code(act: str) -> int:
    if act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)}, got {act!r}")
    return _ACTIVATIONS[act]


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _guard(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one for a launch."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _call(y: Tensor, act: str) -> tuple[int, ...]:
    """Trailing arguments of a pass: dtype, activation, N, S, C, stream."""
    n, c = y.shape[:2]
    return _DTYPES[y.dtype], _code(act), n, y[0, 0].numel(), c, _stream(y)


def _empty_map(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=_FORMATS[y.dim()])


def _workspace(y: Tensor) -> Tensor:
    n, c = y.shape[:2]
    count = _CUDA.reduction_workspace(_DTYPES[y.dtype], n, y[0, 0].numel(), c)
    return torch.empty(count, dtype=torch.float32, device=y.device)


def apply(y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
    """v = g * (act(a * (y - p) + b; slope) - q) + s.

    Args:
        y: [N, C, *S], channels-last.
        coef: [7, N, C], rows a, b, g, s, p, q, slope.
        act: activation name.
        in_place: overwrite ``y``.

    Returns:
        v [N, C, *S] in y's dtype, channels-last.
    """
    y = _map("y", y)
    coef = _numbers("coef", coef, 7, *y.shape[:2])
    v = y if in_place else _empty_map(y)
    with _guard(y):
        _CUDA.apply(y.data_ptr(), coef.data_ptr(), v.data_ptr(), *_call(y, act))
    return v


def apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``apply`` at ``y`` ([N, C, *S]; in dv's memory if ``in_place``) and at ``coef``."""
    y, dv = _map("y", y), _map("dv", dv, y)
    coef = _numbers("coef", coef, 7, *y.shape[:2])
    dy = dv if in_place else _empty_map(y)
    dcoef, work = torch.empty_like(coef), _workspace(y)
    with _guard(y):
        _CUDA.apply_backward(
            *(t.data_ptr() for t in (dv, y, coef, dy, dcoef, work)), *_call(y, act)
        )
    return dy, dcoef


def moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """Mean and biased variance over space of u = act(y + shift; slope), [2, N, C] float32.

    Args:
        y: [N, C, *S], channels-last.
        pre: [2, C], shift and slope; None: the moments of ``y`` itself, whatever ``act`` is.
        act: activation name.
    """
    y = _map("y", y)
    n, c = y.shape[:2]
    pre = None if pre is None else _numbers("pre", pre, 2, c)
    stats, work = torch.empty((2, n, c), dtype=torch.float32, device=y.device), _workspace(y)
    with _guard(y):
        _CUDA.moments(
            y.data_ptr(), _address(pre), stats.data_ptr(), work.data_ptr(), *_call(y, act)
        )
    return stats


def moments_backward(
    dy: Tensor | None, dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``moments`` at ``y``, added to ``dy``, and at ``pre``.

    Returns:
        e [N, C, *S] in y's dtype, and dpre [2, C] (None without ``pre``), whose first row is the sum of
        e: the gradient of the shift, and of a bias that y already has.
    """
    y = _map("y", y)
    n, c = y.shape[:2]
    dy = None if dy is None else _map("dy", dy, y)
    dstats, stats = _numbers("dstats", dstats, 2, n, c), _numbers("stats", stats, 2, n, c)
    pre = None if pre is None else _numbers("pre", pre, 2, c)
    dpre = None if pre is None else torch.empty_like(pre)
    e, work = _empty_map(y), _workspace(y)
    with _guard(y):
        _CUDA.moments_backward(
            _address(dy),
            dstats.data_ptr(),
            y.data_ptr(),
            stats.data_ptr(),
            _address(pre),
            e.data_ptr(),
            _address(dpre),
            work.data_ptr(),
            *_call(y, act),
        )
    return e, dpre


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


Sources = Sequence[tuple[Tensor, Tensor | None, str]]
"""One map or two, whose channels follow each other: raw map, what is pending on it (None: nothing), activation."""


@functools.lru_cache(maxsize=4096)
def _device(index: int | None) -> tuple[int, int, int]:
    return _CUDA.device()


@functools.lru_cache(maxsize=4096)
def _convolution(
    dtype: torch.dtype,
    n: int,
    channels: tuple[int, int],
    size: tuple[int, ...],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    device: tuple[int, int, int],
) -> _CUDA.Convolution:
    def three(values: tuple[int, ...], depth: int) -> tuple[int, int, int]:
        return (depth, values[0], values[1]) if len(values) == 2 else (*values,)  # type: ignore[return-value]

    if len(set(stride)) != 1:
        raise ValueError(f"stride must be the same in every dimension, got {stride}")
    return _CUDA.Convolution(
        dtype=_DTYPES[dtype],
        dims=len(size),
        n=n,
        ci=channels[0],
        co=channels[1],
        in_size=three(size, 1),
        out_size=three(out, 1),
        kernel=three(kernel, 1),
        padding=three(padding, 0),
        stride=stride[0],
        device=device,
    )


def convolution(
    x: Tensor,
    channels: tuple[int, int],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> _CUDA.Convolution:
    """The kernels of one shape, with the layout that suits x's GPU."""
    with _guard(x):
        device = _device(x.device.index)
    shape = (x.shape[0], channels, tuple(x.shape[2:]), out, kernel, stride, padding)
    return _convolution(x.dtype, *shape, device)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of [co, ci, kd, kh, kw], whatever the weight's layout."""
    s = weight.stride()
    return s if len(s) == 5 else (*s[:2], 0, *s[2:])


def _sources(sources: Sources) -> tuple[list[Tensor | None], list[tuple[int, int, int, int]]]:
    """What must stay alive, and what the extension takes."""
    kept: list[Tensor | None] = []
    given = []
    for x, coef, act in sources:
        x = _map("x", x)
        coef = None if coef is None else _numbers("coef", coef, 7, *x.shape[:2])
        kept += [x, coef]
        given.append((x.data_ptr(), _address(coef), x.shape[1], _code(act)))
    return kept, given


def _weight(weight: Tensor, x: Tensor, channels: int) -> Tensor:
    if weight.dtype != x.dtype or weight.dim() != x.dim() or weight.shape[1] != channels:
        raise ValueError(
            f"weight must be [co, {channels}, *kernel] of {x.dtype}, got {tuple(weight.shape)} of {weight.dtype}"
        )
    return weight


def _out_size(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[int, ...]:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return tuple((i + 2 * p - k) // s + 1 for i, k, s, p in sizes)


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(max(count, 16), dtype=torch.uint8, device=like.device)


def fprop_sources(
    sources: Sources,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    pre_act: str,
    out_coef: Tensor | None,
    out_act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    moments: bool,
) -> tuple[Tensor, Tensor]:
    """The convolution of one map or of the concatenation of two, each behind its own pending affine.

    Args:
        weight: [Co, ΣCi, *K].
        out_coef: [7, N, Co] of ``out_act``, where the output is to be finished; else None.

    Returns:
        y [N, Co, *T], and its moments [2, N, Co] (empty without ``moments``).
    """
    x = sources[0][0]
    n, co = x.shape[0], weight.shape[0]
    ci = sum(s[0].shape[1] for s in sources)
    _weight(weight, x, ci)
    kept, given = _sources(sources)
    bias = None if bias is None else _numbers("bias", bias, co)
    pre = None if pre is None else _numbers("pre", pre, 2, co)
    out_coef = None if out_coef is None else _numbers("out_coef", out_coef, 7, n, co)
    size = _out_size(x, weight, stride, padding)
    conv = convolution(x, (ci, co), size, tuple(weight.shape[2:]), stride, padding)
    y = torch.empty((n, co, *size), dtype=x.dtype, device=x.device, memory_format=_FORMATS[x.dim()])
    stats = torch.empty((2, n, co) if moments else (0,), dtype=torch.float32, device=x.device)
    work = _bytes(conv.forward_workspace(), x)
    with _guard(x):
        conv.forward(
            sources=given,
            weight=weight.data_ptr(),
            strides=_strides(weight),
            bias=_address(bias),
            pre=_address(pre),
            pre_act=_code(pre_act),
            out_coef=_address(out_coef),
            out_act=_code(out_act),
            y=y.data_ptr(),
            stats=stats.data_ptr() if moments else 0,
            workspace=work.data_ptr(),
            stream=_stream(x),
        )
    del kept
    return y, stats


def fprop(
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
    """Raw output [N, Co, *T] channels-last, and its moments [2, N, Co] (empty without ``moments``).

    Args:
        x: raw input [N, Ci, *S] channels-last; ``coef`` [7, N, Ci] and ``act`` are pending on it.
        weight: [Co, Ci, *K], K 1 or 3 in every dimension, in any layout.
        bias: [Co], added before the output is rounded and its moments are taken.
        pre: [2, Co], shift and slope of ``pre_act`` in front of the norm.
    """
    tail = (None, "none", stride, padding, moments)
    return fprop_sources([(x, coef, act)], weight, bias, pre, pre_act, *tail)


def fprop_apply(
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
    """The finished block [N, Co, *T] where the output's coefficients are known beforehand."""
    tail = (out_coef, out_act, stride, padding, False)
    return fprop_sources([(x, coef, act)], weight, bias, None, "none", *tail)[0]


def dgrad(
    e: Tensor,
    weight: Tensor,
    x: Tensor,
    coef: Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """dx [N, Ci, *S] channels-last, and dcoef [7, N, Ci] (None without ``coef``).

    Args:
        e: gradient at the raw output [N, Co, *T], channels-last.
        weight: [Co, Ci, *K].
        x: the raw input [N, Ci, *S] that the forward pass read.
    """
    e = _map("e", e)
    _weight(weight, x, x.shape[1])
    kept, given = _sources([(x, coef, act)])
    channels = (weight.shape[1], weight.shape[0])
    conv = convolution(x, channels, tuple(e.shape[2:]), tuple(weight.shape[2:]), stride, padding)
    dx = _empty_map(x)
    dcoef = None if kept[1] is None else torch.empty_like(kept[1])
    work = _bytes(conv.backward_workspace(), x)
    with _guard(x):
        conv.backward(
            e=e.data_ptr(),
            weight=weight.data_ptr(),
            strides=_strides(weight),
            source=given,
            dx=dx.data_ptr(),
            dcoef=_address(dcoef),
            workspace=work.data_ptr(),
            stream=_stream(x),
        )
    return dx, dcoef


def wgrad(
    e: Tensor,
    x: Tensor,
    weight: Tensor,
    coef: Tensor | None,
    act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """dW, of ``weight``'s shape and dtype, channels-last.

    Args:
        e: gradient at the raw output [N, Co, *T], channels-last.
        x: raw input [N, Ci, *S], channels-last; ``coef`` [7, N, Ci] and ``act`` are pending on it.
    """
    return wgrad_sources(e, [(x, coef, act)], weight, stride, padding)


def wgrad_sources(
    e: Tensor,
    sources: Sources,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """``wgrad`` of one map or of the concatenation of two."""
    e = _map("e", e)
    x = sources[0][0]
    _weight(weight, x, sum(s[0].shape[1] for s in sources))
    kept, given = _sources(sources)
    channels = (weight.shape[1], weight.shape[0])
    conv = convolution(x, channels, tuple(e.shape[2:]), tuple(weight.shape[2:]), stride, padding)
    dweight = torch.empty(
        weight.shape, dtype=x.dtype, device=x.device, memory_format=_FORMATS[x.dim()]
    )
    work = _bytes(conv.weight_gradient_workspace(), x)
    with _guard(x):
        conv.weight_gradient(
            e=e.data_ptr(),
            sources=given,
            dweight=dweight.data_ptr(),
            workspace=work.data_ptr(),
            stream=_stream(x),
        )
    del kept
    return dweight
