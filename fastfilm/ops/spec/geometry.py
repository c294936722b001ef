"""The small structs that describe one call of an operator: geometry of a convolution, pending affine, plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .layout import conv_output_size


class Geometry(NamedTuple):
    """How a convolution walks over its map: the arguments of ``torch.convolution`` behind the bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @classmethod
    def ordinary(cls, stride: tuple[int, ...], padding: tuple[int, ...]) -> Geometry:
        """Neither dilated, transposed nor in groups."""
        dims = len(stride)
        return cls(stride, padding, (1,) * dims, False, (0,) * dims, 1)

    @classmethod
    def of(cls, values: Sequence[Any]) -> Geometry:
        """The geometry in an operator's arguments, where sizes are lists."""
        stride, padding, dilation, transposed, output_padding, groups = values
        lists = tuple(stride), tuple(padding), tuple(dilation)
        return cls(*lists, transposed, tuple(output_padding), groups)

    def output_size(self, size: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Spatial size of the result for a map of ``size``."""
        return conv_output_size(size, kernel, *self[:5])

    def output_shape(self, x: Tensor, weight: Tensor) -> list[int]:
        """Shape [N, Co, *T] of the result for ``x`` [N, Ci, *S]."""
        channels = weight.shape[1] * self.groups if self.transposed else weight.shape[0]
        return [x.shape[0], channels, *self.output_size(x.shape[2:], weight.shape[2:])]


GEOMETRY = (
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
)
"""``Geometry`` in an operator's schema."""


class Pending(NamedTuple):
    """The pending affine of a raw map: coefficients [7, N, C] (None: nothing is pending) and an activation."""

    coef: Tensor | None = None
    act: str = "none"


class NormInput(NamedTuple):
    """The input of a norm, act(y + shift; slope) of a raw map y: ``pre`` [2, C] has both; without it y itself."""

    pre: Tensor | None = None
    act: str = "none"


class Plan(NamedTuple):
    """The backend that serves a call, and the route by which it does: see ``choice``."""

    backend: str
    route: str

    @classmethod
    def of(cls, text: str) -> Plan:
        """From "backend/route", its form in an operator's schema and in tables."""
        backend, route = text.split("/")
        return cls(backend, route)

    def __str__(self) -> str:
        return f"{self.backend}/{self.route}"

    @property
    def adds_bias(self) -> bool:
        """Whether the convolution adds its bias; elsewhere y lacks it, and it is pending behind y.

        A GPU's vendor would add it in a pass of its own, over the rounded map, which our passes read anyway.
        """
        return self.route != "composed" or self.backend == "cpu"
