"""Operands of a convolution beside its weight: the maps that it reads, and gradients at its result and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .forks import Ledger
from .views import View


class Source(NamedTuple):
    """One channel range of a convolution's input: a raw map, what is pending on it and how it is seen.

    Attributes:
        raw: y [N, C, *S].
        coef: [7, N, C], what is pending on it; None: nothing.
        act: its activation.
        view: a pooled or resized view; None: the map itself.
        ledger: what is known of the gradients of the map's other consumers, where it has some.
    """

    raw: Tensor
    coef: Tensor | None = None
    act: str = "none"
    view: View | None = None
    ledger: Ledger | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of what the consumer sees."""
        return tuple(self.raw.shape[2:]) if self.view is None else self.view.size

    @property
    def plain(self) -> bool:
        """Whether the consumer sees the raw map itself."""
        return self.coef is None and self.view is None


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
        raw: its raw map, read where there is a ``coef``.
        coef: [7, N, C], what is pending on it; None: nothing.
        act: its activation.
        into: a gradient to add to, in its memory.
        wanted: whether anything is.
    """

    channels: int
    raw: Tensor | None = None
    coef: Tensor | None = None
    act: str = "none"
    into: Tensor | None = None
    wanted: bool = True


class Addends(NamedTuple):
    """Two maps behind their affines and the activation of their sum, as ``reference.residual`` takes them.

        v = outer(M(y; coef, act) + M(other; other_coef, "none"); slope),     M: ``reference.materialise``

    Attributes:
        y, other: raw maps [N, C, *S] of one dtype.
        coef, other_coef: [7, N, C] each; None: nothing is pending.
        act, outer: activations; kernels want one of them to be "none".
        slope: [C], of ``outer``; None: 0.
    """

    y: Tensor
    coef: Tensor | None
    act: str
    other: Tensor
    other_coef: Tensor | None
    slope: Tensor | None
    outer: str


class Wanted(NamedTuple):
    """Which gradients of a convolution are wanted.

    Attributes:
        sources: one by one, at the raw map or at its coefficients.
        weight: at the weight.
        sums: Σ e, the gradient at a bias that y has.
    """

    sources: Sequence[bool]
    weight: bool
    sums: bool = False


SourceGradient = tuple[Tensor | None, Tensor | None]
"""The gradients at a source's raw map and at its coefficients; None where not wanted, or nothing is pending."""
