"""Launchers of the CUDA convolutions: forward, gradients at the inputs and at the weight.

An input is a map or the concatenation of two, each with what is pending on it; the gradient at the raw output is
given by its parts. Neither is ever written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...spec import (
    Behind,
    Geometry,
    Gradient,
    NormInput,
    Output,
    Pending,
    Source,
    SourceGradient,
    dense,
    raw_like,
)
from ..arguments import activation_code, address, addresses
from . import _CUDA
from .arguments import empty_map, feature_map, numbers, on_device, stream_of
from .coefficients import block_of, described, moved
from .plans import KERNELS, Shape, plan

Sizes = tuple[int, ...]

_NO_BLOCK = [(0, 0, 0, 0)] * 9


def covers_sources(sources: Sequence[Source]) -> bool:
    """Whether the convolutions read such sources as they are: else they are written first."""
    if len(sources) > 2 or any(s.view is not None for s in sources):
        return False
    raw = sources[0].raw
    return len(sources) == 1 or raw.shape[1] * raw.element_size() % 16 == 0


def convolution(
    x: Tensor,
    weight: Tensor,
    out: Sequence[int],
    geometry: Geometry,
    size: Sequence[int] | None = None,
    kernels: Sequence[str] = KERNELS,
) -> _CUDA.Convolution:
    """The kernels of one convolution, with the layout that suits x's GPU.

    Args:
        x: a map of the convolution's type, batch and device.
        weight: [Co, Ci, *K].
        out: spatial size of the result; ``size``: of what the convolution sees, if that is not ``x``.
        kernels: those that the call runs.
    """
    (co, ci, *kernel), size = weight.shape, x.shape[2:] if size is None else size
    sizes = tuple(size), tuple(out), tuple(kernel), geometry.stride, geometry.padding
    with on_device(x):
        return plan(Shape(x.dtype, x.shape[0], (ci, co), *sizes), x, kernels)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of [co, ci, kd, kh, kw]."""
    s = weight.stride()
    return s if len(s) == 5 else (*s[:2], 0, *s[2:])


def _sources(sources: Sequence[Source]) -> tuple[list[Any], list[tuple[int, ...]]]:
    """The tensors to hold during the call, and the arguments of the extension."""
    kept: list[Any] = []
    given: list[tuple[int, ...]] = []
    size, batch = sources[0].size, sources[0].raw.shape[0]
    for source in sources:
        x, coef, act, _, _ = source
        x = feature_map("x", x)
        coef = None if coef is None else numbers("coef", coef, 7, *x.shape[:2])
        found = (
            *addresses(x, coef),
            x.shape[1],
            activation_code(act if coef is not None else "none"),
        )
        if source.size != size or x.shape[0] != batch:
            raise ValueError(
                f"the sources must have the same batch and size {size}, got {source.size}"
            )
        kept += [x, coef]
        given.append(found)
    return kept, given


def _gradient(given: Gradient, n: int, co: int) -> tuple[list[Tensor | None], tuple[int, ...]]:
    """The tensors to hold during the call, and the arguments of the extension."""
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
    return kept, (*addresses(*kept), activation_code(given.pre_act))


def _check_weight(weight: Tensor, x: Tensor, channels: int) -> None:
    if weight.dtype != x.dtype or weight.dim() != x.dim() or weight.shape[1] != channels:
        raise ValueError(
            f"weight must be [co, {channels}, *kernel] of {x.dtype}, got {tuple(weight.shape)} of {weight.dtype}"
        )


def _weight(weight: Tensor, x: Tensor, channels: int) -> Tensor:
    """``weight``, checked; its strides may be any."""
    _check_weight(weight, x, channels)
    return dense.values(weight)


def _bytes(count: int, like: Tensor) -> Tensor:
    # float32, which tests fill with NaN: no kernel may count on zeros
    return torch.empty(max(count // 4, 4), dtype=torch.float32, device=like.device)


def fprop(
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    norm_input: NormInput | None = None,
    finish: Pending | None = None,
    raw: bool = False,
    behind: Behind | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution of one map or of the concatenation of two, each behind its own pending affine.

    Args:
        weight: [Co, ΣCi, *K], K 1 or 3 in every dimension, in any layout.
        bias: [Co], added before the output is rounded and its moments are taken.
        norm_input: the input of the norm, for its moments; None: no moments are taken.
        finish: coefficients [7, N, Co] and activation with which the output is finished.
        raw: the unfinished output is wanted too.
        behind: coefficients that are written too; ``finish`` may take them where they need no moments.

    Returns:
        y [N, Co, *T], and its moments [2, N, Co] (empty without ``norm_input``), or with ``raw`` the unfinished y.
    """
    x = sources[0].raw
    n, co = x.shape[0], weight.shape[0]
    weight = _weight(weight, x, sum(s.raw.shape[1] for s in sources))
    kept, given = _sources(sources)
    pre, pre_act = norm_input or NormInput()
    out_coef, out_act = finish or Pending()
    bias = None if bias is None else numbers("bias", bias, co)
    pre = None if pre is None else numbers("pre", pre, 2, co)
    out_coef = None if out_coef is None else numbers("out_coef", out_coef, 7, n, co)
    seen = sources[0].size
    size = geometry.output_size(seen, weight.shape[2:])
    conv = convolution(x, weight, size, geometry, seen, ["fprop"])
    y = raw_like(x, (n, co, *size))
    unfinished = empty_map(y) if raw else None
    wanted = norm_input is not None
    stats = torch.empty((2, n, co) if wanted else (0,), dtype=torch.float32, device=x.device)
    block, of_block = ([], []) if behind is None else described(behind)
    work = _bytes(conv.forward_workspace(), x)
    with on_device(x):
        conv.forward(
            sources=given,
            weight=weight.data_ptr(),
            strides=_strides(weight),
            bias=address(bias),
            pre=address(pre),
            pre_act=activation_code(pre_act),
            out_coef=address(out_coef),
            out_act=activation_code(out_act),
            y=y.data_ptr(),
            raw=address(unfinished),
            stats=stats.data_ptr() if wanted else 0,
            block=None if behind is None else block_of(behind.kind),
            tensors=of_block or _NO_BLOCK,
            momentum=0.0 if behind is None else behind.momentum,
            coef=0 if behind is None else behind.coef.data_ptr(),
            workspace=work.data_ptr(),
            stream=stream_of(x),
        )
    if behind is not None:
        moved(behind, block)
    del kept
    return y, stats if unfinished is None else unfinished


def dgrad(
    gradient: Gradient,
    weight: Tensor,
    outputs: Sequence[Output],
    size: Sizes,
    geometry: Geometry,
) -> list[SourceGradient]:
    """Gradients at the raw map of each source, channels-last, and at its coefficients [7, N, C].

    Without ``raw`` that is the gradient at what the convolution saw of the source, [N, C, *size].

    Args:
        weight: [Co, ΣC, *K].
        size: spatial size of what the convolution saw.

    Returns:
        (dx, dcoef) of each output: None where nothing is wanted, or pending.
    """
    return gradients(gradient, weight, outputs, (), size, geometry)[0]


def wgrad(
    gradient: Gradient,
    sources: Sequence[Source],
    weight: Tensor,
    geometry: Geometry,
    sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """dW, like ``weight``.

    With ``sums`` also dpre [2, Co]: Σ e, and the gradient at the slopes of ``gradient.pre``.
    """
    return gradients(gradient, weight, (), sources, sources[0].size, geometry, sums)[1:]


def gradients(
    gradient: Gradient,
    weight: Tensor,
    outputs: Sequence[Output],
    sources: Sequence[Source],
    size: Sizes,
    geometry: Geometry,
    sums: bool = False,
) -> tuple[list[SourceGradient], Any, Tensor | None]:
    """``dgrad`` if there are ``outputs``, and ``wgrad`` if there are ``sources``, in fewer launches."""
    dy, dweight, dpre = gradient.dy, None, None
    found: list[SourceGradient] = []
    described: list[tuple[int, ...]] = []
    given: list[tuple[int, ...]] = []
    kept: list[Any] = []
    if outputs:
        weight = _weight(weight, dy, sum(o.channels for o in outputs))
        found, described, kept = _outputs(outputs, dy, size)
    if sources:
        _check_weight(weight, sources[0].raw, sum(s.raw.shape[1] for s in sources))
        read, given = _sources(sources)
        dweight, shape = torch.empty_like(weight), (2, weight.shape[0])
        dpre = torch.empty(shape, dtype=torch.float32, device=dy.device) if sums else None
        kept = [*kept, *read]
    parts, numbers_of = _gradient(gradient, *dy.shape[:2])
    kernels = ["dgrad"] * bool(outputs) + ["wgrad"] * bool(sources)
    conv = convolution(dy, weight, dy.shape[2:], geometry, size, kernels)
    work = _bytes(conv.gradients_workspace(bool(outputs), bool(sources)), dy)
    with on_device(dy):
        conv.gradients(
            gradient=numbers_of,
            weight=weight.data_ptr(),
            strides=_strides(weight),
            outputs=described,
            sources=given,
            dweight=address(dweight),
            dstrides=_strides(weight if dweight is None else dweight),
            dpre=address(dpre),
            workspace=work.data_ptr(),
            stream=stream_of(dy),
        )
    del kept, parts
    return found, dweight, dpre


def _outputs(
    outputs: Sequence[Output], dy: Tensor, size: tuple[int, ...]
) -> tuple[list[SourceGradient], list[tuple[int, ...]], list[Tensor | None]]:
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
    channels, raw, coef, act, into, wanted = output
    if not wanted:
        return None, None, [], (0, 0, channels, 0, 0, 0, 0)
    n = dy.shape[0]
    if coef is not None:
        coef = numbers("coef", coef, 7, n, channels)
    shape = (n, channels, *size)
    if coef is None:
        raw = None  # only its shape matters
    if raw is not None and (tuple(raw.shape) != shape or raw.dtype != dy.dtype):
        raise ValueError(f"raw must be {shape} of {dy.dtype}, got {tuple(raw.shape)}, {raw.dtype}")
    if raw is not None:
        feature_map("raw", raw)
    if into is None:
        dx = raw_like(dy, shape)
    else:
        dx = feature_map("into", into)
        if tuple(dx.shape) != shape or dx.dtype != dy.dtype:
            raise ValueError(f"into must be {shape} of {dy.dtype}, got {tuple(dx.shape)}")
    dcoef = None if coef is None else torch.empty_like(coef)
    act = act if coef is not None else "none"
    described: tuple[int, ...] = (
        *(address(raw), address(coef), channels, activation_code(act)),
        *(dx.data_ptr(), address(dcoef), int(into is not None)),
    )
    return dx, dcoef, [raw, coef], described
