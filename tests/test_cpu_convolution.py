"""The C++ convolution of few output channels against float64, next to eager PyTorch at the same dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm
from fastfilm.ops import spec, vendor

from .yardstick import assert_as_good_as_eager

_C = pytest.importorskip("fastfilm._C", reason="the C++ extension was not built")
from fastfilm.ops import cpu  # noqa: E402

from .instruction_sets import instruction_set  # noqa: E402

__all__ = ["instruction_set"]

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
)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...]) -> Tensor:
    return (F.conv2d if x.dim() == 4 else F.conv3d)(x, weight, bias, padding=padding)


def draw(
    shape: tuple[int, ...], kernel: tuple[int, ...], co: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = spec.channels_last(torch.randn(shape).to(dtype))
    return x, torch.randn(co, shape[1], *kernel).to(dtype), torch.randn(co).to(dtype)


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
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(cpu.convolve(x, w, b, (1, 1, 1)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, found[0]) for y in found)


@pytest.mark.parametrize("co", [1, 2, 5, 8])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_reaches_its_own_neighbours_only(
    co: int, bad: float, instruction_set: str
) -> None:
    x, w, b = draw((1, 5, 7, 21), (3, 3), co, torch.float32)
    x[0, 2, 3, 9] = bad
    y = cpu.convolve(x, w, b, (1, 1)).isfinite().all(1)[0]
    expected = torch.ones(7, 21, dtype=torch.bool)
    expected[2:5, 8:11] = False
    assert torch.equal(y, expected)


def test_blocks_of_few_channels_take_it_and_keep_their_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used: list[int] = []
    own = cpu.convolve

    def watched(*args: object) -> Tensor:
        used.append(1)
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "convolve", watched)
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
    [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"transposed": True}, {"groups": 2}, {"padding": (3, 1)}],
)  # fmt: skip
def test_other_geometries_are_the_vendors(change: dict[str, object]) -> None:
    geometry = {
        "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "transposed": False,
        "output_padding": (0, 0), "groups": 1,
    }  # fmt: skip
    x, w, _ = draw((1, 8, 16, 16), (3, 3), 4, torch.float32)
    if _C.instruction_set() != "baseline":
        assert cpu.covers_convolution(x, w, tuple(geometry.values()))
    assert not cpu.covers_convolution(x, w, tuple((geometry | change).values()))
    assert not cpu.covers_convolution(x.double(), w.double(), tuple(geometry.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 1}, "dtype must not be float64"),
        ({"threads": 0}, "threads must be >= 1"),
        ({"y": 0}, "y is null"),
        ({"sizes": [1, 1, 1, 1, 4, 4, 1, 3, 3, 0, 1, 1, 1, 5, 4]}, "larger than map and zeros"),
        ({"strides": [-1, 9, 0, 3, 1]}, "strides must be >= 0"),
    ],
)
def test_the_binding_names_the_bad_argument(change: dict[str, object], message: str) -> None:
    x, w, y = torch.zeros(16), torch.zeros(9), torch.zeros(16)
    call = {
        "x": x.data_ptr(), "weight": w.data_ptr(), "bias": 0, "coef": 0, "y": y.data_ptr(), "dtype": 0, "act": 0,
        "sizes": [1, 1, 1, 1, 4, 4, 1, 3, 3, 0, 1, 1, 1, 4, 4], "strides": [9, 9, 0, 3, 1], "threads": 1,
    }  # fmt: skip
    _C.convolve(**call)
    with pytest.raises(ValueError, match=message):
        _C.convolve(**(call | change))


def test_the_launcher_names_the_bad_argument() -> None:
    x, w, b = draw((1, 4, 6, 6), (3, 3), 2, torch.float32)
    with pytest.raises(TypeError, match="weight and bias must be"):
        cpu.convolve(x, w.half(), b, (1, 1))
    with pytest.raises(ValueError, match=r"weight must be \[Co, 4\]"):
        cpu.convolve(x, w[:, :3], b, (1, 1))


def test_the_vendors_convolution_agrees() -> None:
    x, w, b = draw((1, 8, 16, 32), (3, 3), 8, torch.float32)
    theirs = vendor.convolution(x, w, b, (1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    torch.testing.assert_close(cpu.convolve(x, w, b, (1, 1)), theirs, rtol=1e-5, atol=1e-5)
