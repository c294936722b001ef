"""Convolutions by warpgroup products (sm_90a) on the host."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfilm
from benchmarks.counted import launches
from benchmarks.counted.emulation import serving
from fastfilm.ops import reference, spec
from fastfilm.ops.spec import Behind, Gradient, NormInput, Output, Pending, Source, TailTensors
from tests.cuda import test_backend as backend
from tests.cuda import test_behind as behind
from tests.cuda import test_convolution as convolution
from tests.cuda import test_launches as block_launches
from tests.cuda import test_networks as networks
from tests.cuda import test_sources as sources
from tests.cuda.test_convolution import BRAIN, HALF, SINGLE, Layer, check_layer
from tests.cuda.test_sources import Call, Part, check_sources
from tests.support import emulated
from tests.support.emulated import (
    close,
    cuda,
    draw,
    extension,
    library,
    sm90,
    sm90_device,
    warpgroups,
)
from tests.support.yardstick import assert_as_good_as_eager, relative_error

__all__ = ["cuda", "extension", "library", "sm90"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

FORWARD, BACKWARD, WEIGHT = (frozenset({f"sm90_{k}"}) for k in ("fprop", "dgrad", "wgrad"))

LAYERS = {
    **{name: layer for name, layer in convolution.LAYERS.items() if layer.dtype != SINGLE},
    # beyond a unit, or two, along each axis; the weights of several rows of the output in a product
    "2d_tall": Layer((70, 9), (8, 8), batch=1),
    "2d_wide": Layer((9, 70), (8, 24), batch=1, dtype=HALF),
    "2d_tall_and_wide": Layer((67, 41), (16, 16), batch=1, act="leaky_relu"),
    "2d_tall_few_channels": Layer((130, 9), (3, 8), batch=1),
    "2d_one_row": Layer((1, 40), (16, 32)),
    "2d_one_column": Layer((40, 1), (16, 32), dtype=HALF),
    "2d_one_voxel": Layer((1, 1), (8, 8), batch=3),
    "3d_deep": Layer((7, 5, 6), (8, 16), batch=1),
    "3d_tall_and_wide": Layer((2, 34, 18), (16, 8), batch=1, dtype=HALF),
    "3d_one_plane": Layer((1, 9, 10), (8, 8)),
    "64": Layer((20, 20), (64, 64), dtype=HALF, act="leaky_relu"),
    "128": Layer((9, 8), (128, 128), batch=1),
    "256_to_64": Layer((9, 8), (256, 64), batch=1, dtype=HALF),
    "64_to_256": Layer((9, 8), (64, 256), batch=1),
    "3d_64_to_32": Layer((3, 17, 9), (64, 32), batch=1, act="leaky_relu"),
    "3d_96": Layer((2, 9, 10), (96, 96), batch=1),
    "2d_64_stride_2": Layer((33, 33), (64, 64), stride=2, batch=1, act="leaky_relu"),
    "2d_stride_2_tall_and_wide": Layer((70, 71), (16, 8), stride=2, batch=1, dtype=HALF),
    "3d_stride_2_32": Layer((4, 18, 11), (32, 32), stride=2, batch=1),
    "2d_kernel_1_several_units": Layer((65, 33), (16, 8), kernel=1, act="relu"),
    "2d_kernel_1_200": Layer((9, 10), (200, 96), kernel=1, batch=1),
    "2d_kernel_1_stride_2_large": Layer((67, 35), (33, 66), kernel=1, stride=2, batch=1),
    "3d_kernel_1": Layer((3, 17, 10), (66, 24), kernel=1, batch=1),
    "2d_padding_0": Layer((18, 19), (24, 16), padding=0),
    "2d_padding_2": Layer((18, 19), (24, 16), padding=2, dtype=HALF),
    "2d_stride_2_padding_0": Layer((18, 19), (24, 16), stride=2, padding=0),
    "2d_stride_2_padding_2": Layer((18, 19), (24, 16), stride=2, padding=2),
    "2d_kernel_1_padding_1": Layer((8, 9), (8, 8), kernel=1, padding=1, batch=1),
    "2d_stride_2_one_voxel": Layer((1, 1), (8, 8), stride=2),
    "3d_stride_2_one_plane": Layer((1, 2, 3), (8, 8), stride=2, batch=1),
    "3d_padding_0": Layer((4, 5, 6), (16, 8), padding=0, batch=1),
    "3d_stride_2_padding_2": Layer((4, 5, 6), (16, 8), stride=2, padding=2, batch=1),
}


KERNELS = ("forward", "backward", "weight")


def described(cuda: Any, layer: Layer) -> dict[str, Any]:
    """The layouts of the three kernels."""
    shape = (layer.batch, layer.channels[0], 1)
    x, weight = torch.empty(shape, dtype=layer.dtype), layer.draw_weight()
    out = layer.walk.output_size(layer.size, weight.shape[2:])
    conv = cuda.convolution(x, weight, out, layer.walk, layer.size)
    return {kernel: conv.facts(kernel) for kernel in KERNELS}


@pytest.mark.parametrize("layer", LAYERS)
def test_all_three_kernels_agree_with_float64(sm90: Any, layer: str) -> None:
    check_layer(sm90, LAYERS[layer])


@pytest.mark.parametrize("layer", ["2d", "3d", "2d_stride_2", "64", "3d_64_to_32"])
def test_blocks_of_one_unit_agree_with_float64(extension: ModuleType, layer: str) -> None:
    with emulated.installed(extension) as cuda, warpgroups(extension, multiprocessors=132):
        check_layer(cuda, LAYERS[layer])


FEW = [(1, 1), (1, 3), (5, 1), (3, 5), (33, 3)]
MANY = [(9, 66), (96, 200), (200, 33)]
SIZES = [(5, 6), (2, 5, 3)]


def _check_channels(
    extension: ModuleType, channels: tuple[int, int], size: tuple[int, ...]
) -> None:
    dtype = HALF if len(size) == 2 else BRAIN
    with emulated.installed(extension) as cuda, warpgroups(extension):
        check_layer(cuda, Layer(size, channels, dtype=dtype, act="gelu", pre_act="relu"))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", FEW, ids=str)
def test_any_channel_count(
    extension: ModuleType, channels: tuple[int, int], size: tuple[int, ...]
) -> None:
    _check_channels(extension, channels, size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", MANY, ids=str)
def test_many_channels_that_fill_no_block(
    extension: ModuleType, channels: tuple[int, int], size: tuple[int, ...]
) -> None:
    _check_channels(extension, channels, size)


@pytest.mark.parametrize("act", spec.ACTIVATIONS)
def test_every_activation_and_its_gradient(sm90: Any, act: str) -> None:
    check_layer(sm90, Layer((5, 6), (8, 16), act=act, pre_act=act, dtype=HALF))
    check_sources(sm90, Call((5, 6), (Part(16, (5, 6), act=act),), 8, act=act))


SOURCES = {
    # views are written by other kernels
    **{
        name: call
        for name, call in sources.SOURCES.items()
        if call.dtype != SINGLE and not any(part.view for part in call.parts)
    },
    "2d_two_activations": Call(
        (20, 35), (Part(24, (20, 35), act="elu"), Part(16, (20, 35), act="gelu")), 40
    ),
    "2d_two_activations_in_a_warp": Call(
        (35, 9), (Part(8, (35, 9), act="elu"), Part(8, (35, 9), act="relu")), 16, HALF
    ),
    "2d_pending_on_the_first": Call((7, 9), (Part(24, (7, 9)), Part(8, (7, 9), act=None)), 16),
    "2d_pending_on_the_second": Call(
        (7, 9), (Part(8, (7, 9), act=None), Part(11, (7, 9), act="relu")), 33, HALF
    ),
    "2d_stride_2": Call((17, 18), (Part(24, (17, 18)), Part(5, (17, 18))), 16, stride=2),
    "2d_streamed": Call((9, 10), (Part(128, (9, 10)), Part(64, (9, 10), act="none")), 64, HALF),
    "2d_kernel_1_stride_2": Call((8, 9), (Part(24, (8, 9)),), 40, kernel=1, stride=2),
    "3d_several_units": Call((5, 17, 9), (Part(16, (5, 17, 9)),), 24, HALF, act="gelu"),
    "3d_stride_2": Call((3, 5, 6), (Part(8, (3, 5, 6)), Part(8, (3, 5, 6))), 3, stride=2),
}


@pytest.mark.parametrize("call", SOURCES)
def test_sources_and_their_gradients_agree_with_float64(sm90: Any, call: str) -> None:
    check_sources(sm90, SOURCES[call])


CHECKS: dict[str, tuple[frozenset[str], Callable[[Any], None]]] = {
    "two_sources": (
        FORWARD | WEIGHT,
        lambda cuda: convolution.test_two_sources_follow_each_other_in_the_channels(cuda, BRAIN),
    ),
    "a_finished_block": (FORWARD, convolution.test_the_finished_block),
    "a_scale_and_no_moments": (BACKWARD | WEIGHT, sources.test_a_map_with_a_scale_and_no_moments),
}


@pytest.mark.parametrize("check", CHECKS)
def test_what_the_other_kernels_are_asked_holds_here(
    check: str, cuda: Any, extension: ModuleType
) -> None:
    kernels, call = CHECKS[check]
    with warpgroups(extension, kernels):
        call(cuda)


def test_elements_beyond_two_to_the_31(
    extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = extension.Convolution

    def made(device: tuple[int, int, int], wgmma: str, **given: Any) -> Any:
        return plain(device=(90, *device[1:]), wgmma="always", **given)

    extension.launches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "Convolution", made)
        convolution.test_elements_beyond_two_to_the_31(extension, monkeypatch)
    assert "sm90_fprop" in extension.launches()


@pytest.mark.parametrize("layer", ["2d", "3d", "2d_kernel_1_several_units"])
def test_the_unfinished_output_beside_the_finished_one(
    layer: str, cuda: Any, extension: ModuleType
) -> None:
    given = LAYERS[layer]
    n, (ci, co), dtype = given.batch, given.channels, given.dtype
    x, weight, bias = draw(n, ci, *given.size, dtype=dtype), given.draw_weight(), draw(co, seed=1)
    coef = draw(7, n, co, seed=2)
    with warpgroups(extension, FORWARD):
        v, raw = cuda.fprop(
            [Source(x)], weight, bias, given.walk, finish=Pending(coef, "elu"), raw=True
        )
    exact = given.convolve(x.double(), weight.double(), bias.double())
    close(raw, exact, dtype)
    close(v, reference.materialise(exact, coef.double(), "elu"), dtype)


def test_moments_without_shift_and_slope(cuda: Any, extension: ModuleType) -> None:
    layer = Layer((20, 35), (24, 40))
    x, weight, dy = (
        draw(2, 24, 20, 35, dtype=BRAIN),
        layer.draw_weight(),
        draw(2, 40, 20, 35, seed=1, dtype=BRAIN),
    )
    with warpgroups(extension):
        y, stats = cuda.fprop([Source(x)], weight, None, layer.walk, NormInput())
        dstats = draw(2, 2, 40, seed=2) * 700
        gradient = Gradient(dy, y, stats, dstats)
        ((dx, _),) = cuda.dgrad(gradient, weight, [Output(24)], layer.size, layer.walk)
        dweight, sums = cuda.wgrad(gradient, [Source(x)], weight, layer.walk, sums=True)
    leaves = [x.double().requires_grad_(), weight.double().requires_grad_()]
    exact = layer.convolve(*leaves, None)
    close(stats, reference.moments(exact.detach(), None, "none"), BRAIN)
    rounded = y.double().requires_grad_()
    moments = reference.moments(rounded, None, "none")
    e = torch.autograd.grad(moments, rounded, dstats.double())[0] + dy.double()
    right = torch.autograd.grad(exact, leaves, e)
    for ours, theirs in zip((dx, dweight, sums[0]), (*right, e.sum((0, 2, 3))), strict=True):
        close(ours, theirs, BRAIN)


def test_a_mean_of_a_thousand_sigma_costs_no_digits(cuda: Any, extension: ModuleType) -> None:
    layer = Layer((40, 41), (16, 24), batch=1, dtype=HALF)
    x, weight = draw(1, 16, 40, 41, dtype=HALF), layer.draw_weight()
    bias = torch.full((24,), 1000.0)
    with warpgroups(extension, FORWARD):
        _, stats = cuda.fprop([Source(x)], weight, bias, layer.walk, NormInput())
    exact = reference.moments(layer.convolve(x.double(), weight.double(), bias.double()), None, "")
    assert relative_error(stats[1], exact[1]) < 1e-4


def test_an_output_that_nobody_wants_and_one_that_others_gave_to(
    cuda: Any, extension: ModuleType
) -> None:
    layer = Layer((9, 10), (24 + 11, 16), dtype=HALF)
    x, dy = (draw(2, c, 9, 10, seed=c, dtype=HALF) for c in (35, 16))
    weight, given = layer.draw_weight(), draw(2, 11, 9, 10, seed=3, dtype=HALF)
    leaf = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(layer.convolve(leaf, weight.double(), None), leaf, dy.double())
    for wanted in (False, True):
        into = given.clone()
        outputs = [Output(24, wanted=wanted), Output(11, into=into)]
        with warpgroups(extension, BACKWARD):
            (first, _), (second, _) = cuda.dgrad(
                Gradient(dy), weight, outputs, layer.size, layer.walk
            )
        assert second.data_ptr() == into.data_ptr()
        close(second, exact[:, 24:] + given.double(), HALF)
        if wanted:
            close(first, exact[:, :24], HALF)
        else:
            assert first is None


def _moved(t: Tensor) -> Tensor:
    """The same map one element further on: its chunks no longer lie on 16 bytes."""
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("size", [(9, 18), (2, 5, 6)], ids=str)
def test_misaligned_maps(size: tuple[int, ...], cuda: Any, extension: ModuleType) -> None:
    layer = Layer(size, (16, 24), dtype=HALF)
    x, e = (draw(2, c, *size, seed=c, dtype=HALF) for c in (16, 24))
    weight, coef = layer.draw_weight(), draw(7, 2, 16, seed=1)
    found = []
    with warpgroups(extension):
        for place in (lambda t: t, _moved):
            read, output = Source(place(x), coef, "silu"), Output(16, place(x), coef, "silu")
            into = place(torch.zeros_like(x))
            ((dx, dcoef),) = cuda.dgrad(
                Gradient(place(e)), weight, [output._replace(into=into)], size, layer.walk
            )
            y, _ = cuda.fprop([read], weight, None, layer.walk)
            dw, _ = cuda.wgrad(Gradient(place(e)), [read], weight, layer.walk)
            found.append((y, dx, dcoef, dw))
    for aligned, other in zip(*found, strict=True):
        assert torch.isfinite(aligned).all() and torch.equal(aligned, other)


def test_weights_of_any_layout(cuda: Any, extension: ModuleType) -> None:
    layer = Layer((6, 7), (24, 40), dtype=HALF)
    x, e = (draw(1, c, 6, 7, seed=c, dtype=HALF) for c in (24, 40))
    weight, found = layer.draw_weight(), []
    for w in (
        weight.contiguous(),
        weight.contiguous(memory_format=torch.channels_last),
        weight.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        with warpgroups(extension):
            y, _ = cuda.fprop([Source(x)], w, None, layer.walk)
            ((dx, _),) = cuda.dgrad(Gradient(e), w, [Output(24)], layer.size, layer.walk)
            dw, _ = cuda.wgrad(Gradient(e), [Source(x)], w, layer.walk)
        found.append((y, dx, dw))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


ONE_ORDER = [form for form in behind.FORMS if form[1] == behind.ORDERS[1]]


def _convolved(cuda: Any, form: tuple[str, str, str, bool]) -> tuple[Tensor, TailTensors, Tensor]:
    """The moments, the block's tensors and its coefficients, of several blocks a sample."""
    kind = behind.block(*form)
    tensors = behind.tensors_of(False, BRAIN, running=form[0] != "none")
    x = draw(behind.SAMPLES, 8, *behind.SIZE, dtype=HALF)
    weight = draw(behind.CHANNELS, 8, 3, 3, seed=10, dtype=HALF) / 9
    coef = torch.full((7, behind.SAMPLES, behind.CHANNELS), float("nan"))
    seen = NormInput() if kind.uses_input else None
    written = Behind(kind, 0.3, tensors, coef)
    _, stats = cuda.fprop([Source(x)], weight, None, behind.WALK, seen, behind=written)
    return stats, tensors, coef


@pytest.mark.parametrize("form", ONE_ORDER, ids=lambda form: "-".join(map(str, form)))
def test_coefficients_behind_a_convolution(
    form: tuple[str, str, str, bool], extension: ModuleType
) -> None:
    exact_tensors = TailTensors(
        *(
            None if t is None else t.double()
            for t in behind.tensors_of(False, BRAIN, running=form[0] != "none")
        )
    )
    with emulated.installed(extension) as cuda, warpgroups(extension, FORWARD):
        stats, tensors, coef = _convolved(cuda, form)
    if form[-1]:
        exact_tensors = exact_tensors._replace(stats=stats.double())
    exact = reference.of_block(behind.block(*form, wide=True), exact_tensors, coef.device, 0.3)
    for row, right in zip(coef, exact, strict=True):
        close(row, right, SINGLE)
    for moved, right in zip(tensors[:2], exact_tensors[:2], strict=True):
        if moved is not None and right is not None:
            close(moved, right, BRAIN)


DETERMINED = {
    "2d_several_units": Layer((35, 37), (24, 24), dtype=HALF),
    "2d_streamed": Layer((9, 20), (160, 40)),
    "2d_stride_2": Layer((17, 19), (24, 40), stride=2),
    "3d": Layer((4, 9, 17), (24, 16)),
}


@pytest.mark.parametrize("name", DETERMINED)
def test_the_order_of_blocks_and_threads_does_not_change_a_bit(
    name: str, extension: ModuleType
) -> None:
    layer = DETERMINED[name]
    n, (ci, co), dtype = layer.batch, layer.channels, layer.dtype
    x, weight = draw(n, ci, *layer.size, dtype=dtype), layer.draw_weight()
    coef, pre = draw(7, n, ci, seed=1), draw(2, co, seed=2)
    found = []
    for seed in (0, 3, 7):
        extension.set_seed(seed)
        with emulated.installed(extension) as cuda, warpgroups(extension):
            read, output = [Source(x, coef, "relu")], [Output(ci, x, coef, "relu")]
            y, stats = cuda.fprop(read, weight, None, layer.walk, NormInput(pre, "silu"))
            dy, dstats = draw(*y.shape, seed=3, dtype=dtype), draw(2, n, co, seed=4)
            gradient = Gradient(dy, y, stats, dstats, pre, "silu")
            dw, sums = cuda.wgrad(gradient, read, weight, layer.walk, sums=True)
            ((dx, dcoef),) = cuda.dgrad(gradient, weight, output, layer.size, layer.walk)
            _, tensors, of_block = _convolved(cuda, ("batch", behind.ORDERS[1], "end", True))
        found.append((y, stats, dx, dcoef, dw, sums, of_block, *tensors[:2]))
    extension.set_seed(0)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


PLAIN = ("2d", "2d_stride_2", "2d_kernel_1_200", "256_to_64", "3d_64_to_32", "3d_stride_2")


@pytest.mark.parametrize("name", PLAIN)
def test_a_convolution_is_as_good_as_eager(name: str, extension: ModuleType) -> None:
    layer = LAYERS[name]
    n, (ci, co), dtype = layer.batch, layer.channels, layer.dtype

    def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = draw(n, ci, *layer.size, seed=seed, dtype=dtype), layer.draw_weight()
        out = layer.walk.output_size(layer.size, weight.shape[2:])
        return x, weight, draw(n, co, *out, seed=seed + 9, dtype=dtype)

    def eager(x: Tensor, weight: Tensor, e: Tensor) -> dict[str, Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = layer.convolve(*leaves, None)
        dx, dw = torch.autograd.grad(y, leaves, e)
        return {"y": y.detach(), "dx": dx, "dw": dw}

    def exact(seed: int) -> dict[str, Tensor]:
        return eager(*(t.double() for t in drawn(seed)))

    x, weight, e = drawn(0)
    with emulated.installed(extension) as cuda, warpgroups(extension):
        y, _ = cuda.fprop([Source(x)], weight, None, layer.walk)
        ((dx, _),) = cuda.dgrad(Gradient(e), weight, [Output(ci)], layer.size, layer.walk)
        dw, _ = cuda.wgrad(Gradient(e), [Source(x)], weight, layer.walk)
    theirs = [(eager(*drawn(seed)), exact(seed)) for seed in range(3)]
    assert_as_good_as_eager({"y": y, "dx": dx, "dw": dw}, exact(0), theirs, dtype)


@pytest.mark.parametrize("layer", [Layer((35, 9), (8, 8)), Layer((9, 20), (24, 40))], ids=str)
def test_a_nan_goes_no_further_than_the_rows_of_its_products(
    layer: Layer, cuda: Any, extension: ModuleType
) -> None:
    """Output rows that share a product read each other's voxels, with weights of zero."""
    x, weight = draw(2, layer.channels[0], *layer.size, dtype=BRAIN), layer.draw_weight()
    x[0, 3, 5, 6], x[0, 5, 8, 0] = float("nan"), float("inf")
    with warpgroups(extension, FORWARD):
        y, _ = cuda.fprop([Source(x)], weight, None, layer.walk)
        shared = described(cuda, layer)["forward"]["shifts"] - 1
    exact = ~layer.convolve(x.double(), weight.double(), None).isfinite()
    near = F.max_pool2d(exact.float(), (2 * shared + 1, 1), 1, (shared, 0)) > 0
    found = ~y.isfinite()
    assert found[exact].all() and not found[~near].any()


# networks and blocks


@pytest.mark.parametrize(
    "case", [name for name, (_, _, dtype) in backend.CASES.items() if dtype != SINGLE]
)
def test_a_block_and_its_gradients_are_as_good_as_eager(case: str, extension: ModuleType) -> None:
    with serving(extension), warpgroups(extension):
        backend.check_block(case, "cpu")


@pytest.mark.parametrize("norm", launches.NORMS)
@pytest.mark.parametrize("cast", launches.CASTS)
def test_a_block_takes_few_launches(
    cast: str, norm: str, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # conftest's NaN in new buffers are launches too
    with serving(extension), sm90_device():
        found = launches.of_block("cuda/fused", norm, cast, extension)
    limits = block_launches.LIMITS["cuda/fused", cast]
    for mode, limit in zip(launches.MODES, limits, strict=True):
        names = found[mode].launches
        assert len(names) <= limit, f"{mode}: {', '.join(names)}"
        assert any(name.startswith("cuda.sm90_") for name in names)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "2d": (
        lambda: fastfilm.FiLMedUNet(1, 2, depth=1, base_filters=8, metadata_size=3),
        (12, 18),
        BRAIN,
    ),
    "2d_instance_conv_norm_film_act": (
        lambda: fastfilm.FiLMedUNet(
            2,
            1,
            depth=1,
            base_filters=8,
            metadata_size=3,
            norm="instance",
            order="conv-norm-film-act",
        ),
        (12, 13),
        HALF,
    ),
    "3d": (
        lambda: fastfilm.FiLMedUNet(
            1, 1, depth=1, base_filters=8, metadata_size=3, spatial_dims=3, norm="instance"
        ),
        (4, 6, 7),
        BRAIN,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_of_a_network_is_as_good_as_eager(name: str, extension: ModuleType) -> None:
    make, size, dtype = NETWORKS[name]

    def step(seed: int, backend: str, wide: bool = False) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        net = make().train().to(dtype)
        channels = next(p for p in net.parameters() if p.dim() > 2).shape[1]
        image, rows = torch.randn(2, channels, *size).to(dtype), torch.eye(3)[:2].to(dtype)
        if wide:
            net, image, rows = net.double(), image.double(), rows.double()
        return networks._step(net, image, rows, backend)

    # of a bias in front of a norm only rounding is left
    exact = [step(seed, "reference", wide=True) for seed in range(8)]
    names = [k for k, v in exact[0].items() if v.norm() > 1e-6 * exact[0]["output"].norm()]
    eager = [(step(seed, "reference"), right) for seed, right in enumerate(exact)]
    with serving(extension), warpgroups(extension):
        ours = step(0, "cuda")
    assert_as_good_as_eager({k: ours[k] for k in names}, exact[0], eager, dtype)
