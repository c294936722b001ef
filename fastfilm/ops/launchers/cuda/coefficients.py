"""Coefficients of a block, computed by the launches of its convolution; they agree with ``reference.of_block``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec import DROPOUT_POSITIONS, ORDERS, Behind, Kind, dense
from . import _CUDA
from .arguments import DTYPES

_NORMS = {"none": 0, "batch": 1, "instance": 2}
_ABSENT = (0, 0, 0, 0)


def covers_behind(behind: Behind, raw: Tensor) -> bool:
    """Whether a convolution of a map like ``raw`` writes such coefficients; not of group and layer norm."""
    kind, _, tensors, _ = behind
    if kind.norm not in _NORMS or kind.wide or raw.dtype not in DTYPES:
        return False
    if kind.dropout_position == "norm" and tensors.dropout_mask is None:
        return False  # the backends that compute the gradients use another pivot
    for t in tensors:  # noqa: SIM110 (a generator is a Python call for each)
        if t is not None and t.dtype not in DTYPES:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def block_of(kind: Kind) -> _CUDA.Block:
    """A kind, as the extension takes it."""
    values = kind.count * (kind.batch if kind.norm == "batch" else 1)
    return _CUDA.Block(
        norm=_NORMS[kind.norm],
        order=ORDERS.index(kind.order),
        position=DROPOUT_POSITIONS.index(kind.dropout_position),
        use_input=kind.uses_input,
        update=kind.update,
        eps=kind.eps,
        unbiased=values / max(values - 1, 1),
        slope=kind.slope,
    )


def described(behind: Behind) -> tuple[list[Tensor | None], list[tuple[int, ...]]]:
    """The tensors of a block but the moments, dense, to be held during the call, and what the extension takes.

    That is (address, dtype, step, pitch): γ, β and the mask may have a row for each sample, the slope one number.
    """
    mean, var, _, *others = behind.tensors
    kept = [mean, var, *others]
    given: list[tuple[int, ...]] = [_ABSENT] * len(kept)
    for i, t in enumerate(kept):
        if t is None:
            continue
        if not t.is_contiguous() or t.is_neg() or t._is_zerotensor():
            t = kept[i] = dense.contiguous(t.detach())
        shape = t.shape
        rows = 5 <= i < 8 and len(shape) == 2 and shape[0] > 1
        step = 0 if i == 8 and shape.numel() == 1 else 1
        given[i] = t.data_ptr(), DTYPES[t.dtype], step, shape[1] if rows else 0
    return kept, given


def moved(behind: Behind, kept: Sequence[Tensor | None]) -> None:
    """Tells PyTorch of running statistics that a launch has moved; those that were copied are copied back."""
    if not behind.kind.update:
        return
    for theirs, ours in zip(behind.tensors[:2], kept[:2], strict=True):
        assert theirs is not None and ours is not None
        if ours is not theirs:
            theirs.copy_(ours)
        elif not theirs.is_inference():
            torch.autograd.graph.increment_version(theirs)
