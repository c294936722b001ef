"""The C++ convolution and its gradients against float64, next to eager PyTorch at the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm
from fastfilm.ops import spec
from fastfilm.ops.block import PreparedWeight
from fastfilm.ops.spec import Geometry
from fastfilm.ops.vendor import convolutions as vendor

from ..support.yardstick import assert_as_good_as_eager, assert_threads_do_not_change_bits

_C = pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
from fastfilm.ops.launchers.cpu import convolution as own  # noqa: E402
from fastfilm.ops.launchers.cpu import kernels as cpu  # noqa: E402
from fastfilm.ops.launchers.cpu import rules  # noqa: E402

from ..support.instruction_sets import instruction_set  # noqa: E402
from ..support.kernel_threads import kernel_threads  # noqa: E402

__all__ = ["instruction_set", "kernel_threads"]

# map, kernel, padding, output channels: one and two, part of a block, whole blocks, several of them
CASES = (
    ((2, 16, 9, 21), (3, 3), (1, 1), 1),
    ((1, 5, 4, 3), (3, 3), (1, 1), 2),
    ((2, 3, 7, 16), (3, 3), (0, 1), 3),
    ((1, 24, 6, 40), (3, 3), (1, 1), 8),
    ((2, 1, 5, 6, 17), (3, 3, 3), (1, 1, 1), 8),
    ((1, 8, 6, 5, 16), (3, 3, 3), (1, 1, 1), 1),
    ((1, 7, 3, 70, 16), (3, 1, 5), (1, 0, 2), 5),
    ((2, 9, 8, 19), (5, 2), (2, 1), 13),
    ((1, 33, 8, 18), (3, 3), (1, 1), 45),
    ((1, 131, 5, 16), (3, 3), (1, 1), 32),
    ((2, 8, 3, 4, 5), (3, 3, 3), (1, 1, 1), 8),
    ((2, 20, 4, 2), (3, 3), (1, 1), 24),
)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, padding=padding)


def draw(
    shape: tuple[int, ...], kernel: tuple[int, ...], co: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = spec.channels_last(torch.randn(shape).to(dtype))
    return x, torch.randn(co, shape[1], *kernel).to(dtype), torch.randn(co).to(dtype)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "kernel", "padding", "co"), CASES)
def test_the_convolution_is_as_accurate_as_eager(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    co: int,
    dtype: torch.dtype,
    instruction_set: str,
) -> None:
    found = []
    for seed in range(3):
        x, w, b = draw(shape, kernel, co, dtype, seed)
        exact = {"y": conv(x.double(), w.double(), b.double(), padding)}
        found.append(({"y": conv(x, w, b, padding)}, exact))
    y = cpu.convolve(x, w, b, padding)
    assert y.dtype == dtype and y.is_contiguous(memory_format=spec.channels_last_format(x.dim()))
    assert_as_good_as_eager({"y": y}, exact, found, dtype)
    # a weight in another layout, and no bias
    w = spec.channels_last(w)
    bare = cpu.convolve(x, w, None, padding)
    assert torch.equal(cpu.convolve(x, w, b, padding), y)
    shift = b.double().view(-1, *(1,) * (x.dim() - 2))
    assert_as_good_as_eager({"y": bare}, {"y": exact["y"] - shift}, found, dtype)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "kernel", "padding", "co"), CASES)
def test_the_gradients_are_as_accurate_as_eagers(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    padding: tuple[int, ...],
    co: int,
    dtype: torch.dtype,
    instruction_set: str,
) -> None:
    def gradients(x: Tensor, w: Tensor, e: Tensor) -> dict[str, Tensor]:
        x, w = (t.detach().requires_grad_() for t in (x, w))
        found = torch.autograd.grad(conv(x, w, None, padding), [x, w], e)
        return dict(zip(("x", "weight"), found, strict=True))

    found = []
    for seed in range(3):
        x, w, _ = draw(shape, kernel, co, dtype, seed)
        e = spec.channels_last(torch.randn_like(conv(x, w, None, padding)))
        exact = gradients(x.double(), w.double(), e.double())
        found.append((gradients(x, w, e), exact))
    for weight in (w, spec.channels_last(w)):
        ours = {"x": cpu.convolve_dgrad(e, weight, padding)}
        assert ours["x"].is_contiguous(memory_format=spec.channels_last_format(x.dim()))
        if dtype == torch.float32:
            ours["weight"] = cpu.convolve_wgrad(e, x, weight, padding)
            assert ours["weight"].stride() == weight.stride()
        of = [({k: a[k] for k in ours}, {k: b[k] for k in ours}) for a, b in found]
        assert_as_good_as_eager(ours, {k: exact[k] for k in ours}, of, dtype)


STRIDED = [
    # shape of the map, kernel, stride, padding, Co
    ((2, 5, 17, 40), (3, 3), (2, 2), (1, 1), 20),
    ((2, 40, 9, 11), (2, 2), (2, 2), (0, 0), 48),  # a last column that nobody reads
    ((1, 3, 8, 50), (1, 5), (1, 3), (0, 2), 1),
    ((2, 33, 6, 7, 9), (3, 3, 3), (2, 2, 2), (1, 1, 1), 9),
    ((1, 4, 5, 9, 12), (3, 1, 2), (2, 1, 2), (1, 0, 0), 70),
    ((2, 6, 4, 5, 6), (1, 1, 1), (2, 2, 2), (0, 0, 0), 2),
]


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding", "co"), STRIDED)
def test_strided_convolutions_and_their_weights_gradients_are_as_accurate_as_eager(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    co: int,
    instruction_set: str,
) -> None:
    convolve = F.conv2d if len(shape) == 4 else F.conv3d

    def theirs(
        x: Tensor, w: Tensor, b: Tensor, e: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        w = w.detach().requires_grad_()
        y = convolve(x, w, b, stride, padding)
        e = spec.channels_last(torch.randn_like(y)) if e is None else e
        return {"y": y.detach(), "weight": torch.autograd.grad(y, w, e)[0]}, e

    found = []
    for seed in range(3):
        x, w, b = draw(shape, kernel, co, torch.float32, seed)
        eager, e = theirs(x, w, b, None)
        exact, _ = theirs(x.double(), w.double(), b.double(), e.double())
        found.append((eager, exact))
    ours = {
        "y": cpu.convolve(x, w, b, padding, stride=stride),
        "weight": cpu.convolve_wgrad(e, x, w, padding, stride),
    }
    assert_as_good_as_eager(ours, exact, found, torch.float32)


@pytest.mark.usefixtures("kernel_threads")
def test_windows_that_end_before_the_map_stay_inside_of_their_rows(instruction_set: str) -> None:
    # what was behind a row must be zeros again when the row's place is used anew
    x, w, b = draw((1, 3, 40, 15), (2, 2), 5, torch.float32)
    y = cpu.convolve(x, w, b, (0, 0), stride=(2, 4))
    torch.testing.assert_close(y, F.conv2d(x, w, b, (2, 4)))


AUDIT = [
    # shape of the map, Co, kernel, stride, transposed
    ((2, 64, 5, 6, 5), 64, 3, 1, False),
    ((2, 64, 9, 7), 128, 3, 1, False),
    ((2, 64, 48, 40), 128, 3, 2, False),
    ((2, 96, 12, 12, 12), 32, 3, 2, False),
    ((2, 40, 48, 40), 40, 5, 1, False),
    ((2, 8, 24, 24, 24), 8, 3, 2, False),
    ((2, 12, 24, 24, 24), 12, 2, 2, False),
    ((1, 16, 16, 24, 24), 24, 3, 1, False),
    ((1, 12, 32, 40, 24), 24, 3, 1, False),
    ((1, 32, 10, 16, 16), 32, 3, 2, False),
    ((2, 32, 12, 12, 12), 64, 2, 2, True),
    ((2, 64, 40, 32), 128, 2, 2, True),
    ((1, 64, 12, 12, 12), 4, 3, 2, True),
    ((2, 160, 8, 8, 8), 160, 3, 1, False),
    ((1, 128, 12, 9), 256, 3, 1, False),
    # weights of more values than the map
    ((2, 128, 4, 4), 128, 3, 1, False),
    ((2, 256, 4, 4), 128, 3, 1, False),
    ((2, 256, 2, 2, 2), 192, 3, 1, False),
    # products of matrices
    ((2, 512, 12, 10), 64, 1, 1, False),
    ((1, 1024, 9, 9), 300, 1, 1, False),
    ((2, 300, 4, 5, 6), 130, 1, 1, False),
]


@pytest.mark.parametrize(("shape", "co", "k", "stride", "transposed"), AUDIT)
def test_every_route_rounds_as_little_as_contiguous_eager(
    shape: tuple[int, ...], co: int, k: int, stride: int, transposed: bool
) -> None:
    dims = len(shape) - 2
    more = (k % 2,) * dims if transposed else (0,) * dims
    pad = 0 if k == 2 else k // 2
    geometry = Geometry((stride,) * dims, (pad,) * dims, (1,) * dims, transposed, more, 1)
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(shape) + 0.3
        w = torch.randn(*((shape[1], co) if transposed else (co, shape[1])), *(k,) * dims)
        e = torch.randn_like(torch.convolution(x, w, None, *geometry))

        def eager(x: Tensor, w: Tensor, e: Tensor) -> dict[str, Tensor]:
            y = torch.convolution(x, w, None, *geometry)
            dx, dw, _ = torch.ops.aten.convolution_backward(
                e, x, w, None, *geometry, [True, True, False]
            )
            return {"y": y, "x": dx, "weight": dw}

        exact = eager(x.double(), w.double(), e.double())
        found.append((eager(x, w, e), exact))
    xc, ec = spec.channels_last(x), spec.channels_last(e)
    y = cpu.convolution(xc, w, None, geometry)
    kept = cpu.convolution(xc, w, None, geometry, PreparedWeight().pack)
    assert_as_good_as_eager({"y": kept}, exact, found, torch.float32)
    dx, dw = cpu.convolution_gradients(ec, xc, w, geometry, (True, True))
    assert dx is not None and dw is not None
    assert_as_good_as_eager({"y": y, "x": dx, "weight": dw}, exact, found, torch.float32)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_the_gradients_that_it_is_part_of(
    bad: float, instruction_set: str
) -> None:
    x, w, _ = draw((1, 5, 7, 21), (3, 3), 3, torch.float32)
    e = spec.channels_last(torch.randn(1, 3, 7, 21))
    x[0, 2, 3, 20] = bad
    finite = cpu.convolve_wgrad(e, x, w, (1, 1)).isfinite()
    expected = torch.ones(3, 5, 3, 3, dtype=torch.bool)
    expected[:, 2, :, 1:] = False  # the left tap would read it for a position behind the end
    assert torch.equal(finite, expected)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("co", [1, 5, 16, 33])
def test_finishing_each_row_gives_the_bits_of_a_pass_of_its_own(
    co: int, dtype: torch.dtype, act: str, instruction_set: str
) -> None:
    x, w, b = draw((2, 6, 9, 21), (3, 3), co, dtype)
    coef = torch.randn(7, 2, co).abs()
    finished = cpu.convolve(x, w, b, (1, 1), coef, act)
    assert torch.equal(finished, cpu.apply(cpu.convolve(x, w, b, (1, 1)), coef, act))


@pytest.mark.parametrize("co", [1, 2, 8, 20])
def test_its_bits_do_not_depend_on_threads(co: int) -> None:
    x, w, b = draw((2, 12, 5, 33, 18), (3, 3, 3), co, torch.float32)
    assert_threads_do_not_change_bits(lambda: cpu.convolve(x, w, b, (1, 1, 1)))


@pytest.mark.parametrize("co", [1, 2, 5, 8])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_its_own_neighbours_only(
    co: int, bad: float, instruction_set: str
) -> None:
    x, w, b = draw((1, 5, 7, 21), (3, 3), co, torch.float32)
    # the first channel too: vectors along the kernel's row may end in the next position's
    x[0, [0, 2], 3, 9] = bad
    y = cpu.convolve(x, w, b, (1, 1)).isfinite().all(1)[0]
    expected = torch.ones(7, 21, dtype=torch.bool)
    expected[2:5, 8:11] = False
    assert torch.equal(y, expected)


def test_blocks_of_few_channels_take_it_and_keep_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[int] = []
    convolve = own.convolve

    def watched(*args: object, **more: object) -> Tensor:
        used.append(1)
        return convolve(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(own, "convolve", watched)
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(6, 4, norm="instance")
    x = torch.randn(2, 6, 12, 16, requires_grad=True)
    exact_block = fastfilm.ConvNormFiLM2d(6, 4, norm="instance").double()
    exact_block.load_state_dict(block.state_dict())
    exact_x = x.detach().double().requires_grad_()
    dy = torch.randn(2, 4, 12, 16)
    with fastfilm.backend("cpu"):
        ours = torch.autograd.grad(block(x), [x, block.weight], dy)
    assert used
    with fastfilm.backend("reference"):
        eager = torch.autograd.grad(block(x), [x, block.weight], dy)
        exact = torch.autograd.grad(
            exact_block(exact_x), [exact_x, exact_block.weight], dy.double()
        )

    def named(values: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(("x", "weight"), values, strict=True))

    assert_as_good_as_eager(
        named(ours), named(exact), [(named(eager), named(exact))], torch.float32
    )


@pytest.mark.parametrize(
    "change",
    [{"dilation": (2, 2)}, {"transposed": True}, {"groups": 2}, {"padding": (3, 1)}],
)  # fmt: skip
def test_other_geometries_are_the_vendors(change: dict[str, object]) -> None:
    geometry = Geometry.ordinary((1, 1), (1, 1))
    x, w, _ = draw((1, 8, 16, 16), (3, 3), 4, torch.float32)
    if _C.instruction_set() != "baseline":
        assert rules.covers_convolution(x, w, geometry)
    assert not rules.covers_convolution(x, w, geometry._replace(**change))
    assert not rules.covers_convolution(x.double(), w.double(), geometry)


@pytest.mark.skipif(_C.instruction_set() == "baseline", reason="needs wide vectors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_convolutions_are_its_own_and_large_ones_the_vendors(dtype: torch.dtype) -> None:
    geometry = Geometry.ordinary((1, 1), (1, 1))
    x, w, _ = draw((2, 24, 8, 8), (3, 3), 24, dtype)
    assert rules.covers_convolution(x, w, geometry) == (dtype == torch.float32)
    assert rules.covers_convolution(x[..., :3], w, geometry)
    x, w, _ = draw((2, 24, 64, 64), (3, 3), 40, dtype)
    assert not rules.covers_convolution(x, w, geometry)
    # long sums, which oneDNN's channels-last form rounds worse with AVX-512 alone, and its gradients with AVX2 too
    x, w, _ = draw((2, 40, 64, 64), (3, 3), 40, dtype)
    single, vectors = dtype == torch.float32, _C.instruction_set() == "avx512"
    assert rules.covers_convolution(x, w, geometry) == (single and vectors)
    assert rules.covers_gradients(x, w, geometry)[0] == single
    x, w, _ = draw((2, 80, 64, 64), (3, 3), 80, dtype)
    assert rules.covers_gradients(x, w, geometry)[0] == (single and vectors)


@pytest.mark.parametrize("size", [(12, 12), (6, 5, 5)])
def test_wide_convolutions_of_few_positions_round_alike_for_either_layout_of_the_weight(
    size: tuple[int, ...],
) -> None:
    """A channels-last weight does not lead to oneDNN's sums in one register, as it does in eager PyTorch."""
    geometry = Geometry.ordinary((1,) * len(size), (1,) * len(size))
    x, w, _ = draw((2, 256, *size), (3,) * len(size), 128, torch.float32)
    e = spec.channels_last(torch.randn(2, 128, *size))

    def eager(x: Tensor, w: Tensor, e: Tensor) -> dict[str, Tensor]:
        needs = None, *geometry, [True, False, False]
        dx = torch.ops.aten.convolution_backward(e, x, w, *needs)[0]
        return {"y": torch.convolution(x, w, None, *geometry), "x": dx}

    exact = eager(x.double(), w.double(), e.double())
    theirs = eager(x.contiguous(), w, e.contiguous())
    for weight in (w, spec.channels_last(w)):
        dx, _ = cpu.convolution_gradients(e, x, weight, geometry, (True, False))
        assert dx is not None
        ours = {"y": cpu.convolution(x, weight, None, geometry), "x": dx}
        assert_as_good_as_eager(ours, exact, [(theirs, exact)], torch.float32)


@pytest.mark.skipif(_C.instruction_set() != "avx2", reason="measured with AVX2")
def test_convolutions_of_many_weights_are_the_vendors() -> None:
    geometry = Geometry.ordinary((1, 1), (1, 1))
    x, w, _ = draw((2, 256, 2, 2), (3, 3), 128, torch.float32)
    assert not rules.covers_convolution(x, w, geometry)
    assert rules.covers_gradients(x, w, geometry) == (False, False)
    x, w, _ = draw((2, 64, 4, 4), (3, 3), 64, torch.float32)
    assert rules.covers_convolution(x, w, geometry)
    # fewer, where the vendor has them in its own layout
    assert not rules.covers_convolution(x, w, geometry, True, packed=True)
    x, w, _ = draw((2, 32, 4, 4), (3, 3), 32, torch.float32)
    assert rules.covers_convolution(x, w, geometry, True, packed=True)


@pytest.mark.skipif(_C.instruction_set() == "baseline", reason="needs wide vectors")
def test_the_gradients_of_small_float32_convolutions_are_its_own() -> None:
    geometry = Geometry.ordinary((1, 1), (1, 1))
    x, w, _ = draw((2, 24, 8, 8), (3, 3), 24, torch.float32)
    assert rules.covers_gradients(x, w, geometry) == (True, True)
    assert rules.covers_gradients(x.bfloat16(), w.bfloat16(), geometry) == (False, False)
    strided = geometry._replace(stride=(2, 2))
    assert rules.covers_gradients(x, w, strided) == (False, True)
    assert rules.covers_gradients(x, w, geometry._replace(transposed=True)) == (True, True)
    # a map that PyTorch convolves without oneDNN, though not the gradient, which has more channels
    x, w, _ = draw((1, 12, 32, 40, 4), (3, 3, 3), 24, torch.float32)
    assert rules.covers_gradients(x, w, Geometry.ordinary((1,) * 3, (1,) * 3)) == (True, True)
    # of one input channel most of each vector of the weight's gradient is empty
    x, w, _ = draw((2, 1, 64, 64), (3, 3), 32, torch.float32)
    assert rules.covers_gradients(x, w, geometry) == (True, False)


@pytest.mark.skipif(_C.instruction_set() == "baseline", reason="needs wide vectors")
def test_weights_gradients_of_any_size_are_its_own_unless_the_vendors_are_as_fast() -> None:
    geometry = Geometry.ordinary((1,) * 3, (1,) * 3)
    vectors = _C.instruction_set() == "avx512"
    for ci, co, expected in ((8, 8, True), (24, 24, True), (32, 32, not vectors), (1, 8, False)):
        x, w, _ = draw((2, ci, 20, 20, 20), (3, 3, 3), co, torch.float32)
        assert rules.covers_gradients(x, w, geometry)[1] == expected, (ci, co)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("shape", [(2, 4, 32, 32, 32), (2, 9, 9, 21, 40), (3, 12, 60, 150)])
def test_weights_gradients_of_large_maps_round_as_little_as_eagers_contiguous_ones(
    shape: tuple[int, ...], instruction_set: str
) -> None:
    co, kernel = 11, (3,) * (len(shape) - 2)
    x, w, _ = draw(shape, kernel, co, torch.float32)
    x = spec.channels_last(x + 0.5)
    e = spec.channels_last(torch.randn(shape[0], co, *shape[2:]))
    ones, none = (1,) * len(kernel), (0,) * len(kernel)

    def theirs(x: Tensor, w: Tensor, e: Tensor) -> Tensor:
        needs = [False, True, False]
        return torch.ops.aten.convolution_backward(
            e, x, w, None, ones, ones, ones, False, none, 1, needs
        )[1]

    exact = theirs(x.double(), w.double(), e.double())
    error = (cpu.convolve_wgrad(e, x, w, ones) - exact).norm()
    eager = (theirs(x.contiguous(), w, e.contiguous()) - exact).norm()
    assert error <= 1.5 * eager
    assert error <= 4e-7 * exact.norm()  # eager's is ten times that in 2D


def test_one_small_sample_is_the_vendors_from_fewer_products_on() -> None:
    geometry = Geometry.ordinary((1, 1), (1, 1))
    x, w, _ = draw((2, 24, 8, 8), (3, 3), 24, torch.float32)
    assert not rules.covers_convolution(x[:1], w, geometry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 1}, "dtype must not be float64"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"act": 9}, r"act must be in \[0, 7\)"),
        ({"y": 0}, "y is null"),
        (
            {"sizes": [1, 1, 1, 1, 4, 4, 1, 3, 3, 0, 1, 1, 1, 4, 4, 1, 0, 1]},
            "stride must be positive",
        ),
        (
            {"sizes": [1, 1, 1, 1, 4, 4, 1, 3, 3, 0, 1, 1, 1, 5, 4, 1, 1, 1]},
            "larger than map and zeros",
        ),
    ],
)
def test_the_binding_names_the_bad_argument(change: dict[str, object], message: str) -> None:
    x, w, y = torch.zeros(16), torch.zeros(9), torch.zeros(16)
    form = {
        "dtype": 0, "sizes": [1, 1, 1, 1, 4, 4, 1, 3, 3, 0, 1, 1, 1, 4, 4, 1, 1, 1], "strides": [9, 9, 0, 3, 1],
    }  # fmt: skip
    call = {
        "x": x.data_ptr(), "weight": w.data_ptr(), "bias": 0, "coef": 0, "y": y.data_ptr(), "act": 0, "threads": 1,
    }  # fmt: skip

    def run(changed: dict[str, object]) -> None:
        made = _C.Convolution(**{k: changed.get(k, v) for k, v in form.items()})
        made.run(**{k: changed.get(k, v) for k, v in call.items()})

    run({})
    with pytest.raises(ValueError, match=message):
        run(change)


def test_the_binding_of_the_gradient_names_the_bad_argument() -> None:
    x, dw, e = torch.zeros(16), torch.zeros(9), torch.zeros(16)
    sizes, strides = [1, 1, 1, 1, 4, 4, 1, 3, 3, 0, 1, 1, 1, 4, 4, 1, 1, 1], [9, 9, 0, 3, 1]
    addresses = [x.data_ptr(), e.data_ptr(), dw.data_ptr()]
    _C.Convolution(0, sizes, strides).kernel_gradient(*addresses, 1)
    with pytest.raises(ValueError, match="dtype must be float32"):
        _C.Convolution(2, sizes, strides).kernel_gradient(*addresses, 1)
    with pytest.raises(ValueError, match="threads must be >= 1"):
        _C.Convolution(0, sizes, strides).kernel_gradient(*addresses, 0)
    for i, name in enumerate(("x", "e", "dkernel")):
        with pytest.raises(ValueError, match=f"{name} is null"):
            _C.Convolution(0, sizes, strides).kernel_gradient(
                *[0 if i == j else a for j, a in enumerate(addresses)], 1
            )


def test_the_launcher_names_the_bad_argument() -> None:
    x, w, b = draw((1, 4, 6, 6), (3, 3), 2, torch.float32)
    with pytest.raises(TypeError, match="weight and bias must be"):
        cpu.convolve(x, w.half(), b, (1, 1))
    with pytest.raises(ValueError, match=r"weight must be \[Co, 4\]"):
        cpu.convolve(x, w[:, :3], b, (1, 1))
    e = torch.zeros(1, 2, 6, 6)
    with pytest.raises(TypeError, match="weight must be"):
        cpu.convolve_dgrad(e, w.half(), (1, 1))
    with pytest.raises(ValueError, match="e must be"):
        cpu.convolve_wgrad(e[..., :5], x, w, (1, 1))


def test_the_vendors_convolution_agrees() -> None:
    x, w, b = draw((1, 8, 16, 32), (3, 3), 8, torch.float32)
    theirs = vendor.convolution(x, w, b, Geometry.ordinary((1, 1), (1, 1)))
    torch.testing.assert_close(cpu.convolve(x, w, b, (1, 1)), theirs, rtol=1e-5, atol=1e-5)
