"""Residual addition: both maps read once as they are, their sum activated and written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastfilm
from fastfilm.ops import add_act, choice, launchers, maps, reference, spec
from fastfilm.ops.maps import DeferredMap, residual
from fastfilm.ops.maps.residual import Sum
from tests.support import plans
from tests.support.case import SLOW
from tests.support.yardstick import (
    assert_as_good_as_eager,
    assert_typically_as_good_as_eager,
    relative_error,
)

AVAILABLE = [b.name for b in choice.BACKENDS.values() if b.unavailable() is None]
needs_cpu = pytest.mark.skipif("cpu" not in AVAILABLE, reason="the C++ extension was not built")
BACKENDS = plans.backends()

FORMS = [
    # activation of the first map, activation of the sum
    *(("none", outer) for outer in spec.ACTIVATIONS),
    *((inner, "none") for inner in spec.ACTIVATIONS[1:]),
]


def both(
    backend: str | None,
    inner: str,
    outer: str,
    pending: tuple[bool, bool],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    storage: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    """Value and gradients of one sum; eager's, step by step, without a backend."""
    generator = torch.Generator().manual_seed(seed)
    n, c = shape[:2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    leaves: dict[str, Any] = {k: draw(*shape).to(storage).to(dtype) for k in ("y", "other")}
    leaves["coef"], leaves["other_coef"] = (draw(7, n, c).to(wide) for _ in range(2))
    leaves["slope"] = draw(c).abs().to(wide) if outer in spec.DEFAULT_SLOPE else None
    weights = draw(*shape).to(dtype)
    for name, there in zip(("coef", "other_coef"), pending, strict=True):
        leaves[name] = leaves[name] if there else None
    leaves = {k: t.requires_grad_() for k, t in leaves.items() if t is not None}
    y, other, coef = leaves["y"], leaves["other"], leaves.get("coef")
    other_coef, slope = leaves.get("other_coef"), leaves.get("slope")
    if backend is not None:
        plan = spec.Plan(backend, "composed")
        x = DeferredMap(y, coef, inner, plan)
        skip = DeferredMap(other, other_coef, "none", plan)
        v = add_act(x, skip, outer, slope)
    else:
        first = y if coef is None else reference.materialise(y, coef, inner)
        second = other if other_coef is None else reference.materialise(other, other_coef, "none")
        parameter = None if slope is None else reference.spread(slope.to(dtype), y.dim())
        v = reference.activation(first + second, outer, parameter)
    grads = torch.autograd.grad((v * weights).sum(), list(leaves.values()))
    return {"v": v.detach()} | {f"d{k}": g for k, g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inner", "outer"), FORMS)
def test_value_and_gradients_are_as_good_as_eagers(
    inner: str, outer: str, dtype: torch.dtype, backend: str
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    shapes = ((2, 5, 3, 4, 3), (1, 19, 5, 7)) if backend == "cpu" else ((2, 5, 5, 7),)
    for shape, pending in product(shapes, product((True, False), repeat=2)):
        if inner != "none" and not pending[0]:
            continue

        def run(who: str | None, kind: torch.dtype, seed: int) -> dict[str, Tensor]:
            return both(who, inner, outer, pending, kind, shape, dtype, seed)  # noqa: B023

        exact = run(None, torch.float64, 0)
        if dtype == torch.float64:
            for name, value in run(backend, dtype, 0).items():
                torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11)
            continue
        eager = [(run(None, dtype, s), run(None, torch.float64, s)) for s in range(4)]
        assert_as_good_as_eager(run(backend, dtype, 0), exact, eager, dtype)


@needs_cpu
@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (1, 64, 33, 31), (3, 130, 4, 4, 4)])
def test_every_instruction_set_and_number_of_threads_gives_the_same_sum(
    shape: tuple[int, ...],
) -> None:
    from fastfilm.ops.launchers.cpu import _C

    exact = both(None, "none", "silu", (True, True), torch.float64, shape, torch.float32, 0)
    threads, before = torch.get_num_threads(), _C.instruction_set()
    try:
        for name in _C.instruction_sets():
            _C.use_instruction_set(name)
            runs = []
            for count in (1, 3):
                torch.set_num_threads(count)
                runs.append(
                    both(
                        "cpu", "none", "silu", (True, True), torch.float32, shape, torch.float32, 0
                    )
                )
            for key, value in runs[0].items():
                assert torch.equal(value, runs[1][key]), (name, key)
                assert relative_error(value, exact[key]) < 2e-6, (name, key)
    finally:
        torch.set_num_threads(threads)
        _C.use_instruction_set(before)


class Residual(nn.Module):
    """v = activation(block(block(x)) + skip), with the skip as it is or behind a 1x1 block."""

    def __init__(self, norm: str, order: str, inner: str | None, projected: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"norm": norm, "order": order}
        options |= {"num_groups": 2} if norm == "group" else {}
        ci = 3 if projected else 4
        self.first = fastfilm.ConvNormFiLM2d(ci, 4, activation="silu", **options)
        self.second = fastfilm.ConvNormFiLM2d(4, 4, activation=inner, **options)
        self.skip = (
            fastfilm.ConvNormFiLM2d(ci, 4, 1, activation=None, **options) if projected else None
        )
        self.outer = None if inner else nn.LeakyReLU(0.2)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor, lazy: bool | str) -> Any:
        hidden = self.first(x, gamma, deferred=lazy)
        out = self.second(hidden, gamma, beta, deferred=lazy)
        skip = x if self.skip is None else self.skip(x, gamma, beta, deferred=lazy)
        total = out + skip
        return total if self.outer is None else self.outer(total)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", spec.ORDERS)
@pytest.mark.parametrize("norm", spec.NORMS)
def test_gradients_of_residual_blocks_are_the_references(
    norm: str, order: str, backend: str
) -> None:
    forms = tuple(product((None, "relu"), (False, True)))
    # interpreted slowly: one form of block, and not with every order and norm
    mine = (spec.NORMS.index(norm) + spec.ORDERS.index(order)) % 4
    if backend == "triton" and spec.NORMS.index(norm) % 3 != spec.ORDERS.index(order) and not SLOW:
        pytest.skip("interpreted slowly; set FASTFILM_SLOW_TESTS=1 to run it")
    for inner, projected in forms if backend == "cpu" else forms[mine : mine + 1]:

        def run(who: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
            torch.manual_seed(seed)
            model = Residual(norm, order, inner, projected).to(dtype)  # noqa: B023
            x = torch.randn(2, 3 if projected else 4, 6, 5)  # noqa: B023
            film = torch.randn(2, 4), torch.randn(2, 4)
            leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, *film)]
            with fastfilm.backend(who):
                v = maps.plain(model(*leaves, lazy=who == backend))
            v.square().sum().backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            return found | {"v": v.detach()} | {f"d{i}": t.grad for i, t in enumerate(leaves)}

        exact = run("reference", torch.float64, 0)
        # a bias in front of a norm has no gradient but rounding
        exact = {k: t for k, t in exact.items() if t.norm() > 1e-8}
        ours = {k: t for k, t in run(backend, torch.float32, 0).items() if k in exact}

        def drawn(who: str, draws: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
            pairs = [
                (run(who, torch.float32, s), run("reference", torch.float64, s))
                for s in range(draws)
            ]
            return [({k: v[k] for k in exact}, x) for v, x in pairs]  # noqa: B023

        try:
            assert_as_good_as_eager(ours, exact, drawn("reference", 4), torch.float32)
        except AssertionError:  # an unlucky sum of a few numbers: many draws of both
            many = drawn(backend, 44), drawn("reference", 44)
            assert_typically_as_good_as_eager(*many, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pending", [(True, True), (False, True), (True, False)])
def test_second_derivative(pending: tuple[bool, bool], backend: str) -> None:
    torch.manual_seed(0)
    dtype = torch.float64 if backend == "cpu" else torch.float32
    y, other = (torch.randn(2, 2, 3, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    coefs = [torch.randn(7, 2, 2, dtype=dtype, requires_grad=True) for _ in range(2)]
    slope = torch.rand(2, dtype=dtype, requires_grad=True)
    plan = spec.Plan(backend, "composed")

    def run(y: Tensor, other: Tensor, slope: Tensor, *coefs: Tensor) -> Tensor:
        rest = list(coefs)
        first, second = (rest.pop(0) if there else None for there in pending)
        return add_act(
            DeferredMap(y, first, "none", plan),
            DeferredMap(other, second, "none", plan),
            "elu",
            slope,
        )

    inputs = (y, other, slope, *(c for c, there in zip(coefs, pending, strict=True) if there))
    if backend == "cpu":
        assert gradcheck(run, inputs, fast_mode=True)
        assert gradgradcheck(run, inputs, fast_mode=True)
        return
    with torch.no_grad():
        expected = None
    for who in (backend, "cpu"):
        if "cpu" not in AVAILABLE:
            pytest.skip("the C++ extension was not built")
        plan = spec.Plan(who, "composed")
        grads = torch.autograd.grad(run(*inputs).pow(2).sum(), inputs, create_graph=True)
        second_ = torch.autograd.grad(sum(g.pow(2).sum() for g in grads), inputs)
        if expected is not None:
            for a, b in zip(second_, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        expected = second_


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Launches of the passes over maps."""
    if "cpu" not in AVAILABLE:
        pytest.skip("the C++ extension was not built")
    kernels, made = launchers.of("cpu"), []
    for name in ("apply", "residual", "residual_backward", "apply_backward"):
        real = getattr(kernels, name)

        def spy(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            made.append(name)
            return real(*args, **options)

        monkeypatch.setattr(kernels, name, spy)
    yield made


ACTIVATIONS: list[Callable[[Any], Any]] = [
    nn.ReLU(inplace=True),
    torch.relu,
    nn.LeakyReLU(0.3),
    nn.ELU(),
    nn.SiLU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.PReLU(4),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", str(a)))
@pytest.mark.parametrize("turned", [False, True])
def test_a_sum_and_its_activation_are_one_pass_each_way(
    activation: Callable[[Any], Any], turned: bool, calls: list[str]
) -> None:
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="instance", activation=None)
    x, skip = torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5, requires_grad=True)
    map_ = block(x, deferred=True)
    total: Any = skip + map_ if turned else map_ + skip
    assert isinstance(total, Sum) and total.shape == (2, 4, 6, 5)
    v = activation(total)
    assert calls == ["residual"] and isinstance(v, Tensor)
    v.sum().backward()
    assert calls == ["residual", "residual_backward"] and skip.grad is not None
    torch.testing.assert_close(v, activation(block(x) + skip), rtol=1e-5, atol=1e-6)


def test_a_sum_is_a_tensor_to_everybody_else(calls: list[str]) -> None:
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="instance", activation=None)
    x, skip = torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5)
    total = block(x, deferred=True) + skip
    expected = block(x) + skip
    for function in (
        torch.sigmoid,
        lambda t: t * 2,
        lambda t: t.mean(1),
        lambda t: F.max_pool2d(t, 2),
    ):
        torch.testing.assert_close(function(total), function(expected), rtol=1e-5, atol=1e-6)
    assert calls.count("residual") == 1, "written once"
    following = fastfilm.ConvNormFiLM2d(4, 2, norm="instance")
    torch.testing.assert_close(following(total), following(expected), rtol=1e-4, atol=1e-5)
    joined = maps.join([total, block(x, deferred=True)])
    torch.testing.assert_close(maps.plain(joined), torch.cat([expected, block(x)], 1))
    assert "Sum" in repr(total)
    # nothing to gain, or not the same shape: tensors
    assert isinstance(block(x, deferred=True) + 1, Tensor)
    assert isinstance(block(x, deferred=True) + skip[:, :, :1], Tensor)


def test_inference_reads_the_raw_map_where_it_is_asked_to(calls: list[str]) -> None:
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, activation=None).eval()
    x, skip = torch.randn(2, 3, 6, 5), torch.randn(2, 4, 6, 5)
    with torch.no_grad():
        v = torch.relu(block(x, deferred="always") + skip)
        assert calls == ["residual"]
        torch.testing.assert_close(v, torch.relu(block(x) + skip), rtol=1e-5, atol=1e-6)


@needs_cpu
def test_both_maps_with_activations_and_views_of_maps_are_written_first() -> None:
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="instance", activation="silu")
    x = torch.randn(2, 3, 6, 6)
    exact = block(x)
    for residual_ in (block(x, deferred=True), exact):
        v = add_act(block(x, deferred=True), residual_, "leaky_relu", 0.2)
        torch.testing.assert_close(v, F.leaky_relu(2 * exact, 0.2), rtol=1e-5, atol=1e-6)
    pooled = F.avg_pool2d(block(x, deferred=True), 2)
    assert isinstance(pooled, DeferredMap)
    v = add_act(pooled, pooled, "relu")
    torch.testing.assert_close(v, torch.relu(2 * F.avg_pool2d(exact, 2)), rtol=1e-5, atol=1e-6)


@needs_cpu
def test_mixed_types_are_added_as_pytorch_adds_them() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
    assert torch.equal(add_act(a, b, "relu"), torch.relu(a + b))
    assert add_act(a[:0], a[:0]).shape == (0, 3, 4, 4)


@needs_cpu
def test_nan_and_infinity_go_where_pytorch_sends_them() -> None:
    y, other = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 5)
    y[0, 0, 0, 0], y[0, 1, 1, 1], other[0, 2, 2, 2] = (float(t) for t in ("nan", "inf", "-inf"))
    for outer in set(spec.ACTIVATIONS) - {"gelu"}:  # PyTorch's gelu of infinity is NaN on a CPU
        expected = reference.activation(y + other, outer, 0.5)
        found = add_act(y, other, outer, 0.5 if outer in spec.DEFAULT_SLOPE else None)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be"),
        ({"residual": 1.0}, TypeError, "residual must be"),
        ({"residual": torch.zeros(2, 3, 4, 5)}, ValueError, "residual must have x's shape"),
        ({"residual": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "residual is on meta"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
        ({"slope": 0.1}, ValueError, "slope has no meaning"),
        ({"activation": "prelu", "slope": torch.zeros(2)}, ValueError, "slope must be"),
    ],
)
def test_bad_input_names_the_argument(change: Any, error: type[Exception], message: str) -> None:
    given = {"x": torch.zeros(2, 3, 4, 4), "residual": torch.zeros(2, 3, 4, 4)} | change
    with pytest.raises(error, match=message):
        residual.add_act(**given)


@needs_cpu
def test_it_compiles_to_one_operator_and_exports_to_pytorchs() -> None:
    net = Residual("instance", spec.ORDERS[0], None, True)
    x, film = torch.randn(2, 3, 6, 5), torch.randn(2, 4)
    expected = net(x, film, film, False)

    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, film: Tensor) -> Tensor:
            hidden = self.net.first(x, film, deferred=True)
            out = self.net.second(hidden, film, film, deferred=True)
            return add_act(out, self.net.skip(x, film, film, deferred=True), "leaky_relu", 0.2)

    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = torch.compile(Lazy(), backend=keep, fullgraph=True)(x, film)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert [str(n.target) for n in graphs[0].graph.nodes].count("fastfilm.residual") == 1
    program = torch.export.export(Lazy(), (x, film))
    assert not any("fastfilm" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, film), expected, rtol=1e-4, atol=1e-5)
