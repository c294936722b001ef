"""The floor of a layer: its arithmetic or its compulsory traffic at the measured ceilings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastfilm.tuning import cost
from fastfilm.tuning.cost import Ceilings, Convolution

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""Storage of each precision that can be asked for; tf32 is float32 with tf32 products allowed."""


def ulp(dtype: str) -> float:
    """Distance from 1 to the next number of a precision."""
    return 2.0**-10 if dtype == "tf32" else torch.finfo(DTYPES[dtype]).eps


def yardstick(device: str, dtype: str) -> str:
    """The precision that errors are measured against.

    float64, and on a GPU float32 (IEEE) for 16-bit types: PyTorch's float64 convolutions take seconds there, and
    float32's own error is some ten thousandths of theirs.
    """
    return "float32" if device == "cuda" and dtype in ("bfloat16", "float16") else "float64"


def check_is_small(device: str, dtype: str) -> bool:
    """Whether a network's results are compared on a smaller batch than its time is taken on.

    Where the yardstick is float64 on a GPU: a training step of 6 TFLOP on maps of 128³ might take a minute and
    tens of GiB there.
    """
    return device == "cuda" and yardstick(device, dtype) == "float64"


@dataclass(frozen=True)
class Layer:
    """A convolution of a network.

    Attributes:
        cin, cout: channels.
        size: spatial size of the input.
        kernel, stride: the same in every dimension; padding is (kernel - 1) / 2.
        transposed: a transposed convolution whose kernel is its stride, without padding.
        input_grad: whether a training step needs the gradient of the input.
    """

    cin: int
    cout: int
    size: tuple[int, ...]
    kernel: int = 3
    stride: int = 1
    transposed: bool = False
    input_grad: bool = True

    @property
    def output(self) -> tuple[int, ...]:
        """Spatial size of the output."""
        if self.transposed:
            return tuple(s * self.stride for s in self.size)
        return tuple((s - 1) // self.stride + 1 for s in self.size)

    @property
    def label(self) -> str:
        """``64→128 3³/2 @ 32×32×32`` and the like."""
        size = "×".join(map(str, self.size))
        kernel = f"{self.kernel}{'²³'[len(self.size) - 2]}"
        stride = f"/{self.stride}" if self.stride > 1 else ""
        arrow = "⇑" if self.transposed else "→"
        return f"{self.cin}{arrow}{self.cout} {kernel}{stride} @ {size}"


def convolution(layer: Layer, batch: int, dtype: str, moments: bool = True) -> Convolution:
    """The layer as the cost model takes it; ``moments``: a norm of its own statistics stands behind it."""
    dims = len(layer.size)
    return Convolution(
        batch=batch,
        cin=layer.cin,
        cout=layer.cout,
        kernel=(layer.kernel,) * dims,
        stride=(layer.stride,) * dims,
        size=layer.size,
        output=layer.output,
        itemsize=torch.finfo(DTYPES[dtype]).bits // 8,
        transposed=layer.transposed,
        affine=layer.input_grad,  # nothing is pending on the image
        moments=moments,
        input_grad=layer.input_grad,
    )


@dataclass(frozen=True)
class Work:
    """What a case must at least do."""

    flops: int
    bytes: int
    floor_s: float


def work(layers: Iterable[Layer], batch: int, dtype: str, mode: str, ceilings: Ceilings) -> Work:
    """Sum over the layers of max(bytes / bandwidth, flops / rate), times the passes of ``mode``."""
    total_flops, total_bytes, floor = 0, 0, 0.0
    for layer in layers:
        c = convolution(layer, batch, dtype)
        n = len(c.passes(mode))
        total_flops += n * c.flops
        total_bytes += n * c.moved
        floor += cost.floor(c, mode, dtype, ceilings)
    return Work(total_flops, total_bytes, floor)
