"""Convolutions of the fused route on the CUDA kernels: joined, pooled and resized maps; gradients nobody wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfilm.ops import reference
from fastfilm.ops.launchers import fused
from fastfilm.ops.spec import Geometry, Gradient, NormInput, Output, Source, Wanted, views
from fastfilm.ops.spec.views import View
from tests.support import emulated
from tests.support.emulated import close, cuda, draw, extension, library

__all__ = ["cuda", "extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Part:
    """A source: its channels, the size of its map, how it is seen and the activation pending on it."""

    channels: int
    size: tuple[int, ...]
    view: str | None = None
    act: str | None = "silu"

    def seen(self, size: tuple[int, ...]) -> View | None:
        if self.view is None:
            return None
        if self.view in ("max", "avg"):
            dims = len(self.size)
            return views.pooling(self.view, self.size, (2,) * dims, (2,) * dims, (0,) * dims)
        return views.resizing(self.view, self.size, size, None, self.view.endswith("linear"))


@dataclass(frozen=True)
class Call:
    """A convolution of sources: the size it sees, its output channels, and the rest of its form."""

    size: tuple[int, ...]
    parts: tuple[Part, ...]
    channels: int
    dtype: torch.dtype = BRAIN
    kernel: int = 3
    stride: int = 1
    act: str = "prelu"


# with an affine on a pooled 16-bit map rounding decides which of two voxels is the larger one
SOURCES = {
    "2d": Call((6, 9), (Part(16, (13, 19), "max", None), Part(5, (6, 9))), 24),
    "2d_resized": Call((7, 18), (Part(8, (7, 18)), Part(12, (4, 9), "bilinear")), 72, HALF),
    "2d_nothing_pending": Call(
        (6, 8), (Part(8, (3, 4), "nearest", None), Part(8, (6, 8), None, None)), 8
    ),
    "2d_average_stride_2": Call((6, 7), (Part(9, (12, 14), "avg"),), 8, SINGLE, stride=2),
    "2d_float32": Call(
        (5, 18), (Part(4, (10, 37), "max"), Part(20, (3, 9), "bilinear")), 9, SINGLE
    ),
    "3d": Call(
        (3, 5, 6), (Part(8, (6, 11, 12), "max", None), Part(8, (2, 3, 3), "trilinear")), 16, HALF
    ),
    "2d_several_tiles": Call((17, 18), (Part(24, (17, 18)), Part(16, (9, 9), "bilinear")), 40),
    "2d_pooled": Call((6, 18), (Part(13, (13, 36), "max", None),), 12, HALF),
    "2d_kernel_1": Call((9, 17), (Part(24, (9, 17)),), 1, kernel=1),
    "3d_kernel_1": Call((3, 4, 6), (Part(40, (3, 4, 6), None, "gelu"),), 20, HALF, 1),
}


@dataclass
class Other:
    """The gradient that other consumers of a map gave, in the place of a ``forks.Ledger``."""

    gradient: Tensor
    added: bool | None = None

    def rest(self) -> Tensor:
        return self.gradient.clone()

    def came(self, added: bool) -> None:
        self.added = added


def check_sources(cuda: Any, call: Call) -> None:
    """Forward and all gradients against float64, with gradients of other consumers to add to."""
    n, dims = 2, len(call.size)
    raws = [
        draw(n, p.channels, *p.size, seed=i, dtype=call.dtype) for i, p in enumerate(call.parts)
    ]
    coefs = [
        None if p.act is None else draw(7, n, p.channels, seed=10 + i)
        for i, p in enumerate(call.parts)
    ]
    for coef in coefs:
        if coef is not None:
            coef[3] += 3  # padding that is not zero behind the affine shows
    seen = [p.seen(call.size) for p in call.parts]
    acts = [p.act or "none" for p in call.parts]
    channels = sum(p.channels for p in call.parts)
    weight = draw(call.channels, channels, *[call.kernel] * dims, seed=20)
    weight = (weight / (channels * call.kernel**dims) ** 0.5).to(call.dtype)
    geometry = ((call.stride,) * dims, (call.kernel // 2,) * dims)
    walk = Geometry.ordinary(*geometry)
    pre = draw(2, call.channels, seed=21).abs()
    others = [
        None if view is not None else Other(draw(*raw.shape, seed=40 + i, dtype=call.dtype))
        for i, (raw, view) in enumerate(zip(raws, seen, strict=True))
    ]
    sources = [Source(*parts) for parts in zip(raws, coefs, acts, seen, others, strict=True)]

    leaves = [t.double().requires_grad_() for t in (*raws, *(c for c in coefs if c is not None))]
    wide, found = weight.double().requires_grad_(), iter(leaves[len(raws) :])
    wide_pre = pre.double().requires_grad_()
    wide_coefs = [None if c is None else next(found) for c in coefs]
    shown = []
    for x, c, act, view in zip(leaves, wide_coefs, acts, seen, strict=False):
        v = x if c is None else reference.materialise(x, c, act)
        shown.append(views.seen(v, view))
    convolve = F.conv2d if dims == 2 else F.conv3d
    exact = convolve(torch.cat(shown, 1), wide, None, *geometry)
    exact_stats = reference.moments(exact, wide_pre, call.act)

    y, stats = fused.forward(cuda, sources, weight, None, NormInput(pre, call.act), walk)
    close(y, exact.detach(), call.dtype)
    close(stats, exact_stats.detach(), call.dtype)

    dy = draw(*y.shape, seed=30, dtype=call.dtype)
    dstats = draw(*stats.shape, seed=31) * y[0, 0].numel()
    # y itself is rounded: its gradient is that of the moments of the rounded map
    rounded = y.double().requires_grad_()
    moments = reference.moments(rounded, wide_pre, call.act)
    e, dpre = torch.autograd.grad(moments, (rounded, wide_pre), dstats.double())
    e = e + dy.double()
    dpre = torch.stack([e.sum((0, *range(2, e.dim()))), dpre[1]])
    exact_grads = torch.autograd.grad(exact, (*leaves, wide), e)

    gradient = Gradient(dy, y, stats, dstats, pre, call.act)
    wanted = Wanted([True] * len(sources), True, True)
    grads, dweight, summed = fused.backward(cuda, gradient, sources, weight, walk, wanted)
    close(dweight, exact_grads[-1], call.dtype)
    close(summed, dpre, call.dtype)
    at = len(raws)
    for i, ((dx, dcoef), other) in enumerate(zip(grads, others, strict=True)):
        added = 0 if other is None else other.gradient.double()
        assert other is None or other.added
        close(dx, exact_grads[i] + added, call.dtype)
        if coefs[i] is not None:
            close(dcoef, exact_grads[at], call.dtype)
            at += 1


@pytest.mark.parametrize("call", SOURCES)
def test_sources_and_their_gradients_agree_with_float64(cuda: Any, call: str) -> None:
    check_sources(cuda, SOURCES[call])


def test_a_map_with_a_scale_and_no_moments(cuda: Any) -> None:
    x, weight = draw(2, 8, 5, 6, dtype=HALF), draw(3, 8, 3, 3, seed=1, dtype=HALF)
    dv, scale = draw(2, 3, 5, 6, seed=2, dtype=HALF), draw(2, 3, seed=3)
    walk, output = Geometry.ordinary((1, 1), (1, 1)), [Output(8)]
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    e = dv.double() * scale.double()[:, :, None, None]
    dx, dw = torch.autograd.grad(F.conv2d(*leaves, padding=1), leaves, e)
    sources, gradient = [Source(x)], Gradient(dv, scale=scale)
    ((given, _),) = cuda.dgrad(gradient, weight, output, (5, 6), walk)
    dweight, sums = cuda.wgrad(gradient, sources, weight, walk, sums=True)
    close(given, dx, HALF)
    close(dweight, dw, HALF)
    close(sums[0], e.sum((0, 2, 3)), HALF)


def test_an_output_that_nobody_wants_costs_nothing(cuda: Any) -> None:
    x, weight = draw(1, 16, 4, 4), draw(8, 16, 3, 3, seed=1)
    dy, walk = draw(1, 8, 4, 4, seed=2), Geometry.ordinary((1, 1), (1, 1))
    outputs = [Output(8, wanted=False), Output(8)]
    (none, _), (dx, _) = cuda.dgrad(Gradient(dy), weight, outputs, (4, 4), walk)
    assert none is None
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.conv2d(leaf, weight.double(), padding=1), leaf, dy.double())
    close(dx, exact[:, 8:], SINGLE)


def test_bad_sources_are_refused(cuda: Any) -> None:
    x, weight = draw(1, 8, 4, 4), draw(8, 8, 3, 3, seed=1)
    dy, walk = draw(1, 8, 4, 4, seed=2), Geometry.ordinary((1, 1), (1, 1))
    half = views.pooling("max", (4, 4), (2, 2), (2, 2), (0, 0))
    assert not cuda.covers_sources([Source(x, view=half)])
    two = draw(8, 16, 3, 3, seed=1)
    with pytest.raises(ValueError, match="same batch and size"):
        cuda.fprop([Source(x), Source(draw(1, 8, 2, 2))], two, None, walk)
    with pytest.raises(ValueError, match="y needs stats and dstats"):
        cuda.dgrad(Gradient(dy, dy), weight, [Output(8)], (4, 4), walk)
    with pytest.raises(ValueError, match="into must be"):
        cuda.dgrad(Gradient(dy), weight, [Output(8, into=draw(1, 8, 2, 2))], (4, 4), walk)
    assert not cuda.covers_sources([Source(x)] * 3)
    odd = draw(1, 3, 4, 4)
    assert not cuda.covers_sources([Source(odd), Source(x)])
