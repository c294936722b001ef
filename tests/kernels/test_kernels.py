"""Triton kernels against float64, by the yardstick, on the interpreter and on a GPU."""

from __future__ import annotations

import ast
import importlib.resources
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastfilm
from fastfilm.ops import reference, spec
from tests.support.case import SLOW, Case
from tests.support.yardstick import assert_as_good_as_eager, relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def compare(case: Case, route: str, dtype: torch.dtype, device: str, draws: int = 8) -> None:
    """Runs a case on Triton, and eager PyTorch beside it on several draws.

    Among hundreds of random calls one meets an unlucky sum of a few numbers: such a call gets more draws of
    what eager's error can be.
    """

    def drawn(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        other = replace(case, seed=seed)
        exact = other.run("reference", None, torch.float64, storage=dtype, device=device)
        return other.run("reference", None, dtype, device=device), exact

    eager = [drawn(seed) for seed in range(case.seed, case.seed + draws)]
    ours = case.run("triton", route, dtype, device=device)
    try:
        assert_as_good_as_eager(ours, eager[0][1], eager, dtype)
    except AssertionError:
        eager += [drawn(case.seed + draws + i) for i in range(5 * draws)]
        assert_as_good_as_eager(ours, eager[0][1], eager, dtype)


ORDERS_NORMS = [(order, norm) for order, norm in itertools.product(spec.ORDERS, spec.NORMS)]


@pytest.mark.parametrize("route", ["fused", "composed"])
@pytest.mark.parametrize(("order", "norm"), ORDERS_NORMS)
def test_every_order_and_norm(order: str, norm: str, route: str, device: str) -> None:
    compare(Case(order=order, norm=norm), route, torch.float32, device)


@pytest.mark.parametrize("activation", spec.ACTIVATIONS)
@pytest.mark.parametrize("order", ["conv-norm-act-film", "conv-act-norm-film"])
def test_every_activation(activation: str, order: str, device: str) -> None:
    compare(Case(activation=activation, order=order, norm="group"), "fused", torch.float32, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(7, 6), (3, 5, 4)], ids=["2d", "3d"])
def test_every_kernel_size_stride_and_dtype(
    size: tuple[int, ...], kernel: int, stride: int, dtype: torch.dtype, device: str
) -> None:
    # interpreted 3D kernels are slow: each type once, each stride once
    once = {(torch.float16, 1), (torch.bfloat16, 2), (torch.float32, 2)}
    if device == "cpu" and len(size) == 3 and (dtype, stride) not in once and not SLOW:
        pytest.skip("interpreted slowly; set FASTFILM_SLOW_TESTS=1 to run it")
    case = Case(size=size, kernel=kernel, stride=stride, norm="group", batch=2)
    compare(case, "fused", dtype, device)


@pytest.mark.parametrize("channels", [(1, 1), (1, 33), (33, 3), (17, 130), (70, 16)], ids=str)
def test_awkward_channel_counts(channels: tuple[int, int], device: str) -> None:
    compare(Case(size=(5, 4), batch=1, channels=channels), "fused", torch.float16, device)


@pytest.mark.parametrize("position", spec.DROPOUT_POSITIONS)
@pytest.mark.parametrize("order", spec.ORDERS)
def test_channel_dropout_in_every_position(order: str, position: str, device: str) -> None:
    case = Case(order=order, norm="instance", dropout_position=position, running=False)
    compare(case, "composed", torch.float32, device)


def test_one_pixel_maps_and_batch_of_one(device: str) -> None:
    for size in ((1, 1), (1, 1, 1), (1, 9)):
        case = Case(size=size, batch=1, norm="group", channels=(3, 4))
        compare(case, "fused", torch.float32, device)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_evaluation_with_running_statistics(norm: str, device: str) -> None:
    case = Case(norm=norm, training=False)
    for route in ("fused", "composed"):
        compare(case, route, torch.float32, device)
        with torch.no_grad():
            finished = _inference(case, route, device)
        exact = _inference(case, None, "cpu")
        assert relative_error(finished, exact) < 1e-6


def _inference(case: Case, route: str | None, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if route is None else torch.float32

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight, gamma, mean = draw(2, 3, 7, 6), draw(5, 3, 3, 3), draw(2, 5), draw(5)
    with fastfilm.backend("reference" if route is None else "triton", route):
        v = fastfilm.conv_norm_film(
            x,
            weight,
            padding=1,
            norm=case.norm,
            running_mean=mean,
            running_var=mean.abs() + 1,
            gamma=gamma,
            beta=gamma + 1,
            activation="relu",
        )
    assert isinstance(v, torch.Tensor)
    return v


def test_padding_is_zero_after_the_affine(device: str) -> None:
    """With a large pending shift, act(b) leaking into the halo would dominate the border."""
    x = torch.randn(1, 4, 6, 6, device=device)
    weight = torch.randn(4, 4, 3, 3, device=device)
    shift = torch.full((1, 4), 100.0, device=device)
    results: dict[tuple[str, str | None], Any] = {}
    for name, route in (("reference", None), ("triton", "fused"), ("triton", "composed")):
        with fastfilm.backend(name, route):
            pending = fastfilm.conv_norm_film(
                x, torch.eye(4, device=device)[:, :, None, None], beta=shift, deferred=True
            )
            results[name, route] = fastfilm.conv_norm_film(pending, weight, padding=1)
    exact = torch.nn.functional.conv2d(x.double() + 100.0, weight.double(), padding=1)
    vendors = relative_error(results.pop(("reference", None)), exact)
    for (_, route), value in results.items():
        # the composed route's convolution is the vendor's
        assert relative_error(value, exact) < 1e-6 + (vendors if route == "composed" else 0.0)


@pytest.mark.parametrize(
    ("size", "padding", "stride"),
    [((3, 4), (0, 1), 1), ((3, 9), (1, 0), 2), ((2, 3, 3), (1, 0, 1), 2)],
    ids=str,
)
def test_padding_of_each_axis_is_its_own(
    size: tuple[int, ...], padding: tuple[int, ...], stride: int, device: str
) -> None:
    from fastfilm.kernels import conv_dgrad, conv_fprop, conv_wgrad

    dims = len(size)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 3, *size, generator=generator)
    weight, coef = (
        torch.randn(4, 3, *[3] * dims, generator=generator),
        torch.randn(7, 1, 3, generator=generator),
    )
    exact = [t.double().requires_grad_() for t in (x, weight, coef)]
    convolution = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d
    v = reference.materialise(exact[0], exact[2], "silu")
    y64 = convolution(v, exact[1], stride=stride, padding=padding)
    e = torch.randn(y64.shape, generator=generator)
    dx64, dw64, dc64 = torch.autograd.grad(y64, exact, e.double())
    x, weight, e = (spec.channels_last(t.to(device)) for t in (x, weight, e))
    tail = (coef.to(device), "silu", (stride,) * dims, padding)
    none = (None, "none", *tail[2:], False)
    y, _ = conv_fprop.fprop(x, weight, None, *tail[:2], *none)
    # a tile that does not hold a whole row of the map
    dx, dcoef = conv_dgrad.dgrad(e, weight, x, *tail, conv_dgrad.CONFIGS_FLOAT32[1])
    dw = conv_wgrad.wgrad(e, x, weight, *tail)
    assert dcoef is not None
    for ours, truth in ((y, y64), (dx, dx64), (dw, dw64), (dcoef, dc64)):
        assert relative_error(ours, truth) < 2e-6


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("size", "padding"),
    [((7, 6), (1, 1)), ((6, 9), (0, 1)), ((5, 4, 7), (1, 0, 1)), ((2, 5, 3), (0, 1, 1))],
    ids=str,
)
def test_a_strided_gradient_is_right_at_voxels_of_every_parity(
    size: tuple[int, ...], padding: tuple[int, ...], kernel: int, device: str
) -> None:
    """A voxel's parity says which taps reach it: with a kernel of 1 and without padding, none at odd ones."""
    from fastfilm.kernels import conv_dgrad

    dims = len(size)
    padding = padding if kernel == 3 and min(size) > 2 else (kernel // 2,) * dims
    generator = torch.Generator().manual_seed(10)
    x = torch.randn(1, 3, *size, generator=generator)
    weight = torch.randn(40, 3, *[kernel] * dims, generator=generator)
    convolution = torch.nn.functional.conv2d if dims == 2 else torch.nn.functional.conv3d
    x64 = x.double().requires_grad_()
    y64 = convolution(x64, weight.double(), stride=2, padding=padding)
    e = torch.randn(y64.shape, generator=generator)
    (exact,) = torch.autograd.grad(y64, x64, e.double())
    given = [spec.channels_last(t.to(device)) for t in (e, weight, x)]
    tail = (None, "none", (2,) * dims, padding)
    # tiles smaller than the map, and more output channels than a block of them has
    dx, _ = conv_dgrad.dgrad(*given, *tail, conv_dgrad.CONFIGS_FLOAT32[1])
    for parity in itertools.product((0, 1), repeat=dims):
        part = (slice(None), slice(None), *(slice(p, None, 2) for p in parity))
        scale = exact.abs().max()
        assert float((dx.cpu()[part].double() - exact[part]).abs().max()) < 2e-6 * scale, parity


def test_several_blocks_of_one_program_are_summed_whole(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on maps of more blocks than there are partial results."""
    from fastfilm.kernels import pointwise, spatial_moments

    monkeypatch.setattr(pointwise, "MAX_SLOTS", 1)
    monkeypatch.setattr(pointwise, "ELEMENTS", 32)
    generator = torch.Generator().manual_seed(5)
    y, dv = torch.randn(2, 2, 3, 5, 7, generator=generator).unbind()
    y = y + torch.arange(7)  # blocks of other means
    coef, dstats = torch.randn(7, 2, 3, generator=generator), torch.randn(2, 2, 3)
    pre = torch.stack([coef[0, 0], coef[1, 0].abs()])
    y64, coef64, pre64 = (t.double().requires_grad_() for t in (y, coef, pre))
    v64 = reference.materialise(y64, coef64, "elu")
    stats64 = reference.moments(y64, pre64, "leaky_relu")
    exact = [*torch.autograd.grad(v64, (y64, coef64), dv.double()), stats64]
    at_y, at_pre = torch.autograd.grad(stats64, (y64, pre64), dstats.double())
    exact += [at_y, at_pre[1]]

    y, dv = (spec.channels_last(t.to(device)) for t in (y, dv))
    coef, pre, dstats = coef.to(device), pre.to(device), dstats.to(device)
    stats = spatial_moments.moments(y, pre, "leaky_relu")
    e, dpre = spatial_moments.moments_backward(None, dstats, y, stats, pre, "leaky_relu")
    assert dpre is not None
    ours = [*pointwise.apply_backward(dv, y, coef, "elu"), stats, e, dpre[1]]
    for value, truth in zip(ours, exact, strict=True):
        assert relative_error(value, truth) < 2e-6


def test_a_sum_of_maps_of_more_blocks_than_partial_results_is_written_whole(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient's programs take several blocks each there; those of the sum take one."""
    from fastfilm.kernels import pointwise, residual_sum

    pointwise.blocks.cache_clear()
    monkeypatch.setattr(pointwise, "MAX_SLOTS", 1)
    monkeypatch.setattr(pointwise, "ELEMENTS", 32)
    generator = torch.Generator().manual_seed(6)
    y, other = torch.randn(2, 2, 3, 5, 7, generator=generator).unbind()
    given = [spec.channels_last(t.to(device)) for t in (y, other)]
    v = residual_sum.residual((given[0], None, "none", given[1], None, None, "relu"))
    pointwise.blocks.cache_clear()
    assert torch.equal(v.cpu(), torch.relu(y + other))


@pytest.mark.parametrize("order", spec.ORDERS)
def test_mean_a_thousand_times_the_deviation(order: str, device: str) -> None:
    """Moments, values and gradients keep their digits where E[x²] - E[x]² would have none."""

    def run(name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 40, 30, generator=generator) + 1000.0
        weight = torch.eye(3)[:, :, None, None]
        gamma = torch.randn(2, 3, generator=generator)
        leaves = [
            t.detach().to(device, dtype).requires_grad_() for t in (x, weight, gamma, gamma + 2)
        ]
        with fastfilm.backend(name, "fused" if name == "triton" else None):
            v = fastfilm.conv_norm_film(
                leaves[0],
                leaves[1],
                norm="batch",
                training=True,
                activation="gelu",
                order=order,
                gamma=leaves[2],
                beta=leaves[3],
            )
        assert isinstance(v, torch.Tensor)
        wave = torch.randn(v.shape, generator=generator).to(device, dtype)
        grads = torch.autograd.grad((v * wave).sum(), leaves)
        return dict(zip(("v", "x", "weight", "gamma", "beta"), (v, *grads), strict=True))

    eager = [
        (run("reference", torch.float32, seed), run("reference", torch.float64, seed))
        for seed in range(8)
    ]
    assert_as_good_as_eager(run("triton", torch.float32), eager[0][1], eager, torch.float32)


def test_moments_keep_their_digits_where_the_first_block_is_unlike_the_rest(device: str) -> None:
    from fastfilm.kernels import spatial_moments

    y = torch.randn(2, 3, 70, 60, generator=torch.Generator().manual_seed(0)) + 1000.0
    y[0, :, :2] = 0.0  # as the border of an image
    y = y.contiguous(memory_format=torch.channels_last)
    exact = torch.stack([y.double().mean((2, 3)), y.double().var((2, 3), unbiased=False)])
    found = spatial_moments.moments(y.to(device), None, "none").cpu().double()
    assert float((found[0] - exact[0]).abs().max()) <= 1000 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(found[1], exact[1], rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("gamma", [0.0, -1.5, "per sample"])
def test_gamma_zero_negative_and_different_per_sample(gamma: float | str, device: str) -> None:

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(2, 3, 6, 6, generator=generator)
        weight = torch.randn(4, 3, 3, 3, generator=generator)
        random = torch.randn(2, 4, generator=generator)
        return x, weight, random if isinstance(gamma, str) else torch.full((2, 4), gamma)

    def run(name: str, dtype: torch.dtype, seed: int = 1) -> dict[str, torch.Tensor]:
        x, weight, g = draw(seed)
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in (x, weight, g)]
        with fastfilm.backend(name):
            v = fastfilm.conv_norm_film(
                leaves[0], leaves[1], padding=1, norm="instance", gamma=leaves[2], activation="relu"
            )
        assert isinstance(v, torch.Tensor)
        grads = torch.autograd.grad(v.square().sum(), leaves, materialize_grads=True)
        return dict(zip(("v", "x", "weight", "gamma"), (v, *grads), strict=True))

    eager = [
        (run("reference", torch.float32, seed), run("reference", torch.float64, seed))
        for seed in range(1, 9)
    ]
    ours = run("triton", torch.float32)
    assert_as_good_as_eager(ours, eager[0][1], eager, torch.float32)
    if isinstance(gamma, str):
        x, weight, g = draw(1)
        for n in range(2):
            with fastfilm.backend("triton"):
                alone = fastfilm.conv_norm_film(
                    x[n : n + 1].to(device),
                    weight.to(device),
                    padding=1,
                    norm="instance",
                    gamma=g[n : n + 1].to(device),
                    activation="relu",
                )
            assert isinstance(alone, torch.Tensor)
            assert relative_error(ours["v"][n : n + 1], alone) < 1e-6


@pytest.mark.parametrize("size", [(20, 3), (3, 40)])
def test_moments_of_several_tiles(size: tuple[int, int], device: str) -> None:
    compare(Case(size=size, batch=1, norm="instance"), "fused", torch.float32, device)


@pytest.mark.parametrize("route", ["fused", "composed"])
def test_two_runs_give_the_same_bits(route: str, device: str) -> None:
    case = Case(size=(9, 17), norm="batch")
    first = case.run("triton", route, torch.float32, device=device)
    second = case.run("triton", route, torch.float32, device=device)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_every_shipped_tile_computes_the_same(device: str) -> None:
    """All tiles, not only the one that is picked: a miscompiled one must not ship."""
    from fastfilm.kernels import conv_dgrad, conv_fprop, conv_wgrad

    generator = torch.Generator().manual_seed(2)
    width = 3 if device == "cpu" and not SLOW else 10
    for dtype, fprops, dgrads, wgrads in (
        (torch.float16, conv_fprop.CONFIGS, conv_dgrad.CONFIGS, conv_wgrad.CONFIGS),
        (
            torch.float32,
            conv_fprop.CONFIGS_FLOAT32,
            conv_dgrad.CONFIGS_FLOAT32,
            conv_wgrad.CONFIGS_FLOAT32,
        ),
    ):
        x = torch.randn(1, 35, 9, width, generator=generator)
        weight = torch.randn(34, 35, 3, 3, generator=generator) / 20
        e = torch.randn(1, 34, 9, width, generator=generator)
        coef = torch.randn(7, 1, 35, generator=generator).to(device)
        x, weight, e = (
            t.to(device, dtype).contiguous(memory_format=torch.channels_last)
            for t in (x, weight, e)
        )
        x64 = x.detach().cpu().double().requires_grad_()
        w64 = weight.detach().cpu().double().requires_grad_()
        c64 = coef.detach().cpu().double().requires_grad_()
        v64 = reference.materialise(x64, c64, "relu")
        y64 = torch.nn.functional.conv2d(v64, w64, padding=1)
        dx64, dw64, dc64 = torch.autograd.grad(y64, (x64, w64, c64), e.cpu().double())
        bound = 3 * torch.finfo(dtype).eps
        geometry = ((1, 1), (1, 1))
        for config in fprops:
            y, stats = conv_fprop.fprop(
                x, weight, None, coef, "relu", None, "none", *geometry, True, config
            )
            assert relative_error(y, y64) < bound, config
            assert relative_error(stats, reference.moments(y64)) < bound, config
        for config in dgrads:
            dx, dcoef = conv_dgrad.dgrad(e, weight, x, coef, "relu", *geometry, config)
            assert dcoef is not None
            assert relative_error(dx, dx64) < bound, config
            assert relative_error(dcoef, dc64) < bound, config
        for config in (*wgrads, conv_wgrad.Config(16, 16, 16, 4, 2)):
            dw = conv_wgrad.wgrad(e, x, weight, coef, "relu", *geometry, config)
            assert relative_error(dw, dw64) < bound, config


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    size=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    ),
    channels=st.tuples(st.sampled_from([1, 2, 3, 8, 33]), st.sampled_from([1, 3, 5, 33])),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    batch=st.integers(1, 3),
    norm=st.sampled_from(["none", "group", "layer", "batch"]),
    order=st.sampled_from(spec.ORDERS),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    route=st.sampled_from(["fused", "composed"]),
    seed=st.integers(0, 1000),
)
def test_random_calls(
    size: tuple[int, ...],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    batch: int,
    norm: str,
    order: str,
    flags: tuple[bool, bool, bool, bool],
    route: str,
    seed: int,
    device: str,
) -> None:
    bias, affine, film, pending = flags
    voxels = 1
    for s in size:
        voxels *= (s - 1) // stride + 1
    if norm != "none" and voxels * (batch if norm == "batch" else 1) < 4:
        norm = "none"  # statistics of a few values amplify rounding without bound
    case = Case(
        size=size,
        batch=batch,
        channels=channels,
        kernel=kernel,
        stride=stride,
        norm=norm,
        order=order,
        bias=bias,
        affine=affine,
        film=film,
        pending=pending,
        seed=seed,
    )
    compare(case, route, torch.float32, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "channels", "batch"),
    [((256, 320), (64, 64), 4), ((64, 64, 48), (32, 32), 2), ((15, 17), (512, 512), 8)],
    ids=["2d", "3d", "deep"],
)
def test_large_shapes(
    size: tuple[int, ...], channels: tuple[int, int], batch: int, dtype: torch.dtype
) -> None:
    case = Case(size=size, channels=channels, batch=batch, norm="instance", running=False)
    for route in ("fused", "composed"):
        compare(case, route, dtype, "cuda", draws=1)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    """Offsets are 64-bit: the last voxels of a map of 2^31 elements are right."""
    x = torch.zeros((1, 32, 512, 512, 256), dtype=torch.float16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last_3d)
    x[..., -2:, -2:, -2:] = 1.0
    weight = torch.ones((1, 32, 3, 3, 3), dtype=torch.float16, device="cuda")
    with fastfilm.backend("triton", "fused"):
        y = fastfilm.conv_norm_film(x, weight, padding=1)
    assert isinstance(y, torch.Tensor)
    assert y[0, 0, -1, -1, -1].item() == 32 * 8
    assert y[0, 0, 0, 0, 0].item() == 0
    coef = torch.zeros((7, 1, 32), device="cuda")
    coef[spec.A], coef[spec.G], coef[spec.S] = 2.0, 3.0, 1.0
    with fastfilm.backend("triton"):
        v = fastfilm.materialise(x, coef)
    assert v[0, :, -1, -1, -1].eq(7.0).all()
    assert v[0, :, 0, 0, 0].eq(1.0).all()


def test_interpreted_loops_read_scalars_in_arrays() -> None:
    """Triton 3.6's interpreter leaves that to NumPy, which refuses from 2.4 on."""
    common = pytest.importorskip("fastfilm.kernels.common")
    if not common.INTERPRETED:
        pytest.skip("kernels are compiled here")
    tl = common.tl
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def scalar(n: int) -> Any:
        return tl.tensor(interpreter.TensorHandle(np.array([n], np.int32), tl.int32), tl.int32)

    assert list(common.loop(scalar(3))) == [0, 1, 2]
    assert list(common.loop(scalar(1), 8, tl.constexpr(3))) == [1, 4, 7]


def test_kernels_take_range_over_constants_alone() -> None:
    """A bound that is known at run time takes ``loop``."""
    folder = importlib.resources.files("fastfilm.kernels")
    seen = 0
    for file in (f for f in folder.iterdir() if f.name.endswith(".py")):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or not any(
                ast.unparse(d).startswith("triton.jit") for d in function.decorator_list
            ):
                continue
            arguments = function.args.args
            constant = {
                a.arg
                for a in arguments
                if a.annotation and "constexpr" in ast.unparse(a.annotation)
            }
            for loop in (n for n in ast.walk(function) if isinstance(n, ast.For)):
                assert isinstance(loop.iter, ast.Call)
                bounds = [n for a in loop.iter.args for n in ast.walk(a) if isinstance(n, ast.Name)]
                seen += 1
                if ast.unparse(loop.iter.func) == "range":
                    assert {n.id for n in bounds} <= constant, f"{file.name}:{loop.lineno}"
    assert seen
