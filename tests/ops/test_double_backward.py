"""Second derivatives: ``create_graph=True`` through every op, against finite differences and the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fastfilm
from fastfilm.ops import choice, maps, spec

BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            choice.BACKENDS[name].unavailable() is not None, reason="not available"
        ),
    )
    for name in ("cpu", "reference")
]
both = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(3)


def check(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


CASES: list[dict[str, Any]] = [
    {"norm": norm, "order": order, "training": True, "num_groups": 2 if norm == "group" else None}
    for norm in (None, "batch", "instance", "group", "layer")
    for order in spec.ORDERS
]


@both
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['norm']}-{c['order']}")
def test_second_derivative_of_a_block_is_that_of_finite_differences(
    case: dict[str, Any], backend: str
) -> None:
    x, weight, bias = draw(2, 3, 5, 4), draw(4, 3, 3, 3), draw(4)
    vectors = [draw(4), draw(4)] if case["norm"] else []
    film = [draw(2, 4), draw(2, 4), draw(4)]

    def run(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        affine = dict(zip(("norm_weight", "norm_bias"), rest[:-3], strict=False))
        gamma, beta, slope = rest[-3:]
        with fastfilm.backend(backend):
            v = fastfilm.conv_norm_film(
                x,
                weight,
                bias,
                padding=1,
                activation="prelu" if case["norm"] == "batch" else "gelu",
                slope=slope if case["norm"] == "batch" else None,
                gamma=gamma,
                beta=beta,
                **affine,
                **case,
            )
        assert isinstance(v, Tensor)
        return v

    check(run, (x, weight, bias, *vectors, *film))


@both
def test_second_derivative_through_pending_maps_pooled_resized_and_joined(backend: str) -> None:
    x, first, second = draw(1, 2, 6, 4), draw(3, 2, 3, 3), draw(2, 6, 3, 3)
    gamma, beta = draw(1, 3), draw(1, 3)

    def run(x: Tensor, first: Tensor, second: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        options: dict[str, Any] = {"padding": 1, "norm": "instance", "activation": "silu"}
        with fastfilm.backend(backend):
            skip: Any = fastfilm.conv_norm_film(
                x, first, gamma=gamma, beta=beta, deferred=True, **options
            )
            down = maps.max_pool(skip, 2)
            up = maps.interpolate(down, size=(6, 4), mode="bilinear", align_corners=True)
            v = fastfilm.conv_norm_film(maps.join([up, skip]), second, **options)
        assert isinstance(v, Tensor)
        return v

    check(run, (x, first, second, gamma, beta))


@both
@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 2}, {"transposed": True}], ids=str)
def test_second_derivative_of_other_convolutions(options: dict[str, Any], backend: str) -> None:
    x, weight = draw(1, 4, 4, 3), draw(4, 4 // options.get("groups", 1), 3, 3)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        with fastfilm.backend(backend):
            v = fastfilm.conv_norm_film(x, weight, padding=1, activation="elu", **options)
        assert isinstance(v, Tensor)
        return v

    check(run, (x, weight))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_a_bias_without_a_norm_beside_a_learned_gamma_or_mask(backend: str) -> None:
    """The gradient at such a bias comes with the coefficients', of both derivatives."""
    generator = torch.Generator().manual_seed(3)
    x, weight, bias, mask, gamma = (
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((2, 3, 5, 5), (4, 3, 1, 1), (4,), (2, 4), (4,))
    )

    def first(name: str) -> Tensor:
        leaves = bias.clone().requires_grad_(), mask.clone().requires_grad_()
        with fastfilm.backend(name):
            v = fastfilm.conv_norm_film(
                x, weight, leaves[0], dropout_mask=leaves[1], activation="relu"
            )
        return torch.autograd.grad(v.square().sum(), leaves)[0]

    def second(name: str) -> Tensor:
        at, g = bias.clone().requires_grad_(), gamma.clone().requires_grad_()
        with fastfilm.backend(name):
            v = fastfilm.conv_norm_film(x, weight, at, gamma=g, activation="silu", deferred=True)
            behind = torch.ones(2, 4, 1, 1, dtype=torch.float64)
            v = fastfilm.conv_norm_film(v, behind, activation="silu")
            (dg,) = torch.autograd.grad(v.square().sum(), g, create_graph=True)
        return torch.autograd.grad(dg.square().sum(), at)[0]

    for derivative in (first, second):
        torch.testing.assert_close(derivative(backend), derivative("reference"))


@both
def test_second_derivative_of_materialise_and_moments(backend: str) -> None:
    y, coef, pre = draw(2, 3, 4, 3), draw(7, 2, 3), draw(2, 3)
    with torch.no_grad():
        coef[4:6].zero_()
    pivotless = coef.detach().clone()

    def written(y: Tensor, rows: Tensor) -> Tensor:
        full = torch.cat([rows[:4], pivotless[4:6], rows[4:]])
        with fastfilm.backend(backend):
            return fastfilm.materialise(y, full, "elu")

    def measured(y: Tensor, slope: Tensor) -> Tensor:
        full = torch.stack([pre[0].detach(), slope])
        with fastfilm.backend(backend):
            return fastfilm.moments(y, full, "leaky_relu")

    check(written, (y, draw(5, 2, 3)))
    check(measured, (y, draw(3)))


@pytest.mark.parametrize("backend", BACKENDS[:1])
def test_third_derivative_agrees_with_finite_differences_of_the_second(backend: str) -> None:
    """Of the kernels only: the third derivative of PyTorch's own norms is wrong."""
    x, weight = draw(1, 2, 3, 3), draw(2, 2, 3, 3)

    def second(x: Tensor, weight: Tensor) -> Tensor:
        with fastfilm.backend(backend):
            v = fastfilm.conv_norm_film(x, weight, padding=1, norm="instance", activation="silu")
        (first,) = torch.autograd.grad(v.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight, create_graph=True)[0]

    assert gradcheck(second, (x, weight), fast_mode=True)


@both
def test_gradient_penalty_of_a_network_has_the_reference_s_gradient(backend: str) -> None:
    net = fastfilm.FiLMedUNet(1, 1, base_filters=4, depth=2, metadata_size=2, activation="silu")
    net = net.double()
    image, metadata = draw(2, 1, 8, 8), torch.eye(2, dtype=torch.float64)

    def penalty(name: str) -> list[Tensor]:
        with fastfilm.backend(name):
            out = net(image, metadata)
        (grad,) = torch.autograd.grad(out.sum() + out.square().sum(), image, create_graph=True)
        return list(torch.autograd.grad(grad.square().mean(), list(net.parameters())))

    for ours, theirs in zip(penalty(backend), penalty("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@both
def test_create_graph_does_not_change_the_first_derivative(backend: str) -> None:
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="batch", order="conv-act-norm-film").double()
    x, gamma = draw(2, 3, 6, 5), draw(2, 4)
    leaves = (x, gamma, *block.parameters())

    def grads(create_graph: bool) -> tuple[Tensor, ...]:
        with fastfilm.backend(backend):
            return torch.autograd.grad(
                block(x, gamma).square().sum(), leaves, create_graph=create_graph
            )

    for ours, plain in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)


def test_torch_func_transforms_differentiate_twice_and_map_over_samples() -> None:
    x, weight, vector = draw(2, 2, 4, 4), draw(3, 2, 3, 3).detach(), draw(2, 2, 4, 4).detach()

    def loss(x: Tensor, weight: Tensor = weight) -> Tensor:
        v = fastfilm.conv_norm_film(
            x, weight, padding=1, norm="instance", order="conv-norm-act-film", activation="silu"
        )
        assert isinstance(v, Tensor)
        return v.pow(3).sum()

    (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (product,) = torch.autograd.grad(gradient, x, vector)
    found = torch.func.vjp(torch.func.grad(loss), x.detach())[1](vector)[0]
    torch.testing.assert_close(found, product, rtol=1e-9, atol=1e-10)

    each = torch.func.vmap(torch.func.grad(lambda w, x: loss(x[None], w)), (None, 0))
    per_sample = each(weight, x.detach())
    hidden = weight.clone().requires_grad_()
    for i in range(2):
        (alone,) = torch.autograd.grad(loss(x[i : i + 1].detach(), hidden), hidden)
        torch.testing.assert_close(per_sample[i], alone, rtol=1e-9, atol=1e-10)


class _Convolved(TorchDispatchMode):
    """The types in which PyTorch convolves."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
        if func in names:
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    choice.BACKENDS["cpu"].unavailable() is not None, reason="the extension is not built"
)
def test_second_derivatives_of_16_bit_convolutions_are_float32_on_a_cpu() -> None:
    """They convolve maps with maps, forms that no rule about PyTorch's faults looks at."""
    x, w = draw(2, 4, 3, 6, 6).bfloat16(), draw(4, 4, 3, 3, 3).bfloat16()
    with fastfilm.backend("cpu"):
        y = fastfilm.conv_norm_film(x, w, padding=1, norm="instance")
        first = torch.autograd.grad(y, (x, w), torch.randn_like(y), create_graph=True)
        with _Convolved() as convolved:
            second = torch.autograd.grad([g.square().sum() for g in first], (x, w))
    assert convolved.types == {torch.float32}
    assert all(g.isfinite().all() and g.dtype == torch.bfloat16 for g in second)
