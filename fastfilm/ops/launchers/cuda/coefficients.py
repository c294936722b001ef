"""A block's coefficients in the launches of its convolution; they agree with ``reference.of_block``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...spec import Behind, Kind, dense
from . import _CUDA
from .arguments import DTYPES

_NORMS = {"none": 0, "batch": 1, "instance": 2}
_ORDERS = {"conv-norm-film-act": 0, "conv-norm-act-film": 1, "conv-act-norm-film": 2}
_POSITIONS = {"end": 0, "film": 1, "norm": 2}

_ABSENT = (0, 0, 0, 0)


def covers_behind(behind: Behind, raw: Tensor) -> bool:
    """Whether a convolution of a map like ``raw`` writes such coefficients; not of group and layer norm."""
    kind, _, tensors, _ = behind
    known = kind.norm in _NORMS and not kind.wide and raw.dtype in DTYPES
    if kind.dropout_position == "norm" and tensors.dropout_mask is None:
        return False  # those who have the gradients do not agree on the pivot
    return known and all(t is None or t.dtype in DTYPES for t in tensors)


@functools.lru_cache(maxsize=4096)
def block_of(kind: Kind) -> _CUDA.Block:
    """A kind, as the extension takes it."""
    values = kind.count * (kind.batch if kind.norm == "batch" else 1)
    return _CUDA.Block(
        norm=_NORMS[kind.norm],
        order=_ORDERS[kind.order],
        position=_POSITIONS[kind.dropout_position],
        use_input=kind.uses_input,
        update=kind.update,
        eps=kind.eps,
        unbiased=values / max(values - 1, 1),
        slope=kind.slope,
    )


def described(behind: Behind) -> tuple[list[Tensor | None], list[tuple[int, ...]]]:
    """The tensors of a block but the moments, dense, to be held during the call, and what the extension takes."""
    mean, var, _, *others = behind.tensors
    kept = [_readable(t) for t in (mean, var, *others)]
    return kept, [_numbers(t, i) for i, t in enumerate(kept)]


def _readable(t: Tensor | None) -> Tensor | None:
    if t is None or (t.is_contiguous() and not t.is_neg() and not t._is_zerotensor()):
        return t
    return dense.contiguous(t.detach())


def _numbers(t: Tensor | None, place: int) -> tuple[int, ...]:
    """(address, dtype, step, pitch): γ, β and the mask may have a row for each sample, the slope one number."""
    if t is None:
        return _ABSENT
    rows = 5 <= place < 8 and t.dim() == 2 and t.shape[0] > 1
    step = 0 if place == 8 and t.numel() == 1 else 1
    return t.data_ptr(), DTYPES[t.dtype], step, t.shape[-1] if rows else 0


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
