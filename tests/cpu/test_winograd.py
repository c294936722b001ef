"""Winograd's form of the C++ convolution: error against float64 beside eager's, and when it is taken."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastfilm.ops import spec

from ..support.yardstick import assert_as_good_as_eager, assert_threads_do_not_change_bits
from .test_convolution import conv, draw

_C = pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
from fastfilm.ops.launchers.cpu import convolution, rules  # noqa: E402
from fastfilm.ops.launchers.cpu import kernels as cpu  # noqa: E402

from ..support.instruction_sets import instruction_set  # noqa: E402
from ..support.kernel_threads import kernel_threads  # noqa: E402

__all__ = ["instruction_set", "kernel_threads"]

# map, depth of the kernel, padding, output channels: odd sizes, parts of vectors, several groups of tiles
CASES = (
    ((2, 16, 12, 18), (), (1, 1), 16),
    ((1, 3, 7, 9), (), (0, 2), 5),
    ((2, 20, 9, 13), (), (1, 1), 40),
    ((1, 140, 5, 6), (), (2, 0), 33),
    ((3, 24, 3, 3), (), (0, 0), 17),
    ((1, 16, 40, 34), (), (1, 1), 32),
    ((2, 8, 4, 6, 7), (3,), (1, 1, 1), 12),
    ((1, 18, 3, 5, 4), (1,), (0, 1, 1), 16),
)


@pytest.fixture
def winograd(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Winograd's form for every convolution that it can serve."""
    kept = convolution._convolution, convolution._mirrored

    def everywhere(
        dtype: torch.dtype, batch: int, out: object, weight: tuple[int, ...], instructions: str
    ) -> bool:
        return dtype == torch.float32 and tuple(weight[-2:]) == (3, 3)

    monkeypatch.setattr(convolution, "by_winograd", everywhere)
    for cache in kept:
        cache.cache_clear()
    yield
    for cache in kept:
        cache.cache_clear()


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize(("shape", "depth", "padding", "co"), CASES)
def test_it_is_as_accurate_as_eager(
    shape: tuple[int, ...],
    depth: tuple[int, ...],
    padding: tuple[int, ...],
    co: int,
    winograd: None,
    instruction_set: str,
) -> None:
    kernel, found = (*depth, 3, 3), []
    for seed in range(3):
        x, w, b = draw(shape, kernel, co, torch.float32, seed)
        e = spec.channels_last(torch.randn_like(conv(x, w, None, padding)))
        values = []
        for wide in (False, True):
            given = [t.double() if wide else t for t in (x, w, b, e)]
            leaf = given[0].detach().requires_grad_()
            y = conv(leaf, given[1], given[2], padding)
            (dx,) = torch.autograd.grad(y, leaf, given[3])
            values.append({"y": y.detach(), "x": dx})
        found.append((values[0], values[1]))
    ours = {"y": cpu.convolve(x, w, b, padding), "x": cpu.convolve_dgrad(e, w, padding)}
    assert_as_good_as_eager(ours, values[1], found, torch.float32)
    # weights of another layout have the same numbers
    assert torch.equal(cpu.convolve(x, spec.channels_last(w), b, padding), ours["y"])


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("act", ["none", "relu", "leaky_relu", "elu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("size", [(9, 21), (5, 33), (2, 2)])
def test_finishing_gives_the_bits_of_a_pass_of_its_own(
    size: tuple[int, ...], act: str, winograd: None, instruction_set: str
) -> None:
    x, w, b = draw((2, 6, *size), (3, 3), 21, torch.float32)
    coef = torch.randn(7, 2, 21).abs()
    finished = cpu.convolve(x, w, b, (1, 1), coef, act)
    assert torch.equal(finished, cpu.apply(cpu.convolve(x, w, b, (1, 1)), coef, act))


def test_its_bits_do_not_depend_on_threads(winograd: None) -> None:
    x, w, b = draw((2, 24, 5, 33, 18), (3, 3, 3), 20, torch.float32)
    assert_threads_do_not_change_bits(lambda: cpu.convolve(x, w, b, (1, 1, 1)))


def _taken(shape: tuple[int, ...], co: int, dtype: torch.dtype = torch.float32, k: int = 3) -> bool:
    dims = len(shape) - 2
    weight = (co, shape[1], *(k,) * dims)
    return rules.by_winograd(dtype, shape[0], shape[2:], weight, "avx512")


def test_where_it_is_taken() -> None:
    assert _taken((4, 64, 32, 32), 64) and _taken((2, 32, 8, 16, 16), 16)
    assert not _taken((1, 32, 8, 16, 16), 16)  # PyTorch's own form rounds less
    assert not _taken((4, 24, 32, 32), 64)  # a part of a vector
    assert not _taken((1, 64, 16, 16), 64)  # too few tiles for their weights
    assert not _taken((4, 64, 32, 32), 64, torch.bfloat16) and not _taken((4, 64, 32, 32), 64, k=1)
    for other in ("avx2", "baseline"):
        assert not rules.by_winograd(torch.float32, 4, (32, 32), (64, 64, 3, 3), other)


def test_a_kernel_of_other_sizes_is_refused() -> None:
    x, w, _ = draw((1, 4, 6, 6), (1, 3), 4, torch.float32)
    kernels, _, shape = convolution._convolution(
        x.dtype, x.shape, w.shape, w.stride(), (1, 1), (0, 1), _C.instruction_set()
    )
    y = torch.empty(shape)
    addresses: list[Tensor] = [x, w]
    with pytest.raises(ValueError, match="3 x 3 along the last axes"):
        kernels.run_winograd(*(t.data_ptr() for t in addresses), 0, 0, y.data_ptr(), 0, 1)
