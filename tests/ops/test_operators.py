"""The registered operators themselves: schemas, shape functions, gradients, autocast rules, for many inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

import fastfilm
from fastfilm.ops import choice, spec
from fastfilm.ops.operators import library
from tests.support import plans

AVAILABLE = [b.name for b in choice.BACKENDS.values() if b.unavailable() is None]
PLANS = [str(plan) for plan in plans.plans()]

Arguments = tuple[Any, ...]


class Draw:
    """Random numbers; maps are channels-last unless a layout is asked for."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype

    def numbers(self, *shape: int, grad: bool = True) -> Tensor:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(wide)
        return t.requires_grad_(grad)

    def map(self, *shape: int, grad: bool = True, layout: str = "channels_last") -> Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        if layout == "channels_last":
            t = t.contiguous(memory_format=spec.channels_last_format(t.dim()))
        elif layout == "sliced":
            t = torch.cat([t, t], -1)[..., ::2]
        return t.requires_grad_(grad)


GEOMETRIES: dict[str, tuple[tuple[int, ...], Arguments]] = {
    # weight [Co, Ci, *K]; stride, padding, dilation, transposed, output_padding, groups
    "3x3": ((4, 3, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)),
    "1x1": ((2, 3, 1, 1), ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    "strided": ((4, 3, 3, 3), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)),
    "3d": ((2, 3, 3, 3, 3), ([1] * 3, [1] * 3, [1] * 3, False, [0] * 3, 1)),
    "dilated": ((4, 3, 3, 2), ([1, 2], [1, 0], [1, 2], False, [0, 0], 1)),
    "grouped": ((6, 1, 3, 3), ([1, 1], [1, 1], [1, 1], False, [0, 0], 3)),
    "transposed": ((3, 4, 3, 3), ([2, 2], [1, 1], [1, 1], True, [1, 0], 1)),
}
FUSED = ("3x3", "1x1", "strided", "3d")
LAYOUTS = ("channels_last", "contiguous", "sliced")


def size_of(name: str) -> tuple[int, ...]:
    return (4, 3, 5) if name == "3d" else (5, 4)


def channels_of(weight: tuple[int, ...], geometry: Arguments) -> int:
    return weight[1] * geometry[5] if geometry[3] else weight[0]


def convolutions(plan: str, draw: Draw, grad: bool = True) -> Iterator[Arguments]:
    """x, weight, bias, coef, act, pre, pre_act, geometry and whether moments are wanted."""
    for i, (name, (shape, geometry)) in enumerate(GEOMETRIES.items()):
        if plan.endswith("fused") and name not in FUSED:
            continue
        channels = channels_of(shape, geometry)
        for pending, moments in ((True, True), (False, False)):
            layout = LAYOUTS[(i + moments) % 3]
            x = draw.map(2, 3, *size_of(name), layout=layout, grad=grad)
            weight = draw.numbers(*shape, grad=False).to(draw.dtype).requires_grad_(grad)
            bias = draw.numbers(channels, grad=False).to(draw.dtype) if i % 2 else None
            coef = draw.numbers(7, 2, 3, grad=grad) if pending else None
            act = ("silu", "leaky_relu", "gelu")[i % 3] if pending else "none"
            pre = draw.numbers(2, channels, grad=grad) if moments and i % 3 == 0 else None
            yield x, weight, bias, coef, act, pre, "none" if pre is None else act, geometry, moments


def conv_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for *head, geometry, moments in convolutions(plan, draw):
        yield (*head, *geometry, moments, plan)


def conv_apply_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for x, weight, bias, coef, act, _, _, geometry, _ in convolutions(plan, draw, grad=False):
        channels = channels_of(tuple(weight.shape), geometry)
        out = draw.numbers(7, 2, channels, grad=False)
        yield x, weight, bias, coef, act, out, "relu", *geometry, plan


def conv_backward_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    wanted = [(True, True), (True, False), (False, True)]
    for i, (x, weight, bias, coef, act, pre, pre_act, geometry, moments) in enumerate(
        convolutions(plan, draw)
    ):
        with torch.no_grad():
            y, stats = torch.ops.fastfilm.conv(
                x, weight, bias, coef, act, pre, pre_act, *geometry, moments, plan
            )
        dy = draw.map(*y.shape, layout=LAYOUTS[i % 3])
        dstats = draw.numbers(*stats.shape)
        kept = (y.requires_grad_(), stats) if moments else (None, None)
        head = (dy, dstats, x, weight, coef, act, pre, pre_act, *kept)
        yield (*head, *geometry, plan, *wanted[i % 3])


def maps(draw: Draw) -> Iterator[tuple[Tensor, str]]:
    shapes = ((2, 3, 5, 4), (1, 1, 3, 3), (2, 17, 2, 3), (2, 3, 2, 3, 2))
    for i, (shape, layout) in enumerate(product(shapes, LAYOUTS)):
        yield draw.map(*shape, layout=layout), spec.ACTIVATIONS[i % len(spec.ACTIVATIONS)]


def materialise_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for y, act in maps(draw):
        yield y, draw.numbers(7, *y.shape[:2]), act, plan


def materialise_backward_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for y, act in maps(draw):
        yield draw.map(*y.shape, layout="contiguous"), y, draw.numbers(7, *y.shape[:2]), act, plan


def moments_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for i, (y, act) in enumerate(maps(draw)):
        pre = draw.numbers(2, y.shape[1]) if i % 2 else None
        yield y, pre, "none" if pre is None else act, plan


def moments_backward_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for y, pre, act, _ in moments_inputs(plan, draw):
        with torch.no_grad():
            stats = torch.ops.fastfilm.moments(y, pre, act, plan)
        yield draw.numbers(2, *y.shape[:2]), y, stats, pre, act, plan


def residual_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for i, (y, act) in enumerate(maps(draw)):
        other = draw.map(*y.shape, layout=LAYOUTS[(i + 1) % 3])
        inner, outer = ("none", act) if i % 2 else (act, "none")
        coef = draw.numbers(7, *y.shape[:2]) if i % 3 or inner != "none" else None
        other_coef = draw.numbers(7, *y.shape[:2]) if i % 4 < 2 else None
        slope = draw.numbers(y.shape[1]) if outer in spec.DEFAULT_SLOPE else None
        yield y, coef, inner, other, other_coef, slope, outer, plan


def residual_backward_inputs(plan: str, draw: Draw) -> Iterator[Arguments]:
    for i, (y, *rest, _) in enumerate(residual_inputs(plan, draw)):
        yield draw.map(*y.shape, layout="contiguous"), y, *rest, i % 3 != 1, plan


INPUTS: dict[str, Callable[[str, Draw], Iterator[Arguments]]] = {
    "conv": conv_inputs,
    "conv_backward": conv_backward_inputs,
    "conv_apply": conv_apply_inputs,
    "materialise": materialise_inputs,
    "materialise_backward": materialise_backward_inputs,
    "moments": moments_inputs,
    "moments_backward": moments_backward_inputs,
    "residual": residual_inputs,
    "residual_backward": residual_backward_inputs,
}


def operator(name: str) -> Any:
    return getattr(torch.ops.fastfilm, name).default


def test_every_registered_operator_is_tested_here() -> None:
    assert {f"fastfilm::{name}" for name in INPUTS} == library._LIBRARY._op_defs


CALLS = [(name, plan) for name in INPUTS for plan in PLANS if "conv" in name or "fused" not in plan]


@pytest.mark.parametrize(("name", "plan"), CALLS)
def test_opcheck(name: str, plan: str) -> None:
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # PyTorch before 2.13 traces a convolution's second derivative for one size, not for all
    one_size = name == "conv_backward" and torch.__version__ < TorchVersion("2.13")
    traced = [*utils, f"test_aot_dispatch_{'static' if one_size else 'dynamic'}"]
    for i, args in enumerate(INPUTS[name](plan, Draw())):
        # tracing the gradient is slow: a few of the inputs, of all kinds of layout
        if plan.startswith("triton") and i % 4 != 1:
            continue
        full = name != "conv_apply" and i % 6 == 1
        torch.library.opcheck(
            operator(name), args, test_utils=traced if full else utils, rtol=1e-3, atol=1e-3
        )


def described(t: Any) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride(), t.dtype, t.device.type


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the C++ extension was not built")
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_functions_give_sizes_strides_and_types(name: str, dtype: torch.dtype) -> None:
    plan = "cpu/composed"
    with torch.no_grad():
        for args in INPUTS[name](plan, Draw(dtype)):
            real = operator(name)(*args)
            with FakeTensorMode() as mode:
                given = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
                fake = operator(name)(*given)
            pairs = zip(*((v,) if isinstance(v, Tensor) else v for v in (real, fake)), strict=True)
            for a, b in pairs:
                assert described(a) == described(b), (name, args[0].shape, described(args[0]))


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_rules_cast_maps_and_weights_and_nothing_else(plan: str) -> None:
    draw = Draw()
    *head, geometry, moments = next(iter(convolutions(plan, draw)))
    x, weight, bias = (t.detach() if isinstance(t, Tensor) else t for t in head[:3])
    rest = [t.detach() if isinstance(t, Tensor) else t for t in head[3:]]
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    out = draw.numbers(7, 2, weight.shape[0], grad=False)
    ops, half = torch.ops.fastfilm, torch.bfloat16
    with torch.autocast("cpu", half):
        y, stats = ops.conv(x, weight, bias, *rest, *geometry, moments, plan)
        v = ops.conv_apply(x, weight, bias, rest[0], rest[1], out, "relu", *geometry, plan)
        u, m = ops.materialise(x, rest[0], "relu", plan), ops.moments(x, None, "none", plan)
    assert (y.dtype, stats.dtype, v.dtype) == (half, torch.float32, half)
    assert (u.dtype, m.dtype) == (torch.float32, torch.float32)
    expected, _ = ops.conv(
        x.to(half), weight.to(half), bias.to(half), *rest, *geometry, moments, plan
    )
    assert torch.equal(y, expected)
    if plan.startswith("cpu"):
        wide = [t.double() if isinstance(t, Tensor) else t for t in (x, weight, bias, *rest)]
        with torch.autocast("cpu", half):
            y, stats = ops.conv(*wide, *geometry, moments, plan)
        assert (y.dtype, stats.dtype) == (torch.float64, torch.float64)


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the C++ extension was not built")
@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors_through_a_network_have_the_shapes_and_strides_of_real_ones(
    training: bool,
) -> None:
    """The short ways of eager mode (views, joined maps, fused coefficients) give way to operators."""
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 2, depth=2, base_filters=4, metadata_size=3).train(training)
    x, rows = torch.randn(2, 1, 16, 20, requires_grad=True), torch.eye(3)[:2]
    real = net(x, rows)
    (grad,) = torch.autograd.grad(real.sum(), x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = mode.from_tensor(x)
        fake = net(given, mode.from_tensor(rows))
        (fake_grad,) = torch.autograd.grad(fake.sum(), given)
    assert described(fake) == described(real) and described(fake_grad) == described(grad)
