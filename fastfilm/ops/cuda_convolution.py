"""Launchers of the CUDA convolutions: forward, gradients at the inputs and at the weight.

An input is a map or the concatenation of two, each with what is pending on it and as its consumer sees it; the
gradient at the raw output is given by its parts. Neither is ever written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfilm import _CUDA

from . import layout, precision, views
from .cuda_arguments import (
    DTYPES,
    FORMATS,
    address,
    code,
    empty_map,
    feature_map,
    numbers,
    on_device,
    stream_of,
)
from .operands import Gradient, Output
from .views import View

Sources = Sequence[Sequence[Any]]
"""One map or two, whose channels follow each other: raw map, what is pending on it (None: nothing), activation
and, if there is one, the view."""

MOST_TAPS = 8
"""Taps along one axis of a view that a convolution reads itself."""


def why_not(
    dtype: torch.dtype,
    channels: tuple[int, int],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
) -> str | None:
    """Why no layout of the convolution fits into the current GPU; None if one does."""
    size = (16,) * len(kernel)
    try:
        _convolution(
            dtype,
            1,
            channels,
            tuple(n * s for n, s in zip(size, stride, strict=True)),
            size,
            kernel,
            stride,
            tuple(k // 2 for k in kernel),
            _device(None),
        ).check()
    except RuntimeError as error:
        return str(error)
    return None


def covers_sources(sources: Sources) -> bool:
    """Whether the convolutions read such sources as they are; else somebody has to write them."""
    if len(sources) > 2:
        return False
    raw: Tensor = sources[0][0]
    if len(sources) == 2 and raw.shape[1] * raw.element_size() % 16:
        return False
    for source in sources:
        found, view = source[0], _view(source)
        if view is not None and any(
            t[0].shape[1] > MOST_TAPS
            for t in views.taps(view, tuple(found.shape[2:]), False, found.device)
        ):
            return False
    return True


def _view(source: Sequence[Any]) -> View | None:
    return source[3] if len(source) > 3 else None


def _seen_size(source: Sequence[Any]) -> tuple[int, ...]:
    view = _view(source)
    return tuple(source[0].shape[2:]) if view is None else view.size


def _three(values: Sequence[int], depth: int) -> tuple[int, int, int]:
    return (depth, values[0], values[1]) if len(values) == 2 else (*values,)  # type: ignore[return-value]


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
    tf32: bool = False,
) -> _CUDA.Convolution:
    if len(set(stride)) != 1:
        raise ValueError(f"stride must be the same in every dimension, got {stride}")
    return _CUDA.Convolution(
        dtype=DTYPES[dtype],
        dims=len(size),
        n=n,
        ci=channels[0],
        co=channels[1],
        in_size=_three(size, 1),
        out_size=_three(out, 1),
        kernel=_three(kernel, 1),
        padding=_three(padding, 0),
        stride=stride[0],
        device=device,
        tf32=tf32,
    )


def convolution(
    x: Tensor,
    channels: tuple[int, int],
    out: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    size: tuple[int, ...] | None = None,
) -> _CUDA.Convolution:
    """The kernels of one shape, with the layout that suits x's GPU; ``size``: what it sees, if not x itself."""
    with on_device(x):
        device = _device(x.device.index)
    size = tuple(x.shape[2:]) if size is None else size
    shape = (x.shape[0], channels, size, out, kernel, stride, padding)
    return _convolution(x.dtype, *shape, device, x.dtype == torch.float32 and _tf32(x))


def _tf32(x: Tensor) -> bool:
    """Whether PyTorch may round float32 products on x's device."""
    return x.is_cuda and precision.tf32()


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of [co, ci, kd, kh, kw]."""
    s = weight.stride()
    return s if len(s) == 5 else (*s[:2], 0, *s[2:])


def _sources(sources: Sources) -> tuple[list[Any], list[tuple[int, ...]]]:
    """What must stay alive, and what the extension takes."""
    kept: list[Any] = []
    given: list[tuple[int, ...]] = []
    size = _seen_size(sources[0])
    for source in sources:
        x, coef, act = source[:3]
        x = feature_map("x", x)
        coef = None if coef is None else numbers("coef", coef, 7, *x.shape[:2])
        found: tuple[int, ...]
        found = (x.data_ptr(), address(coef), x.shape[1], code(act if coef is not None else "none"))
        view = _view(source)
        if _seen_size(source) != size or x.shape[0] != sources[0][0].shape[0]:
            raise ValueError(
                f"the sources must have the same batch and size {size}, got {_seen_size(source)}"
            )
        if view is not None:
            taps = views.taps(view, tuple(x.shape[2:]), False, x.device)
            kept.append(taps)
            axes = tuple(n for i, w in taps for n in (i.data_ptr(), w.data_ptr(), i.shape[1]))
            found += (*axes, *_three(x.shape[2:], 1), int(view.kind == "max"))
        kept += [x, coef]
        given.append(found)
    return kept, given


def _gradient(given: Gradient, n: int, co: int) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """What must stay alive, and what the extension takes."""
    dy = feature_map("dy", given.dy)
    scale = None if given.scale is None else numbers("scale", given.scale, n, co)
    if given.y is None:
        return [dy, scale], (dy.data_ptr(), 0, 0, 0, 0, address(scale), 0)
    if given.stats is None or given.dstats is None:
        raise ValueError("y needs stats and dstats")
    y = feature_map("y", given.y, dy)
    stats, dstats = (
        numbers("stats", given.stats, 2, n, co),
        numbers("dstats", given.dstats, 2, n, co),
    )
    pre = None if given.pre is None else numbers("pre", given.pre, 2, co)
    kept = [dy, y, stats, dstats, pre, scale]
    return kept, (*(address(t) for t in kept), code(given.pre_act))


def _check_weight(weight: Tensor, x: Tensor, channels: int) -> None:
    if weight.dtype != x.dtype or weight.dim() != x.dim() or weight.shape[1] != channels:
        raise ValueError(
            f"weight must be [co, {channels}, *kernel] of {x.dtype}, got {tuple(weight.shape)} of {weight.dtype}"
        )


def _weight(weight: Tensor, x: Tensor, channels: int) -> Tensor:
    """``weight`` channels-last: a tile's input channels are read side by side."""
    _check_weight(weight, x, channels)
    return layout.channels_last(weight)


def _out_size(
    size: tuple[int, ...], weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[int, ...]:
    sizes = zip(size, weight.shape[2:], stride, padding, strict=True)
    return tuple((i + 2 * p - k) // s + 1 for i, k, s, p in sizes)


def _bytes(count: int, like: Tensor) -> Tensor:
    return torch.empty(max(count, 16), dtype=torch.uint8, device=like.device)


def _forward(
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
    raw: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output of ``fprop_sources``, its moments and, with ``raw``, the output before it was finished."""
    x = sources[0][0]
    n, co = x.shape[0], weight.shape[0]
    ci = sum(s[0].shape[1] for s in sources)
    weight = _weight(weight, x, ci)
    kept, given = _sources(sources)
    bias = None if bias is None else numbers("bias", bias, co)
    pre = None if pre is None else numbers("pre", pre, 2, co)
    out_coef = None if out_coef is None else numbers("out_coef", out_coef, 7, n, co)
    seen = _seen_size(sources[0])
    size = _out_size(seen, weight, stride, padding)
    conv = convolution(x, (ci, co), size, tuple(weight.shape[2:]), stride, padding, seen)
    y = torch.empty((n, co, *size), dtype=x.dtype, device=x.device, memory_format=FORMATS[x.dim()])
    unfinished = empty_map(y) if raw else None
    stats = torch.empty((2, n, co) if moments else (0,), dtype=torch.float32, device=x.device)
    work = _bytes(conv.forward_workspace(), x)
    with on_device(x):
        conv.forward(
            sources=given,
            weight=weight.data_ptr(),
            strides=_strides(weight),
            bias=address(bias),
            pre=address(pre),
            pre_act=code(pre_act),
            out_coef=address(out_coef),
            out_act=code(out_act),
            y=y.data_ptr(),
            raw=address(unfinished),
            stats=stats.data_ptr() if moments else 0,
            workspace=work.data_ptr(),
            stream=stream_of(x),
        )
    del kept
    return y, stats, unfinished


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
    tail = (bias, pre, pre_act, out_coef, out_act, stride, padding, moments, False)
    return _forward(sources, weight, *tail)[:2]


def fprop_finished(
    sources: Sources,
    weight: Tensor,
    bias: Tensor | None,
    out_coef: Tensor,
    out_act: str,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """The finished block [N, Co, *T] and the unfinished output y that its gradient needs."""
    tail = (bias, None, "none", out_coef, out_act, stride, padding, False, True)
    v, _, y = _forward(sources, weight, *tail)
    assert y is not None
    return v, y


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
    output = Output(x.shape[1], x, coef, act)
    ((dx, dcoef),) = dgrad_sources(
        Gradient(e), weight, [output], tuple(x.shape[2:]), stride, padding
    )
    assert dx is not None
    return dx, dcoef


def dgrad_sources(
    gradient: Gradient,
    weight: Tensor,
    outputs: Sequence[Output],
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Gradients at the raw map of each source, channels-last, and at its coefficients [7, N, C].

    Without ``raw`` and ``window`` that is the gradient at what the convolution saw of the source, [N, C, *size].

    Args:
        weight: [Co, ΣC, *K].
        size: spatial size of what the convolution saw.

    Returns:
        (dx, dcoef) of each output: None where nothing is wanted, or pending.
    """
    dy = gradient.dy
    weight = _weight(weight, dy, sum(o.channels for o in outputs))
    kept, given = _gradient(gradient, *dy.shape[:2])
    conv = _of_gradient(dy, weight, size, stride, padding)
    found, described, held = _outputs(outputs, dy, size)
    work = _bytes(conv.backward_workspace(), dy)
    with on_device(dy):
        conv.backward(
            gradient=given,
            weight=weight.data_ptr(),
            strides=_strides(weight),
            outputs=described,
            workspace=work.data_ptr(),
            stream=stream_of(dy),
        )
    del kept, held
    return found


def _outputs(
    outputs: Sequence[Output], dy: Tensor, size: tuple[int, ...]
) -> tuple[list[tuple[Tensor | None, Tensor | None]], list[tuple[int, ...]], list[Tensor | None]]:
    """(dx, dcoef) of each output, what the extension takes, and what must stay alive."""
    found, described, kept = [], [], []
    for output in outputs:
        dx, dcoef, held, numbers_of = _output(output, dy, size)
        found.append((dx, dcoef))
        described.append(numbers_of)
        kept += held
    return found, described, kept


def _output(
    output: Output, dy: Tensor, size: tuple[int, ...]
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], tuple[int, ...]]:
    """dx, dcoef, what must stay alive, and what the extension takes."""
    channels, raw, coef, act, window, into, wanted = output
    if not wanted:
        return None, None, [], (0, 0, channels, 0, 0, 0, 0)
    n = dy.shape[0]
    if coef is not None:
        coef = numbers("coef", coef, 7, n, channels)
    shape = (n, channels, *size)
    if window is not None:
        if raw is None or not views.disjoint(window) or any(window.padding):
            raise ValueError("a window needs its map, no padding and must not overlap the next")
        shape = tuple(raw.shape)
    if raw is not None and (tuple(raw.shape) != shape or raw.dtype != dy.dtype):
        raise ValueError(f"raw must be {shape} of {dy.dtype}, got {tuple(raw.shape)}, {raw.dtype}")
    if raw is not None:
        feature_map("raw", raw)
    if into is None:
        dx = torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=FORMATS[dy.dim()])
    else:
        dx = feature_map("into", into)
        if tuple(dx.shape) != shape or dx.dtype != dy.dtype:
            raise ValueError(f"into must be {shape} of {dy.dtype}, got {tuple(dx.shape)}")
    dcoef = None if coef is None else torch.empty_like(coef)
    act = act if coef is not None else "none"
    described: tuple[int, ...] = (
        *(address(raw), address(coef), channels, code(act)),
        *(dx.data_ptr(), address(dcoef), int(into is not None)),
    )
    if window is not None:
        described += (*_three(window.kernel, 1), *_three(window.stride, 1), *_three(shape[2:], 1))
    return dx, dcoef, [raw, coef], described


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
    return wgrad_sources(Gradient(e), [(x, coef, act)], weight, stride, padding)[0]


def wgrad_sources(
    gradient: Gradient,
    sources: Sources,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dW, as of ``wgrad``, and with ``sums`` dpre [2, Co]: Σ e and the gradient at the slopes of ``pre``."""
    x, dy = sources[0][0], gradient.dy
    _check_weight(weight, x, sum(s[0].shape[1] for s in sources))
    kept, given = _sources(sources)
    held, gradient_numbers = _gradient(gradient, *dy.shape[:2])
    conv = _of_gradient(dy, weight, _seen_size(sources[0]), stride, padding)
    dweight, dpre = _weight_results(weight, dy, sums)
    work = _bytes(conv.weight_gradient_workspace(), x)
    with on_device(x):
        conv.weight_gradient(
            gradient=gradient_numbers,
            sources=given,
            dweight=dweight.data_ptr(),
            dpre=address(dpre),
            workspace=work.data_ptr(),
            stream=stream_of(x),
        )
    del kept, held
    return dweight, dpre


def _of_gradient(
    dy: Tensor,
    weight: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> _CUDA.Convolution:
    channels = (weight.shape[1], weight.shape[0])
    out, kernel = tuple(dy.shape[2:]), tuple(weight.shape[2:])
    return convolution(dy, channels, out, kernel, stride, padding, size)


def _weight_results(weight: Tensor, dy: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    dweight = torch.empty(
        weight.shape, dtype=dy.dtype, device=dy.device, memory_format=FORMATS[dy.dim()]
    )
    shape = (2, weight.shape[0])
    dpre = torch.empty(shape, dtype=torch.float32, device=dy.device) if sums else None
    return dweight, dpre


def covers_joint(
    dy: Tensor,
    weight: Tensor,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> bool:
    """Whether ``joint_sources`` serves a convolution of maps of ``size``."""
    return _of_gradient(dy, weight, size, stride, padding).has_joint()


def joint_sources(
    gradient: Gradient,
    weight: Tensor,
    outputs: Sequence[Output],
    sources: Sources,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    sums: bool = False,
) -> tuple[list[tuple[Tensor | None, Tensor | None]], Tensor, Tensor | None]:
    """``dgrad_sources`` and ``wgrad_sources`` by one kernel, which reads each map once."""
    dy = gradient.dy
    size = _seen_size(sources[0])
    weight = _weight(weight, dy, sum(o.channels for o in outputs))
    conv = _of_gradient(dy, weight, size, stride, padding)
    kept, given = _gradient(gradient, *dy.shape[:2])
    found, described, held = _outputs(outputs, dy, size)
    read, sources_given = _sources(sources)
    dweight, dpre = _weight_results(weight, dy, sums)
    work = _bytes(conv.joint_workspace(), dy)
    with on_device(dy):
        conv.joint(
            gradient=given,
            weight=weight.data_ptr(),
            strides=_strides(weight),
            outputs=described,
            sources=sources_given,
            dweight=dweight.data_ptr(),
            dpre=address(dpre),
            workspace=work.data_ptr(),
            stream=stream_of(dy),
        )
    del kept, held, read
    return found, dweight, dpre
