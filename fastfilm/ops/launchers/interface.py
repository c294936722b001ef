"""The interface of a backend: the protocol ``Kernels``, with flags for the functions that only some backends have.

Feature maps are [N, C, *S] with two or three spatial dimensions, channels-last, in one of the backend's dtypes;
[N, C]-sized numbers and statistics are float32 (float64 beside a float64 map). A launcher returns memory of its
own, unless it is told to work in place, and never keeps a tensor behind a call. Sums have one writer a slot and a
fixed order: the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..spec import (
    Addends,
    Behind,
    Geometry,
    Gradient,
    Keep,
    Kind,
    NormInput,
    Output,
    Pending,
    Source,
    SourceGradient,
    TailTensors,
)


class Kernels(Protocol):
    """The passes that every backend has. ``eager`` is the one to read first: it is these in plain PyTorch.

    Attributes:
        reads_sources: the fused convolutions (``FusedKernels``) read maps that were never written, and the
            gradient at y by its parts.
        convolves: the composed route's convolution is the backend's choice (``ConvolvingKernels``).
    """

    reads_sources: bool
    convolves: bool

    def apply(self, y: Tensor, coef: Tensor, act: str, in_place: bool = False) -> Tensor:
        """v = g * (act(a * (y - p) + b; slope) - q) + s, channels-last; in y's memory if ``in_place``.

        Args:
            coef: [7, N, C], rows a, b, g, s, p, q, slope.
        """

    def apply_backward(
        self, dv: Tensor, y: Tensor, coef: Tensor, act: str, in_place: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``apply`` at y (in dv's memory if ``in_place``) and at coef [7, N, C]."""

    def moments(self, y: Tensor, pre: Tensor | None, act: str) -> Tensor:
        """Mean and biased variance [2, N, C] over space of u = act(y + shift; slope).

        Args:
            pre: [2, C], shift and slope; None: u = y, whatever ``act`` is.
        """

    def moments_backward(
        self,
        dy: Tensor | None,
        dstats: Tensor,
        y: Tensor,
        stats: Tensor,
        pre: Tensor | None,
        act: str,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of ``moments`` at y, added to ``dy``, and at ``pre``.

        Args:
            dy: the gradient that reached y by other ways; None: there is none.
            dstats: [2, N, C], that at ``stats``, the moments.

        Returns:
            e, like y, and dpre [2, C] (None without ``pre``), whose first row is Σ e: the gradient of the shift,
            and of a bias that y already has.
        """

    def residual(self, addends: Addends) -> Tensor:
        """``reference.residual``: a sum of two maps behind their affines, and its activation."""

    def residual_backward(
        self, dv: Tensor, addends: Addends, at_other: bool = True
    ) -> tuple[Tensor | None, ...]:
        """Gradients of ``residual`` at y, coef, other (None unless ``at_other``), other_coef and slope."""

    def gather(self, source: Source, out: Tensor, first: int) -> None:
        """Writes what a consumer sees of a source into channels ``first`` on of ``out``."""

    def gather_backward(self, dv: Tensor, first: int, source: Source) -> SourceGradient:
        """Gradient at a source from that at channels ``first`` on of what ``gather`` wrote into.

        At the raw map and its coefficients, or at the map behind these and None: ``apply_backward`` follows then.
        """

    def workspace(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """Uninitialised map for what is read once and dropped before anything else is written."""

    def covers_block(self, kind: Kind) -> bool:
        """Whether the two functions below serve a block of this kind; otherwise PyTorch does."""

    def block_coefficients(
        self, kind: Kind, momentum: float, tensors: TailTensors, device: torch.device
    ) -> Tensor:
        """``reference.of_block``, running statistics included, as one call."""

    def block_coefficients_backward(
        self, kind: Kind, tensors: TailTensors, dcoef: Tensor, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of ``block_coefficients`` at the ``wanted`` of its tensors, in their dtypes."""


class ConvolvingKernels(Kernels, Protocol):
    """A backend with convolutions of its own for the composed route."""

    def convolution(
        self,
        v: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        keep: Keep | None = None,
        finish: Pending | None = None,
    ) -> Tensor:
        """The convolution [N, Co, *T] of a written map; with ``finish`` its affine is applied."""

    def convolution_gradients(
        self, e: Tensor, v: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``convolution`` at map and weight, as far as ``needs`` asks for them."""


class FusedKernels(Kernels, Protocol):
    """A backend with the fused route: an affine in front of its convolutions, moments or an affine behind.

    With ``reads_sources`` the gradient may come by its parts (``spec.Gradient``), ``wgrad`` sums it, and there is
    ``gradients``: ``dgrad`` and ``wgrad`` as one call. Where ``covers_behind`` says so, ``fprop`` takes
    ``behind=`` too and writes the block's coefficients, which ``finish`` may be.
    """

    def covers_sources(self, sources: Sequence[Source]) -> bool:
        """Whether the convolutions read such sources as they are: else they are written first."""

    def covers_behind(self, behind: Behind, raw: Tensor) -> bool:
        """Whether ``fprop`` of a map like ``raw`` writes such coefficients; with ``reads_sources`` only."""

    def fprop(
        self,
        sources: Sequence[Source],
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        norm_input: NormInput | None = None,
        finish: Pending | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The output [N, Co, *T], finished if that is asked for, and its moments [2, N, Co] (empty without)."""

    def dgrad(
        self,
        gradient: Gradient,
        weight: Tensor,
        outputs: Sequence[Output],
        size: tuple[int, ...],
        geometry: Geometry,
    ) -> Sequence[SourceGradient]:
        """Gradients at the raw map of each source and at its coefficients; ``size`` is that of what was seen."""

    def wgrad(
        self,
        gradient: Gradient,
        sources: Sequence[Source],
        weight: Tensor,
        geometry: Geometry,
        sums: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """dW, like ``weight``, and with ``sums`` dpre [2, Co]."""

    def gradients(
        self,
        gradient: Gradient,
        weight: Tensor,
        outputs: Sequence[Output],
        sources: Sequence[Source],
        size: tuple[int, ...],
        geometry: Geometry,
        sums: bool = False,
    ) -> tuple[Sequence[SourceGradient], Tensor | None, Tensor | None]:
        """The results of ``dgrad`` for the ``outputs`` and of ``wgrad`` for the ``sources``."""
