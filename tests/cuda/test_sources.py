"""CUDA convolutions of maps that nobody wrote: pooled, resized, joined; gradients that nobody wrote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastfilm.ops import reference
from fastfilm.ops.spec import Geometry, Gradient, NormInput, Output, Source, views
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

    @property
    def joint(self) -> bool:
        """Whether one kernel computes both gradients."""
        flat = len(self.size) == 2 or self.kernel == 1
        return flat and self.dtype != SINGLE and self.stride == 1 and self.channels <= 64


SOURCES = {
    "2d": Call((6, 9), (Part(16, (13, 19), "max"), Part(5, (6, 9))), 24),
    "2d_resized": Call((7, 18), (Part(8, (7, 18)), Part(12, (4, 9), "bilinear")), 72, HALF),
    "2d_nothing_pending": Call(
        (6, 8), (Part(8, (3, 4), "nearest", None), Part(8, (6, 8), None, None)), 8
    ),
    "2d_average_stride_2": Call((6, 7), (Part(9, (12, 14), "avg"),), 8, SINGLE, stride=2),
    "2d_float32": Call(
        (5, 18), (Part(4, (10, 37), "max"), Part(20, (3, 9), "bilinear")), 9, SINGLE
    ),
    "3d": Call((3, 5, 6), (Part(8, (6, 11, 12), "max"), Part(8, (2, 3, 3), "trilinear")), 16, HALF),
    "2d_joint": Call((17, 18), (Part(24, (17, 18)), Part(16, (9, 9), "bilinear")), 40),
    "2d_joint_pooled": Call((6, 18), (Part(13, (13, 36), "max"),), 12, HALF),
    "2d_joint_kernel_1": Call((9, 17), (Part(24, (9, 17)),), 1, kernel=1),
    "3d_joint_kernel_1": Call((3, 4, 6), (Part(40, (3, 4, 6), None, "gelu"),), 20, HALF, 1),
}


def check_sources(cuda: Any, call: Call, joint: bool) -> None:
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
    sources = [Source(*parts) for parts in zip(raws, coefs, acts, seen, strict=True)]
    assert cuda.covers_sources(sources)

    leaves = [t.double().requires_grad_() for t in (*raws, *(c for c in coefs if c is not None))]
    wide, found = weight.double().requires_grad_(), iter(leaves[len(raws) :])
    wide_pre = pre.double().requires_grad_()
    wide_coefs = [None if c is None else next(found) for c in coefs]
    shown = [
        views.seen(x if c is None else reference.materialise(x, c, act), view)
        for x, c, act, view in zip(leaves, wide_coefs, acts, seen, strict=False)
    ]
    convolve = F.conv2d if dims == 2 else F.conv3d
    exact = convolve(torch.cat(shown, 1), wide, None, *geometry)
    exact_stats = reference.moments(exact, wide_pre, call.act)

    y, stats = cuda.fprop(sources, weight, None, walk, NormInput(pre, call.act))
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
    others: list[Tensor | None] = []
    outputs = []
    for i, (raw, coef, act, view, _) in enumerate(sources):
        leads = view is None or view.kind == "max"
        other = draw(*raw.shape, seed=40 + i, dtype=call.dtype) if leads else None
        others.append(other)
        outputs.append(
            Output(raw.shape[1], raw, coef, act, view, None if other is None else other.clone())
            if leads
            else Output(raw.shape[1])
        )
    assert cuda.covers_joint(dy, weight, call.size, walk) == call.joint
    if joint:
        grads, dweight, summed = cuda.joint(gradient, weight, outputs, sources, walk, sums=True)
    else:
        grads = cuda.dgrad(gradient, weight, outputs, call.size, walk)
        dweight, summed = cuda.wgrad(gradient, sources, weight, walk, sums=True)
    close(dweight, exact_grads[-1], call.dtype)
    close(summed, dpre, call.dtype)
    (shown_grads,) = (
        torch.autograd.grad(convolve(torch.cat(shown, 1), wide, None, *geometry), shown, e),
    )
    at = len(raws)
    for i, ((dx, dcoef), other) in enumerate(zip(grads, others, strict=True)):
        if other is None:
            close(dx, shown_grads[i], call.dtype)
            assert dcoef is None
        else:
            close(dx, exact_grads[i] + other.double(), call.dtype)
            if coefs[i] is not None:
                close(dcoef, exact_grads[at], call.dtype)
        at += coefs[i] is not None


@pytest.mark.parametrize("call", SOURCES)
def test_sources_and_their_gradients_agree_with_float64(cuda: Any, call: str) -> None:
    check_sources(cuda, SOURCES[call], joint=False)


@pytest.mark.parametrize("call", [name for name, call in SOURCES.items() if call.joint])
def test_one_kernel_computes_both_gradients(cuda: Any, call: str) -> None:
    check_sources(cuda, SOURCES[call], joint=True)


def test_a_map_with_a_scale_and_no_moments(cuda: Any) -> None:
    x, weight = draw(2, 8, 5, 6, dtype=HALF), draw(3, 8, 3, 3, seed=1, dtype=HALF)
    dv, scale = draw(2, 3, 5, 6, seed=2, dtype=HALF), draw(2, 3, seed=3)
    walk, output = Geometry.ordinary((1, 1), (1, 1)), [Output(8)]
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    e = dv.double() * scale.double()[:, :, None, None]
    dx, dw = torch.autograd.grad(F.conv2d(*leaves, padding=1), leaves, e)
    sources, gradient = [Source(x)], Gradient(dv, scale=scale)
    for grads, dweight, sums in (
        cuda.joint(gradient, weight, output, sources, walk, sums=True),
        (
            cuda.dgrad(gradient, weight, output, (5, 6), walk),
            *cuda.wgrad(gradient, sources, weight, walk, sums=True),
        ),
    ):
        close(grads[0][0], dx, HALF)
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
    two = draw(8, 16, 3, 3, seed=1)
    with pytest.raises(ValueError, match="same batch and size"):
        cuda.fprop([Source(x), Source(x, view=half)], two, None, walk)
    with pytest.raises(ValueError, match="y needs stats and dstats"):
        cuda.dgrad(Gradient(dy, dy), weight, [Output(8)], (4, 4), walk)
    lapping = views.pooling("max", (8, 8), (3, 3), (2, 2), (1, 1))
    with pytest.raises(ValueError, match="must not overlap"):
        wide = Output(8, draw(1, 8, 8, 8), None, "none", lapping)
        cuda.dgrad(Gradient(dy), weight, [wide], (4, 4), walk)
    with pytest.raises(ValueError, match="into must be"):
        cuda.dgrad(Gradient(dy), weight, [Output(8, into=draw(1, 8, 2, 2))], (4, 4), walk)
    assert not cuda.covers_sources([Source(x)] * 3)
    odd = draw(1, 3, 4, 4)
    assert not cuda.covers_sources([Source(odd), Source(x)])
