"""The shapes to tune: the convolutions that a network calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfilm.ops import choice
from fastfilm.ops.block import recipe
from fastfilm.ops.choice import Request
from fastfilm.ops.settings import tables
from fastfilm.ops.spec import precision

from . import cost

IMAGE_CHANNELS = 4
"""An input with so few channels is taken for the image: nothing is pending on it, and it has no gradient."""


@dataclass(frozen=True)
class Shape:
    """A convolution with padding (kernel - 1) / 2, the same kernel size and stride in every dimension.

    Attributes:
        channels: of the input and of the output.
        output: spatial size of the output.
    """

    dtype: torch.dtype
    batch: int
    channels: tuple[int, int]
    kernel: int
    stride: int
    output: tuple[int, ...]

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.output)

    @property
    def size(self) -> tuple[int, ...]:
        """Spatial size of the input (of those that give this output the largest)."""
        return tuple(o * self.stride for o in self.output)

    @property
    def padding(self) -> int:
        """In front and behind, in each dimension."""
        return (self.kernel - 1) // 2

    @property
    def affine(self) -> bool:
        """Whether a norm, an activation or FiLM is pending on the input."""
        return self.channels[0] > IMAGE_CHANNELS

    @property
    def products(self) -> str:
        """The type that products are made in, as ceilings name it: float32 may be rounded to "tf32"."""
        if self.dtype == torch.float32 and precision.tf32():
            return "tf32"
        return str(self.dtype).removeprefix("torch.")

    @property
    def arguments(self) -> tuple[object, ...]:
        """The arguments of ``tables.measured``."""
        ones = (1,) * self.dims
        kernel, stride = (tuple(k * o for o in ones) for k in (self.kernel, self.stride))
        return self.dtype, self.batch, self.channels, kernel, stride, self.output

    @property
    def key(self) -> tables.Key:
        """Its bucket."""
        return tables.key(*self.arguments)  # type: ignore[arg-type]

    def convolution(self) -> cost.Convolution:
        """As the cost model takes it."""
        return cost.Convolution(
            self.batch,
            *self.channels,
            kernel=(self.kernel,) * self.dims,
            stride=(self.stride,) * self.dims,
            size=self.size,
            output=self.output,
            itemsize=torch.finfo(self.dtype).bits // 8,
            affine=self.affine,
            input_grad=self.affine,
        )

    def request(self, device: str = "cuda") -> Request:
        """As the dispatcher takes it."""
        ones = (1,) * self.dims
        return Request(
            device=device,
            dtype=self.dtype,
            dims=self.dims,
            kernel=(self.kernel,) * self.dims,
            stride=(self.stride,) * self.dims,
            dilation=ones,
            channels=self.channels,
            output=self.output,
            batch=self.batch,
        )

    def __str__(self) -> str:
        size = "x".join(map(str, self.output))
        name = str(self.dtype).removeprefix("torch.")
        ci, co = self.channels
        return f"{name} {self.batch}x{ci}->{co} k{self.kernel} s{self.stride} out {size}"


def of_request(request: Request) -> Shape | None:
    """The shape of a request; None for one that no tile serves."""
    regular = len(set(request.kernel)) == 1 and len(set(request.stride)) == 1
    if not regular or not request.output or request.transposed or request.groups != 1:
        return None
    kernel, stride = request.kernel[0], request.stride[0]
    if kernel not in (1, 3) or stride not in (1, 2) or set(request.dilation) != {1}:
        return None
    return Shape(
        request.dtype, request.batch, request.channels, kernel, stride, tuple(request.output)
    )


def of_model(call: Callable[..., object], *inputs: Tensor, **options: Tensor) -> list[Shape]:
    """The different shapes of the convolutions in ``call(*inputs, **options)``, the costliest first.

    It is called once, with gradients as they are set. Convolutions that are not fastfilm's are not seen.
    """
    with recipe.unremembered(), choice.watched() as seen:
        call(*inputs, **options)
    found = dict.fromkeys(s for s in map(of_request, seen) if s is not None)
    return sorted(found, key=lambda s: -s.convolution().flops)
