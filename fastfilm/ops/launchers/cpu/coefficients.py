"""The [N, C]-sized algebra of a block as one C++ call each way; it agrees with ``reference.of_block``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec import DROPOUT_POSITIONS, ORDERS, Kind, TailTensors, dense
from . import _C
from .arguments import DTYPES

_NORMS = {"none": 0, "batch": 1, "instance": 2, "group": 3, "layer": 3}


@functools.lru_cache(maxsize=4096)
def _algebra(kind: Kind) -> _C.Coefficients:
    return _C.Coefficients(
        wide=kind.wide,
        norm=_NORMS[kind.norm],
        order=ORDERS.index(kind.order),
        position=DROPOUT_POSITIONS.index(kind.dropout_position),
        use_input=kind.uses_input,
        update=kind.update,
        n=kind.batch,
        c=kind.channels,
        groups=kind.groups,
        count=kind.count,
        eps=kind.eps,
        slope=kind.slope,
    )


def _arguments(
    tensors: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], tuple[list[int], int, list[int]]]:
    """Dense tensors with their values in their memory, to be held during the call that gets the rest of this:
    addresses, types (four bits each) and rows, as ``_C.Coefficients`` takes them."""
    readable = list(tensors)
    addresses, types, rows = [0] * len(readable), 0, [1, 1, 1, 1]
    for i, t in enumerate(readable):
        if t is None:
            continue
        if not t.is_contiguous() or t.is_neg() or t._is_zerotensor():
            t = readable[i] = dense.contiguous(t.detach())
        addresses[i] = t.data_ptr()
        types |= DTYPES[t.dtype] << 4 * i
        if i >= 6:  # γ, β, mask: [C] and [1, C] have one row; the slope counts its values
            rows[i - 6] = t.numel() if i == 9 else t.shape[0] if t.dim() == 2 else 1
    return readable, (addresses, types, rows)


def covers_block(kind: Kind) -> bool:
    """Whether ``block_coefficients`` serves such a block: whether the C++ kernels have its norm."""
    return kind.norm in _NORMS


def block_coefficients(
    kind: Kind, momentum: float, tensors: TailTensors, device: torch.device
) -> Tensor:
    """Rows a, b, g, s, p, q, slope [7, N, C]; see ``reference.of_block``."""
    dtype = torch.float64 if kind.wide else torch.float32
    coef = torch.empty((7, kind.batch, kind.channels), dtype=dtype, device=device)
    readable, arguments = _arguments(tensors)
    _algebra(kind).forward(momentum, *arguments, coef.data_ptr())
    if kind.update:
        written = []
        for theirs, ours in zip(tensors[:2], readable[:2], strict=True):
            assert theirs is not None and ours is not None
            if ours is not theirs:
                theirs.copy_(ours)
            elif not theirs.is_inference():
                written.append(theirs)  # the extension wrote without PyTorch's knowledge
        torch.autograd.graph.increment_version(written)
    return coef


def block_coefficients_backward(
    kind: Kind, tensors: Sequence[Tensor | None], dcoef: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``block_coefficients`` at the ``wanted`` of its tensors, in their dtypes."""
    grads: list[Tensor | None] = [
        torch.empty(t.shape, dtype=t.dtype) if want and t is not None else None
        for t, want in zip(tensors, wanted, strict=True)
    ]
    dcoef = dense.contiguous(dcoef.to(torch.float64 if kind.wide else torch.float32))
    addresses = [0 if t is None else t.data_ptr() for t in grads]
    # the name keeps the tensors alive: the call gets addresses only
    _readable, arguments = _arguments(tensors)
    _algebra(kind).backward(*arguments, dcoef.data_ptr(), addresses)
    return grads
