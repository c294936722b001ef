"""The C++ kernels against the float64 reference, next to eager PyTorch at the same dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastfilm.ops import reference, spec

_C = pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")
from fastfilm.ops.launchers.cpu import kernels as cpu  # noqa: E402

from ..support.instruction_sets import instruction_set  # noqa: E402
from ..support.kernel_threads import kernel_threads  # noqa: E402

__all__ = ["instruction_set", "kernel_threads"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 1, 7, 9),
    (3, 3, 5, 6, 7),
    (3, 4, 1, 1),
    (2, 5, 9, 11),
    (1, 16, 9, 10, 5),
    (3, 33, 13, 17),
    (2, 64, 31, 33),
    (1, 257, 3, 3),
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; 1 to begin with, since maps this small gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def feature_map(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spec.channels_last(torch.randn(shape, generator=generator).to(dtype))


def coefficients(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    coef = torch.randn(7, *shape[:2], generator=torch.Generator().manual_seed(1))
    coef[spec.SLOPE] = coef[spec.SLOPE].abs() * 0.5
    return coef.to(numbers_dtype(dtype))


class Errors:
    """Squared errors of one quantity, pooled over shapes so that no lucky eager result decides."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> None:
        assert ours.shape == truth.shape and ours.dtype == eager.dtype, name
        ours, eager, truth = ours.detach(), eager.detach(), truth.detach()
        sums = self.sums.setdefault(name, [0.0, 0.0, 0.0])
        for k, difference in enumerate((ours - truth, eager - truth, truth)):
            sums[k] += difference.double().square().sum().item()

    def check(self, ulp: dict[str, float]) -> None:
        for name, (ours, eager, truth) in self.sums.items():
            if truth == 0:
                assert ours == 0, name
                continue
            error, limit = (ours / truth) ** 0.5, 1.5 * (eager / truth) ** 0.5 + ulp[name]
            assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        for t in tensors
    ]


def ulps(dtype: torch.dtype, maps: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, float]:
    """One unit in the last place of each quantity's type; more where eager is the truth itself."""
    if dtype == torch.float64:
        return dict.fromkeys((*maps, *numbers), 1e-13)
    eps, eps_numbers = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    return dict.fromkeys(maps, eps) | dict.fromkeys(numbers, eps_numbers)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", spec.ACTIVATIONS)
def test_apply_is_as_accurate_as_eager(act: str, dtype: torch.dtype, instruction_set: str) -> None:
    errors = Errors()
    rows = tuple(f"dcoef[{i}]" for i in range(7))
    for shape in SHAPES:
        y, coef, dv = (
            feature_map(shape, dtype),
            coefficients(shape, dtype),
            feature_map(shape, dtype, 2),
        )
        v = cpu.apply(y, coef, act)
        dy, dcoef = cpu.apply_backward(dv, y, coef, act)
        assert v.dtype == dy.dtype == dtype and spec.channels_last(v) is v
        (y64, coef64), (ye, coefe) = leaves(y, coef, dtype=torch.float64), leaves(y, coef)
        v64, ve = reference.materialise(y64, coef64, act), reference.materialise(ye, coefe, act)
        dy64, dcoef64 = torch.autograd.grad(v64, (y64, coef64), dv.double())
        dye, dcoefe = torch.autograd.grad(ve, (ye, coefe), dv)
        errors.add("v", v, ve, v64)
        errors.add("dy", dy, dye, dy64)
        for i, row in enumerate(rows):
            errors.add(row, dcoef[i], dcoefe[i], dcoef64[i])
    errors.check(ulps(dtype, ("v", "dy"), rows))


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", spec.ACTIVATIONS)
def test_moments_are_as_accurate_as_eager(
    act: str, dtype: torch.dtype, instruction_set: str
) -> None:
    errors = Errors()
    for shape, with_pre in itertools.product(SHAPES, (False, True)):
        y, dy = feature_map(shape, dtype), feature_map(shape, dtype, 2)
        coef = coefficients(shape, dtype)
        pre = coef[[spec.B, spec.SLOPE], 0] if with_pre else None
        dstats = coef[:2].contiguous()
        stats = cpu.moments(y, pre, act)
        e, dpre = cpu.moments_backward(None, dstats, y, stats, pre, act)
        total, whole = cpu.moments_backward(dy, dstats, y, stats, pre, act)
        assert (dpre is None) == (pre is None) and e.dtype == total.dtype == dtype

        (y64, pre64), (ye, pree) = leaves(y, pre, dtype=torch.float64), leaves(y, pre)
        stats64, statse = reference.moments(y64, pre64, act), reference.moments(ye, pree, act)
        errors.add("mean", stats[0], statse[0], stats64[0])
        errors.add("var", stats[1], statse[1], stats64[1])
        inputs = (0, 1) if with_pre else (0,)
        grads64 = torch.autograd.grad(
            stats64, [(y64, pre64)[i] for i in inputs], dstats.double(), allow_unused=True
        )
        gradse = torch.autograd.grad(
            statse, [(ye, pree)[i] for i in inputs], dstats, allow_unused=True
        )
        errors.add("e", e, gradse[0], grads64[0])
        errors.add("e + dy", total, gradse[0] + dy, grads64[0] + dy.double())
        if dpre is not None:
            # the gradient at the shift is a sum of terms that nearly cancel where act is linear
            size = grads64[0].abs().sum()
            # with what reached y by other ways, it is the sum of all of e
            at_y = grads64[0] + dy.double()
            assert whole is not None
            error = (whole[0] - at_y.transpose(0, 1).flatten(1).sum(1)).abs().max()
            assert error <= 4 * torch.finfo(dpre.dtype).eps * (size + dy.double().abs().sum())
            for i, name in enumerate(("dshift", "dslope")):
                error = (dpre[i] - grads64[1][i]).abs().max()
                eager = (gradse[1][i] - grads64[1][i]).abs().max()
                eps = torch.finfo(dpre.dtype).eps
                assert error <= 1.5 * eager + eps * (size + grads64[1][i].abs().max()), name
    errors.check(ulps(dtype, ("e", "e + dy"), ("mean", "var")))


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_variance_survives_a_mean_of_1000_sigma(dtype: torch.dtype, instruction_set: str) -> None:
    y = feature_map((2, 3, 40, 41, 43), torch.float64)
    y = (y + torch.tensor([1000.0, -1000.0, 0.0]).view(1, 3, 1, 1, 1)).to(dtype)
    stats, truth = cpu.moments(y, None, "none"), reference.moments(y.double())
    torch.testing.assert_close(stats.double(), truth, rtol=1e-6, atol=1e-6)
    shift = torch.stack([torch.full((3,), 1000.0), torch.zeros(3)]).to(dtype)
    moved = cpu.moments(y, shift, "leaky_relu")
    expected = reference.moments(y.double(), shift.double(), "leaky_relu")
    torch.testing.assert_close(moved.double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("shape", ((1, 32, 40, 41, 3), (5, 7, 61, 67)), ids=str)
def test_bits_do_not_depend_on_threads_or_run(
    shape: tuple[int, ...], threads: Callable[[int], None]
) -> None:
    y, dv = feature_map(shape, torch.float32), feature_map(shape, torch.float32, 2)
    coef = coefficients(shape, torch.float32)
    pre, dstats = coef[:2, 0].contiguous(), coef[:2].contiguous()

    def results(count: int) -> list[Tensor]:
        threads(count)
        stats = cpu.moments(y, pre, "silu")
        e, dpre = cpu.moments_backward(dv, dstats, y, stats, pre, "silu")
        assert dpre is not None
        return [cpu.apply(y, coef, "gelu"), *cpu.apply_backward(dv, y, coef, "elu"), stats, e, dpre]

    first = results(1)
    for count in (1, 2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(first, results(count), strict=True))


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((2, 33, 5, 7), (1, 16, 8, 8), (2, 1, 3, 3, 3)), ids=str)
def test_in_place_overwrites_its_input(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, coef = feature_map(shape, dtype), coefficients(shape, dtype)
    expected = cpu.apply(y, coef, "silu")
    assert cpu.apply(y, coef, "silu", in_place=True) is y
    assert torch.equal(y, expected)


@pytest.mark.usefixtures("kernel_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", spec.ACTIVATIONS)
def test_nan_and_infinity_go_where_eager_sends_them(
    act: str, dtype: torch.dtype, instruction_set: str
) -> None:
    y = feature_map((1, 17, 2, 3), dtype)
    y[0, 3, 0, 0], y[0, 5, 1, 1], y[0, 16, 1, 2] = float("nan"), float("inf"), float("-inf")
    coef = torch.zeros(7, 1, 17, dtype=numbers_dtype(dtype))
    coef[[spec.A, spec.G]], coef[spec.SLOPE] = 1.0, 0.25
    v, expected = cpu.apply(y, coef, act), reference.materialise(y, coef, act)
    assert torch.equal(v.isnan(), expected.isnan())
    assert torch.equal(v.isinf(), expected.isinf())
    pre = coef[[spec.B, spec.SLOPE], 0]
    stats, truth = cpu.moments(y, pre, act), reference.moments(y, pre, act)
    assert torch.equal(stats.isnan(), truth.isnan())
    # an infinite gradient stops at a relu that lets nothing through
    dv = torch.ones_like(y)
    y[0, 1, 1, 0], dv[0, 1, 1, 0] = -1.0, float("inf")
    dy, _ = cpu.apply_backward(dv, y, coef, act)
    leaf = y.detach().requires_grad_()
    (expected,) = torch.autograd.grad(reference.materialise(leaf, coef, act), leaf, dv)
    assert torch.equal(dy[0, 1].isnan(), expected[0, 1].isnan())
    assert torch.equal(dy[0, 1].isinf(), expected[0, 1].isinf())
    dy, dcoef = cpu.apply_backward(y, torch.ones_like(y), coef, act)
    assert dy[0, 3, 0, 0].isnan() and dcoef[spec.S, 0, 3].isnan()
    assert dy[0, :3].isfinite().all() and dcoef[:, 0, :3].isfinite().all()


def test_bfloat16_and_float16_round_as_pytorch_does(instruction_set: str) -> None:
    values = torch.tensor(
        [0.0, -0.0, 1e-8, 6e-8, 5.96e-8, 6.1e-5, 1.0009765, 65504.0, 65519.9, 65520.0, -1e30]
    )
    scale = torch.logspace(-8, 5, 21)
    x = torch.cat(
        [
            values,
            torch.randn(500, generator=torch.Generator().manual_seed(0)).outer(scale).flatten(),
        ]
    )
    for dtype in (torch.bfloat16, torch.float16):
        # the shift makes float32 results that are not representable in the storage type
        y = torch.zeros(1, x.numel(), 1, 1, dtype=dtype)
        coef = torch.zeros(7, 1, x.numel())
        coef[spec.S, 0] = x
        got = cpu.apply(y, coef, "none").flatten()
        assert torch.equal(got, x.to(dtype)), dtype
        back = cpu.apply(
            x.to(dtype).view(1, -1, 1, 1),
            torch.ones_like(coef).index_fill_(0, torch.tensor([1, 3, 4, 5, 6]), 0),
            "none",
        )
        assert torch.equal(back.flatten(), x.to(dtype)), dtype


def test_launchers_accept_strided_numbers_and_other_layouts() -> None:
    y, coef = feature_map((2, 6, 5, 7), torch.float32), coefficients((2, 6), torch.float32)
    strided = torch.stack([coef, coef], -1)[..., 0]
    assert not strided.is_contiguous()
    expected = cpu.apply(y, coef, "relu")
    assert torch.equal(cpu.apply(y.contiguous(), strided, "relu"), expected)
    assert torch.equal(cpu.apply(y, coef.double(), "relu"), expected)


def test_empty_maps_are_served() -> None:
    y, coef = torch.empty(0, 4, 3, 3), torch.empty(7, 0, 4)
    assert cpu.apply(y, coef, "relu").shape == y.shape
    assert cpu.moments(torch.empty(1, 4, 0, 3), None, "none").isnan().all()
    assert (
        cpu.apply_backward(
            torch.empty(1, 4, 0, 3), torch.empty(1, 4, 0, 3), torch.ones(7, 1, 4), "relu"
        )[1]
        .eq(0)
        .all()
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda y, c: cpu.apply(y, c[:6], "relu"), ValueError, r"coef must have shape \(7, 2, 5\)"),
        (lambda y, c: cpu.apply(y, c, "swish"), ValueError, "act must be one of"),
        (lambda y, c: cpu.apply(y.int(), c, "relu"), TypeError, "y must be float16"),
        (lambda y, c: cpu.apply(y[0], c, "relu"), ValueError, r"y must be \[N, C, H, W\]"),
        (
            lambda y, c: cpu.apply_backward(y[:1], y, c, "relu"),
            ValueError,
            "dv must have the shape",
        ),
        (lambda y, c: cpu.moments(y, c[:2, 0, :4], "relu"), ValueError, "pre must have shape"),
    ),
)
def test_launchers_name_the_bad_argument(
    call: Callable[[Tensor, Tensor], object], error: type[Exception], message: str
) -> None:
    y, coef = feature_map((2, 5, 4, 4), torch.float32), coefficients((2, 5), torch.float32)
    with pytest.raises(error, match=message):
        call(y, coef)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"y": 0}, "y is null"),
        ({"coef": 0}, "coef is null"),
        ({"v": 2}, "v must be aligned to 4 bytes"),
        ({"dtype": 4}, "dtype must be in"),
        ({"act": -1}, "act must be in"),
        ({"n": -1}, "n must be >= 0"),
        ({"s": 2**62}, "does not fit"),
        ({"threads": 0}, "threads must be >= 1"),
    ),
)
def test_bindings_name_the_bad_argument(change: dict[str, int], message: str) -> None:
    y, coef = torch.zeros(16), torch.zeros(7 * 4)
    call = dict(
        y=y.data_ptr(),
        coef=coef.data_ptr(),
        v=y.data_ptr(),
        dtype=0,
        act=0,
        n=1,
        s=4,
        c=4,
        threads=1,
    )
    _C.apply(**call)
    with pytest.raises(ValueError, match=message):
        _C.apply(**{**call, **change})


def test_unknown_instruction_set_raises() -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        _C.use_instruction_set("mmx")
