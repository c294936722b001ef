"""What a convolution's kernels read and write beside weights, for those that see maps nobody has written."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .views import View


class Gradient(NamedTuple):
    """The gradient at a raw output y, e = scale * dy, or with ``y`` from the gradients of y's moments too:

        e = dy + du/dy * (dmean + 2 * (u - mean) * dvar) / |S|,    u = act(y + shift; slope)

    Attributes:
        dy: [N, Co, *T], channels-last.
        y: the raw output; None: there are no moments.
        stats, dstats: [2, N, Co], the moments of u and their gradients.
        pre: [2, Co], shift and slope; None: u = y.
        pre_act: activation in u.
        scale: [N, Co], without ``y`` only; None: 1.
    """

    dy: Tensor
    y: Tensor | None = None
    stats: Tensor | None = None
    dstats: Tensor | None = None
    pre: Tensor | None = None
    pre_act: str = "none"
    scale: Tensor | None = None


class Output(NamedTuple):
    """Where the gradient at one source of a convolution goes.

    Attributes:
        channels: of the source.
        raw: its raw map, read where there are ``coef`` or ``window``.
        coef: [7, N, C], what is pending on it; None: nothing.
        act: its activation.
        window: the source is a maximum over windows that do not overlap; the gradient is the one at ``raw``.
        into: a gradient to add to, in its memory.
        wanted: whether anything is.
    """

    channels: int
    raw: Tensor | None = None
    coef: Tensor | None = None
    act: str = "none"
    window: View | None = None
    into: Tensor | None = None
    wanted: bool = True
