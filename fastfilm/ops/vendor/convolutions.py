"""PyTorch's own convolutions on channels-last maps, by the fastest of the routes that it has."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Geometry, Keep, channels_last_format, dense
from . import faults

SMALL = 20480
"""Up to so many values (N·C·H·W; in 3D N·C·D·H) PyTorch convolves one float32 sample on a CPU without oneDNN."""

_DOUBLED = 32
"""Strided convolutions of such maps with at most so many output channels: a sample of zeros is appended before the
gradient at the input (up to 1.8 times faster, and within 1.5 times the error)."""


def convolution(
    v: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, keep: Keep | None = None
) -> Tensor:
    """``torch.convolution`` of a map [N, Ci, *S]; [N, Co, *T].

    Args:
        keep: where oneDNN's form of the weight is kept; it is made anew for each call otherwise.
    """
    bias = None if bias is None else dense.contiguous(bias)
    kept = keep is not None
    form = _form(v, weight, geometry, kept)
    route = _routes.get(form) or _remember(form, _route(v, weight, geometry, kept))
    if route.guarded:
        guarded = faults.guarded(convolution, v, weight, bias, geometry, weight_gradient=False)
        assert guarded is not None
        return guarded
    stride, padding, dilation, *_, groups = geometry
    if keep is not None and route.may_pack and _packs(v, weight, bias, geometry, form):
        own = v.shape, tuple(stride), tuple(padding), tuple(dilation), groups
        given = padding, stride, dilation, groups
        reorder, laid_out = torch.ops.mkldnn._reorder_convolution_weight, dense.vendors_weight
        size = list(v.shape)
        packed = keep(weight, own, lambda w: reorder(laid_out(w, False), *given, size))
        if packed is not None:
            convolve = torch.ops.mkldnn._convolution_pointwise
            y: Tensor = convolve(dense.vendors_map(v, False), packed, bias, *given, "none", [], "")
            return y
    if route.product:
        return _product(v, weight, bias)
    v, weight = dense.vendors_map(v, route.plain), dense.vendors_weight(weight, route.plain)
    if route.small:
        return torch.ops.aten.mkldnn_convolution.default(
            v, weight, bias, padding, stride, dilation, groups
        )
    return torch.convolution(v, weight, bias, *geometry)


class _Route(NamedTuple):
    """How one form of convolution runs.

    Attributes:
        guarded: with the precautions of ``faults.precautions``.
        plain: contiguous. small: by oneDNN, which PyTorch would not take. product: as a product of matrices.
        may_pack: with a weight in oneDNN's layout, if it takes one.
    """

    guarded: bool
    plain: bool = False
    small: bool = False
    product: bool = False
    may_pack: bool = False


_KEPT = 4096
_routes: dict[Any, Any] = {}
"""Decisions by form of call: to decide takes as long as a small convolution."""


def _remember(form: Any, decided: Any) -> Any:
    if len(_routes) >= _KEPT:
        _routes.clear()
    _routes[form] = decided
    return decided


def _form(v: Tensor, weight: Tensor, geometry: Geometry, *more: Any) -> tuple[Any, ...]:
    """All that a route depends on."""
    about = v.shape, v.dtype, v.device.type, weight.shape, weight.is_contiguous()
    return *about, geometry, torch.backends.mkldnn.enabled, more


def _route(v: Tensor, weight: Tensor, geometry: Geometry, kept: bool) -> _Route:
    stride, _, _, transposed, _, groups = geometry
    if any(faults.precautions(v, weight, geometry, weight_gradient=False)):
        return _Route(True)
    unsafe = faults.unsafe_channels_last(v) or _sums_by_groups(v, weight, groups, transposed)
    small = not unsafe and not transposed and _avoids_onednn(v, weight, groups)
    small = small and (weight.shape[1] < WIDE // 4 or _sums_in_parts())
    if transposed:
        long = not unsafe and _long_transposed(v, weight, stride, groups)
    else:
        long = not unsafe and long_sums(v, weight, small, kept)
    # with AVX-512 the contiguous form rounds less, and the product was not measured
    product = long and not (small or transposed or _sums_in_parts())
    product = product and _multiplies(v, weight, geometry)
    return _Route(False, unsafe or long, small, product, not (unsafe or long or transposed))


def _multiplies(v: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution is one product of matrices: 1×1, without stride and padding."""
    stride, padding, *_, groups = geometry
    return (
        weight[0, 0].numel() == 1 == max(stride) == groups
        and not any(padding)
        and v.dtype == torch.float32
        and v.device.type == "cpu"
    )


def _product(v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1×1 convolution of a channels-last map as a product, which needs no copies and rounds as contiguous."""
    n, ci, *size = v.shape
    co, order = weight.shape[0], channels_last_format(v.dim())
    rows, columns = dense.vendors_map(v, False).movedim(1, -1), weight.reshape(co, ci).t()
    y = torch.empty((n, co, *size), dtype=v.dtype, memory_format=order)
    into, rows = y.movedim(1, -1).view(-1, co), rows.reshape(-1, ci)
    if bias is None:
        torch.mm(rows, columns, out=into)
    else:
        torch.addmm(bias, rows, columns, out=into)
    return y


def convolution_backward(
    e: Tensor, v: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients at the map and at the weight, as far as ``needs`` asks for them (what it does not is None).

    Args:
        e: gradient at the output [N, Co, *T].
    """
    form = _form(v, weight, geometry, "backward", needs)
    wide, before, plain, doubled = _routes.get(form) or _remember(
        form, _route_backward(v, weight, geometry, needs)
    )
    if wide:
        given = e.float(), v.float(), weight.float()
        found = convolution_backward(*given, geometry, needs)
        return tuple(g if g is None else g.to(v.dtype) for g in found)  # type: ignore[return-value]
    if before:
        padding, transposed = geometry.padding, geometry.transposed
        bare = geometry._replace(padding=(0,) * len(padding))
        if transposed:
            return convolution_backward(faults.padded(e, padding), v, weight, bare, needs)
        dv, dw = convolution_backward(e, faults.padded(v, padding), weight, bare, needs)
        return None if dv is None else faults.cropped(dv, padding), dw
    e, v = dense.vendors_map(e, plain), dense.vendors_map(v, plain)
    weight = dense.vendors_weight(weight, plain)
    if doubled:
        e, v = _with_zeros(e), _with_zeros(v)
    dv, dw, _ = torch.ops.aten.convolution_backward.default(
        e, v, weight, None, *geometry, [*needs, False]
    )
    return dv[:1] if doubled else dv, dw


def _route_backward(
    v: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
) -> tuple[bool, bool, bool, bool]:
    """Whether gradients are taken in float32, of a padded map, contiguously, and beside a sample of zeros."""
    stride, _, _, transposed, _, groups = geometry
    wide, before = faults.precautions(v, weight, geometry, weight_gradient=needs[1])
    plain = v.dtype == torch.float32 and v.device.type == "cpu"
    plain = plain and _prefers_contiguous(v, weight, stride, transposed, groups, needs)
    plain = plain or faults.unsafe_channels_last(v) or _overruns(v, weight, stride)
    plain = plain or _sums_by_groups(v, weight, groups, True)
    doubled = (
        not plain
        and not transposed
        and not needs[1]
        and max(stride) > 1
        and weight.shape[0] <= _DOUBLED
        and _avoids_onednn(v, weight, groups)
    )
    return wide, before, plain, doubled


def _overruns(v: Tensor, weight: Tensor, stride: Sequence[int]) -> bool:
    """Whether oneDNN's channels-last weight gradient would write behind its buffers.

    A strided 1×1 convolution of 8 or 12 channels does (torch 2.13): the process dies later of a damaged heap.
    """
    pointwise = all(k == 1 for k in weight.shape[2:])
    return pointwise and max(stride) > 1 and v.device.type == "cpu"


WIDE = 128
"""Input channels (of a group) from which float32 sums on a CPU are taken in the form that rounds less; fewer of
them where the kernel has several taps: see ``_wide``."""


def long_sums(v: Tensor, weight: Tensor, small: bool = False, packed: bool = False) -> bool:
    """Whether a channels-last convolution would round visibly more than a contiguous one.

    On a CPU oneDNN adds up all of a channels-last float32 sum in one register, so that its error grows with
    the root of the channels; of its contiguous form, which adds up 16 channels and then these sums, it does not.
    At 64 channels it is twice that of the contiguous form, and at 256 four times; from there on both are about as
    fast (unless the map is so small that copying a channels-last weight would show). PyTorch's slow convolution,
    which ``small`` maps would get, is more exact still.
    """
    width = weight.shape[1]
    if width < WIDE // 4 or v.dtype != torch.float32 or v.device.type != "cpu":
        return False
    if small:
        return True
    if not _sums_in_parts() and not _avoids_onednn(v, weight, 1):
        # with AVX2 only products of matrices, which 1×1 convolutions are, round differently, and less so
        pointwise = max(weight.shape[2:]) == 1
        heavy = not packed and _is_heavy(v, weight)
        return weight.is_contiguous() and (heavy or (pointwise and width >= 2 * WIDE))
    wide = _wide(weight) if _sums_in_parts() else WIDE
    return width >= wide and (weight.is_contiguous() or not _has_few_positions(v))


def _has_few_positions(v: Tensor) -> bool:
    """Whether copying a wide channels-last weight would take much of the time of a convolution of ``v``."""
    return v.shape[0] * math.prod(v.shape[2:]) < 256


def _wide(weight: Tensor) -> int:
    """Summed channels from which a channels-last gradient, or with AVX-512 a convolution, rounds visibly more."""
    if max(weight.shape[2:]) == 1:
        return WIDE
    return WIDE // 2 if _sums_in_parts() else WIDE // 4


def _long_transposed(v: Tensor, weight: Tensor, stride: Sequence[int], groups: int) -> bool:
    """``long_sums`` of a transposed convolution: at unit stride alone, where it is an ordinary one."""
    return (
        max(stride) == 1
        and v.dtype == torch.float32
        and v.device.type == "cpu"
        and weight.shape[0] // groups >= _wide(weight)
        and (weight.is_contiguous() or not _has_few_positions(v))
    )


_HEAVY = 1 << 16
"""Values of a weight below which copying it takes no longer than the call does."""


def _is_heavy(v: Tensor, weight: Tensor) -> bool:
    """Whether a weight has so many values that copying a map twice takes less time than copying the weight."""
    return weight.numel() >= max(v.numel(), _HEAVY)


def _prefers_contiguous(
    v: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    transposed: bool,
    groups: int,
    needs: tuple[bool, bool],
) -> bool:
    """Whether gradients of float32 maps on a CPU are taken contiguously, to round less or to be faster.

    The gradient at a map of unit stride is a convolution that sums over the other channels: see ``long_sums``.
    Its channels-last form rounds visibly more from ``_wide`` channels on, and with AVX2 the weight's takes 1.3 to
    3.5 times as long for wide maps, but in 3D at unit stride.
    """
    alike = not _sums_in_parts()  # both layouts of a convolution round alike
    plain = weight.is_contiguous()
    if plain and alike and _is_heavy(v, weight):
        return True
    spatial = alike and max(weight.shape[2:]) > 1
    summed = weight.shape[1] if transposed else weight.shape[0] // groups
    unit = max(stride) == 1
    if needs[0] and (transposed or unit) and summed >= _wide(weight):
        return plain or not _has_few_positions(v)
    if not plain:
        return False
    slow = spatial and not (v.dim() == 5 and unit) and max(weight.shape[:2]) >= WIDE // 2
    return slow and needs[1] and groups == 1


def _sums_by_groups(v: Tensor, weight: Tensor, groups: int, gradient: bool) -> bool:
    """Whether a channels-last convolution of groups, or its gradients, rounds visibly more than a contiguous one.

    On a CPU oneDNN multiplies matrices for contiguous float32 groups whose channels are not whole vectors, or with
    AVX-512 adds up blocks of them, which rounds less than its channels-last form: there gradients have 1.5 to 4
    times the error, and values of more than 8 channels of a group twice, in 3D and with AVX-512 in 2D too. This
    holds for gradients of groups of one channel in 3D with AVX-512 alone. The contiguous form takes up to four
    times as long, which is the time of eager PyTorch.

    Args:
        gradient: whether a gradient is taken, or a transposed convolution, which is one.
    """
    if groups == 1 or v.dtype != torch.float32 or v.device.type != "cpu":
        return False
    pair, vector = (weight.shape[1], weight.shape[0] // groups), 16 if _sums_in_parts() else 8
    if all(c % vector == 0 for c in pair):
        return False
    if max(pair) == 1:
        return gradient and v.dim() == 5 and _sums_in_parts()
    return gradient or (pair[0] > 8 and (v.dim() == 5 or _sums_in_parts()))


def _avoids_onednn(v: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether PyTorch would take its slow 3D convolution, which runs on one core and unfolds its input."""
    return (
        v.dim() == 5
        and v.device.type == "cpu"
        and v.dtype == torch.float32
        and v.shape[0] == 1
        and groups == 1
        and v.numel() > 0
        and 1 < max(weight.shape[2:]) <= 3
        and math.prod(v.shape[:4]) <= SMALL
        and bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    )


@functools.cache
def _sums_in_parts() -> bool:
    """Whether oneDNN's contiguous float32 convolutions round no more than PyTorch's slow ones: with AVX-512 alone.

    With AVX2 their error grows with the root of the channels: 2.1 times the slow one's at 32, 3.3 times at 80.
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _packs(v: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, form: Any) -> bool:
    """Whether such a convolution is oneDNN's, which takes weights in a layout of its own."""
    key = "packs", bias is None, form
    found = _routes.get(key)
    if found is None:
        found = _remember(key, _is_onednns(v, weight, bias, geometry))
    return bool(found)


def _is_onednns(v: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> bool:
    """``_packs`` as it is decided once for each form."""
    if v.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled:
        return False
    if v.dtype == torch.float32:
        shown = dense.vendors_map(v, False), weight, bias, *geometry, None
        return bool(torch._C._select_conv_backend(*shown).name == "Mkldnn")
    return v.dtype == torch.bfloat16 and _has_bfloat16()


@functools.cache
def _has_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 on this CPU: without AVX-512 (or AVX-NE-CONVERT) it raises."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _with_zeros(x: Tensor) -> Tensor:
    """A single sample [1, C, *S] and one of zeros behind it, channels-last."""
    both = torch.zeros_like(x.expand(2, *x.shape[1:]), memory_format=torch.channels_last_3d)
    both[0] = x[0]
    return both
