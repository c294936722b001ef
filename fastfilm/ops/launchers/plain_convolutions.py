"""The convolutions of the composed route that take over where one of Triton's fails or is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec import (
    Geometry,
    Gradient,
    NormInput,
    Output,
    Pending,
    Source,
    SourceGradient,
    Wanted,
    absent,
)
from . import composed, of


def fprop(
    sources: Sequence[Source],
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    norm_input: NormInput | None = None,
    finish: Pending | None = None,
) -> tuple[Tensor, Tensor]:
    """The output [N, Co, *T], finished if that is asked for, and its moments [2, N, Co] (empty without)."""
    kernels, given = of("triton"), (sources, weight, bias)
    if finish is not None:
        v = composed.finished(kernels, *given, finish, geometry)
        return v, absent(v, torch.float32)
    y, stats = composed.forward(kernels, *given, norm_input, geometry)
    return y, absent(y, torch.float32) if stats is None else stats


def dgrad(
    gradient: Gradient,
    weight: Tensor,
    outputs: Sequence[Output],
    size: tuple[int, ...],
    geometry: Geometry,
) -> Sequence[SourceGradient]:
    """Gradients at the raw map of each source and at its coefficients."""
    read = [Source(o.raw, o.coef, o.act) for o in outputs if o.raw is not None]
    wanted = Wanted([o.wanted for o in outputs], False)
    return composed.backward(of("triton"), gradient, read, weight, geometry, wanted)[0]


def wgrad(
    gradient: Gradient,
    sources: Sequence[Source],
    weight: Tensor,
    geometry: Geometry,
    sums: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """dW, like ``weight``, and dpre where the gradient has its moments."""
    wanted = Wanted([False] * len(sources), True)
    return composed.backward(of("triton"), gradient, sources, weight, geometry, wanted)[1:]
