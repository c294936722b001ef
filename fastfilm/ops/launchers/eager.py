"""The reference as a backend: every pass in plain PyTorch. It takes over where another backend's kernel fails."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..reference import derivatives
from ..spec import (
    Addends,
    Kind,
    NormInput,
    Pending,
    Source,
    SourceGradient,
    TailTensors,
    channels_last,
    raw_like,
)

reads_sources = False
convolves = False


def apply(y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
    """``reference.materialise``, channels-last; in y's memory if ``in_place``."""
    v = channels_last(reference.materialise(y, coef, act))
    return y.copy_(v) if in_place else v


def apply_backward(
    dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of ``reference.materialise`` at ``y`` (in dv's memory if ``in_place``) and ``coef``."""
    dy, dcoef = derivatives.materialise_gradients(dv, y, Pending(coef, act))
    assert dy is not None and dcoef is not None
    return dv.copy_(dy) if in_place else channels_last(dy), dcoef


def moments(y: Tensor, pre: Tensor | None, act: str) -> Tensor:
    """``reference.moments``."""
    return reference.moments(y, pre, act)


def moments_backward(
    dy: Tensor | None, dstats: Tensor, y: Tensor, stats: Tensor, pre: Tensor | None, act: str
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``reference.moments`` at ``y``, added to ``dy``, and at ``pre``."""
    given = torch.zeros_like(y) if dy is None else dy
    e, dpre = derivatives.after_moments(given, dstats, y, NormInput(pre, act))
    return channels_last(e), dpre


def residual(addends: Addends) -> Tensor:
    """``reference.residual``, channels-last."""
    return channels_last(reference.residual(addends))


def residual_backward(
    dv: Tensor, addends: Addends, at_other: bool = True
) -> tuple[Tensor | None, ...]:
    """Gradients of ``reference.residual``."""
    dy, dcoef, dother, *rest = derivatives.residual_gradients(dv, addends)
    assert dy is not None and dother is not None
    return channels_last(dy), dcoef, channels_last(dother) if at_other else None, *rest


def gather(source: Source, out: Tensor, first: int) -> None:
    """PyTorch's pooling, resizing and copying."""
    out[:, first : first + source.raw.shape[1]] = derivatives.written([source])


def gather_backward(dv: Tensor, first: int, source: Source) -> SourceGradient:
    """Gradients of PyTorch's pooling, resizing and copying, and of the affine in front."""
    raw, coef, act, view, _ = source

    def shown(raw: Tensor, coef: Tensor | None) -> Tensor:
        return derivatives.written([Source(raw, coef, act, view)])

    draw, dcoef = derivatives.pull(shown, (raw, coef), dv[:, first : first + raw.shape[1]])
    assert draw is not None
    # in memory of its own also where the gradient is a view
    return channels_last(draw).clone() if draw._is_view() else channels_last(draw), dcoef


def workspace(like: Tensor, shape: Sequence[int]) -> Tensor:
    """A map that is read once and dropped before anything else is written: fresh memory."""
    return raw_like(like, shape)


def covers_block(kind: Kind) -> bool:
    """No: autograd of the definition is the shorter way."""
    return False


def block_coefficients(
    kind: Kind, momentum: float, tensors: TailTensors, device: torch.device
) -> Tensor:
    """``reference.of_block``."""
    return reference.of_block(kind, TailTensors(*tensors), device, momentum)


def block_coefficients_backward(
    kind: Kind, tensors: TailTensors, dcoef: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of ``reference.of_block`` at the ``wanted`` of its tensors."""
    still = tensors[2:] if kind.update else None  # the running statistics have moved
    given = tensors if still is None else (None, None, *still)

    def defined(*given: Tensor | None) -> Tensor:
        return reference.of_block(kind, TailTensors(*given), dcoef.device)

    found = derivatives.pull(defined, given, dcoef)
    return [t if want else None for t, want in zip(found, wanted, strict=True)]
