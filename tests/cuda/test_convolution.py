"""The convolution kernels on the host: forward, gradients at the input and at the weight, against float64."""

from __future__ import annotations

import math
import mmap
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfilm.ops import reference
from fastfilm.ops.spec import Geometry, Gradient, NormInput, Output, Pending, Source
from tests.support import emulated
from tests.support.emulated import TOLERANCE, close, cuda, draw, extension, library

__all__ = ["cuda", "extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Layer:
    """A convolution with everything that the kernels fuse with it."""

    size: tuple[int, ...]
    channels: tuple[int, int]
    kernel: int = 3
    stride: int = 1
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    padding: int | None = None
    act: str = "silu"
    pre_act: str = "prelu"

    @property
    def geometry(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        padding = self.kernel // 2 if self.padding is None else self.padding
        return (self.stride,) * len(self.size), (padding,) * len(self.size)

    @property
    def walk(self) -> Geometry:
        return Geometry.ordinary(*self.geometry)

    def convolve(self, v: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        conv = F.conv2d if len(self.size) == 2 else F.conv3d
        return conv(v, weight, bias, *self.geometry)

    def draw_weight(self) -> Tensor:
        ci, co = self.channels
        w = draw(co, ci, *[self.kernel] * len(self.size), seed=5)
        return (w / (ci * self.kernel ** len(self.size)) ** 0.5).to(self.dtype)


def check_layer(cuda: Any, layer: Layer) -> None:
    """All three kernels, with and without what may be pending on the input."""
    n, (ci, co) = layer.batch, layer.channels
    x, weight = draw(n, ci, *layer.size, dtype=layer.dtype), layer.draw_weight()
    coef, bias, pre = draw(7, n, ci, seed=1), draw(co, seed=2), draw(2, co, seed=3).abs()
    # a large shift: padding that is not zero behind the affine shows
    coef[3] += 4
    wide = [t.double().requires_grad_() for t in (x, weight, coef)]
    xd, wd, cd = wide

    source = Source(x, coef, layer.act)
    seen = NormInput(pre, layer.pre_act)
    y, stats = cuda.fprop([source], weight, bias, layer.walk, seen)
    exact = layer.convolve(reference.materialise(xd, cd, layer.act), wd, bias.double())
    close(y, exact, layer.dtype)
    close(stats, reference.moments(exact.detach(), pre.double(), layer.pre_act), layer.dtype)

    e = draw(*exact.shape, seed=4, dtype=layer.dtype)
    dx, dweight, dcoef = torch.autograd.grad(exact, wide, e.double())
    output = Output(ci, x, coef, layer.act)
    ((ours, ours_coef),) = cuda.dgrad(Gradient(e), weight, [output], layer.size, layer.walk)
    close(ours, dx, layer.dtype)
    close(ours_coef, dcoef, torch.float32)
    close(cuda.wgrad(Gradient(e), [source], weight, layer.walk)[0], dweight, layer.dtype)

    plain = layer.convolve(xd, wd, None)
    y, stats = cuda.fprop([Source(x)], weight, None, layer.walk)
    close(y, plain, layer.dtype)
    assert stats.numel() == 0
    ((ours, none),) = cuda.dgrad(Gradient(e), weight, [Output(ci, x)], layer.size, layer.walk)
    close(ours, torch.autograd.grad(plain, xd, e.double())[0], layer.dtype)
    assert none is None


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

LAYERS = {
    "2d": Layer((18, 37), (16, 40)),
    "2d_more_input_channels_than_a_block": Layer((9, 8), (130, 64), batch=1),
    "2d_stride_2": Layer((9, 10), (40, 24), stride=2),
    "2d_stride_2_a_voxel_beyond_a_tile": Layer((33, 33), (8, 8), stride=2, batch=1),
    "2d_kernel_1": Layer((9, 10), (24, 72), kernel=1, dtype=HALF),
    "2d_kernel_1_stride_2": Layer((9, 8), (8, 8), kernel=1, stride=2),
    "2d_float32": Layer((7, 20), (20, 40), dtype=SINGLE),
    "2d_float32_stride_2": Layer((9, 10), (40, 24), stride=2, dtype=SINGLE),
    "3d": Layer((3, 9, 10), (8, 16), dtype=HALF),
    "3d_more_output_channels_than_a_block": Layer((3, 3, 5), (24, 72), batch=1),
    "3d_stride_2": Layer((5, 9, 10), (16, 40), stride=2),
    "3d_kernel_1_stride_2": Layer((4, 5, 6), (8, 8), kernel=1, stride=2, dtype=HALF),
    "3d_float32": Layer((3, 9, 10), (8, 16), dtype=SINGLE),
    "3d_float32_stride_2": Layer((5, 6, 7), (8, 40), stride=2, dtype=SINGLE, batch=1),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_all_three_kernels_agree_with_float64(cuda: Any, layer: str) -> None:
    check_layer(cuda, LAYERS[layer])


@pytest.mark.parametrize("channels", [(1, 1), (3, 5), (33, 3), (9, 66)], ids=str)
def test_any_channel_count(extension: ModuleType, channels: tuple[int, int]) -> None:
    with emulated.installed(extension) as cuda:
        check_layer(cuda, Layer((5, 6), channels, dtype=HALF, act="gelu", pre_act="relu"))


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_other_paddings(cuda: Any, stride: int, padding: int) -> None:
    check_layer(cuda, Layer((6, 7), (8, 8), stride=stride, padding=padding, dtype=SINGLE))


@pytest.mark.parametrize("dtype", [BRAIN, SINGLE], ids=str)
def test_two_sources_follow_each_other_in_the_channels(cuda: Any, dtype: torch.dtype) -> None:
    layer = Layer((9, 10), (24 + 11, 16), dtype=dtype)
    n, co = layer.batch, layer.channels[1]
    first, second = (
        draw(n, 24, *layer.size, dtype=dtype),
        draw(n, 11, *layer.size, seed=1, dtype=dtype),
    )
    coef, weight = draw(7, n, 24, seed=2), layer.draw_weight()
    for sources in (
        [Source(first, coef, "elu"), Source(second)],
        [Source(first), Source(second, coef[..., :11], "gelu_tanh")],
    ):
        parts = [
            x.double() if c is None else reference.materialise(x.double(), c.double(), act)
            for x, c, act, *_ in sources
        ]
        v = torch.cat(parts, 1)
        y, _ = cuda.fprop(sources, weight, None, layer.walk)
        wide = weight.double().requires_grad_()
        exact = layer.convolve(v, wide, None)
        close(y, exact, dtype)
        e = draw(n, co, *layer.size, seed=3, dtype=dtype)
        (dweight,) = torch.autograd.grad(exact, wide, e.double())
        ours, _ = cuda.wgrad(Gradient(e), sources, weight, layer.walk)
        close(ours, dweight, dtype)
    swapped = [Source(second), Source(first)]
    with pytest.raises(
        ValueError, match="channels of the first of two sources must be a multiple of"
    ):
        cuda.fprop(swapped, weight, None, layer.walk)


def test_the_finished_block(cuda: Any) -> None:
    layer = Layer((7, 9), (8, 24), dtype=HALF)
    x, weight = draw(2, 8, 7, 9, dtype=HALF), layer.draw_weight()
    coef, out, bias = draw(7, 2, 8, seed=1), draw(7, 2, 24, seed=2), draw(24, seed=3)
    read, finish = [Source(x, coef, "relu")], Pending(out, "gelu")
    v, _ = cuda.fprop(read, weight, bias, layer.walk, finish=finish)
    pending = reference.materialise(x.double(), coef.double(), "relu")
    raw = layer.convolve(pending, weight.double(), bias.double())
    close(v, reference.materialise(raw, out.double(), "gelu"), HALF)


@pytest.mark.parametrize(
    "device",
    [(86, 28, 99 * 1024), (90, 132, 227 * 1024)],
    ids=["little_shared_memory", "many_multiprocessors"],
)
def test_layouts_of_other_gpus(
    cuda: Any, monkeypatch: pytest.MonkeyPatch, device: tuple[int, int, int]
) -> None:
    monkeypatch.setattr("fastfilm.ops.launchers.cuda.plans._device", lambda index: device)
    for layer in (
        Layer((18, 20), (40, 48)),
        Layer((9, 20), (40, 48), stride=2, batch=1),
        Layer((2, 8, 9), (16, 32), batch=1),
    ):
        check_layer(cuda, layer)


def test_a_layout_that_does_not_fit_says_so(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fastfilm.ops.launchers.cuda.plans._device", lambda index: (75, 40, 32 * 1024)
    )
    with pytest.raises(RuntimeError, match="no tile fits into 32768 bytes of shared memory"):
        check_layer(cuda, Layer((9, 9), (64, 64)))


@pytest.mark.parametrize(("size", "padding"), [((5, 4), (1, 1)), ((4, 4), (0, 1))])
def test_sizes_that_do_not_fit_are_named(
    cuda: Any, size: tuple[int, int], padding: tuple[int, int]
) -> None:
    """A result larger than map and zeros allow would be read from beyond the map."""
    x, weight = draw(1, 8, 4, 4), draw(8, 8, 3, 3)
    cuda.convolution(x, weight, (4, 4), Geometry.ordinary((1, 1), (1, 1)))
    with pytest.raises(ValueError, match=r"out must be in \[1, "):
        cuda.convolution(x, weight, size, Geometry.ordinary((1, 1), padding))


def test_the_order_of_the_threads_does_not_change_a_bit(extension: ModuleType) -> None:
    layer = Layer((17, 21), (24, 24), dtype=HALF)
    x, e, weight = (
        draw(2, 24, 17, 21, dtype=HALF),
        draw(2, 24, 17, 21, seed=1, dtype=HALF),
        layer.draw_weight(),
    )
    coef, results = draw(7, 2, 24), []
    with emulated.installed(extension) as cuda:
        for seed in (0, 3):
            extension.set_seed(seed)
            read, outputs = [Source(x, coef, "relu")], [Output(24, x, coef, "relu")]
            y, stats = cuda.fprop(read, weight, None, layer.walk, NormInput())
            dw, _ = cuda.wgrad(Gradient(e), read, weight, layer.walk)
            ((dx, dcoef),) = cuda.dgrad(Gradient(e), weight, outputs, layer.size, layer.walk)
            results.append((y, stats, dx, dcoef, dw))
        extension.set_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


TENSOR_FLOAT = {
    "2d": Layer((18, 37), (20, 40), dtype=SINGLE),
    "2d_stride_2": Layer((9, 10), (40, 24), stride=2, dtype=SINGLE),
    "2d_kernel_1": Layer((9, 10), (24, 72), kernel=1, dtype=SINGLE),
    "3d": Layer((3, 9, 10), (8, 33), dtype=SINGLE),
}


def check_rounded(cuda: Any, layer: Layer) -> None:
    """``check_layer`` with float32 products rounded to ten bits behind the point, and no worse."""
    with pytest.MonkeyPatch.context() as patch, emulated.rounding(lambda: True):
        # cut off rather than rounded, it would be half as much again
        patch.setitem(TOLERANCE, SINGLE, 4e-4)
        check_layer(cuda, layer)
        patch.setitem(TOLERANCE, SINGLE, 1e-5)
        with pytest.raises(AssertionError, match="relative error"):
            check_layer(cuda, layer)


@pytest.mark.parametrize("layer", TENSOR_FLOAT)
def test_rounded_products_of_float32(cuda: Any, layer: str) -> None:
    check_rounded(cuda, TENSOR_FLOAT[layer])


def test_weights_of_any_layout(cuda: Any) -> None:
    layer = Layer((6, 7), (8, 16), dtype=SINGLE)
    x, weight = draw(1, 8, 6, 7), layer.draw_weight()
    results = []
    for w in (
        weight.contiguous(),
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        results.append(cuda.fprop([Source(x)], w, None, layer.walk)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A channels-last map of zeros that takes no memory until it is written."""
    n, c, *space = shape
    elements = n * c * math.prod(space)
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).view(n, *space, c).permute(0, 3, 1, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs memory on demand")
def test_elements_beyond_two_to_the_31(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 40, 8192, 8192)
    x, y = _untouched(shape, HALF), _untouched(shape, HALF)
    assert x.numel() > 2**31
    part = draw(1, 40, 20, 40, dtype=HALF)
    x[..., -20:, -40:] = part
    layer = Layer((8192, 8192), (40, 40), dtype=HALF)
    weight, coef = layer.draw_weight(), draw(7, 1, 40, seed=1)
    pending = reference.materialise(part.double(), coef.double(), "relu")
    exact = layer.convolve(pending, weight.double(), None)[..., -16:, -16:]
    with emulated.installed(extension) as cuda:
        # so many multiprocessors that the last block has the last tile, or two
        monkeypatch.setattr(
            "fastfilm.ops.launchers.cuda.plans._device", lambda index: (80, 1 << 17, 227 * 1024)
        )
        conv = cuda.convolution(x, weight, shape[2:], layer.walk)
        monkeypatch.undo()
        work = torch.zeros(conv.forward_workspace(), dtype=torch.uint8)
        source = (x.data_ptr(), coef.data_ptr(), 40, 1)
        strides = (*weight.stride()[:2], 0, *weight.stride()[2:])
        extension.set_block_limit(1000)
        try:
            no_block = (None, [(0,) * 4] * 9, 0.0, 0)
            where = (y.data_ptr(), 0, 0, *no_block, work.data_ptr(), 0)
            conv.forward([source], weight.data_ptr(), strides, 0, 0, 0, 0, 0, *where)
            close(y[..., -16:, -16:], exact, HALF)
            extension.apply(
                x.data_ptr(), coef.data_ptr(), y.data_ptr(), 3, 1, 1, 8192 * 8192, 40, 0
            )
            close(y[..., -1:, -40:], pending[..., -1:, -40:], HALF)
        finally:
            extension.set_block_limit(0)
