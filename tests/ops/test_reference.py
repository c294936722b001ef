"""The reference and the algebra: gradcheck, PyTorch's own layers, and coefficients against both."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfilm
from fastfilm.ops import reference, spec
from fastfilm.ops.spec import TailTensors
from tests.support.kind import kind_of

FLOAT64 = torch.float64


@pytest.mark.parametrize("activation", spec.ACTIVATIONS)
@pytest.mark.parametrize("order", spec.ORDERS)
def test_gradcheck_of_the_whole_op(order: str, activation: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=FLOAT64).requires_grad_()

    slope = (0.25,) if activation == "prelu" else ()

    def block(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with fastfilm.backend("reference"):
            v = fastfilm.conv_norm_film(
                x,
                weight,
                bias,
                padding=1,
                norm="instance",
                activation=activation,
                slope=torch.tensor(slope, dtype=FLOAT64) if slope else None,
                gamma=gamma,
                beta=beta,
                order=order,
            )
        assert isinstance(v, Tensor)
        return v

    inputs = (draw(2, 1, 3, 2), draw(2, 1, 3, 3), draw(2), draw(2, 2), draw(2, 2))
    assert torch.autograd.gradcheck(block, inputs)
    if activation in ("silu", "gelu_tanh") and order == "conv-norm-act-film":
        assert torch.autograd.gradgradcheck(block, inputs)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", spec.NORMS[1:])
def test_reference_equals_the_torch_modules(kind: str, training: bool, track: bool) -> None:
    torch.manual_seed(0)
    norm: nn.Module
    if kind == "batch":
        norm = nn.BatchNorm2d(6, track_running_stats=track)
    elif kind == "instance":
        norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=track)
    else:
        norm = nn.GroupNorm(3 if kind == "group" else 1, 6)
    conv = nn.Conv2d(4, 6, 3, padding=1)
    model = nn.Sequential(conv, norm, nn.LeakyReLU(0.2)).double().train(training)
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    nn.init.normal_(weight)
    nn.init.normal_(bias)
    x = torch.randn(3, 4, 7, 5, dtype=FLOAT64)
    running = {}
    if kind in ("batch", "instance") and track:
        mean, var = norm.running_mean, norm.running_var
        assert isinstance(mean, Tensor) and isinstance(var, Tensor)
        running = {"running_mean": mean.clone(), "running_var": var.clone()}
    uses_batch = training or (kind == "batch" and not track)
    with fastfilm.backend("reference"):
        ours = fastfilm.conv_norm_film(
            x,
            conv.weight,
            conv.bias,
            padding=1,
            norm=kind,
            norm_weight=weight,
            norm_bias=bias,
            num_groups=3 if kind == "group" else None,
            training=uses_batch,
            activation="leaky_relu",
            slope=0.2,
            **running,
        )
    expected = model(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for name, value in running.items():
        torch.testing.assert_close(value, getattr(norm, name), rtol=0, atol=1e-12)


CASES = [
    c
    for c in itertools.product(
        spec.ORDERS, spec.NORMS, spec.DROPOUT_POSITIONS, (True, False), (True, False)
    )
    if not (c[1] == "none" and c[2] == "norm")
]


@pytest.mark.parametrize(("order", "norm", "position", "training", "bias"), CASES)
def test_coefficients_collapse_the_block(
    order: str, norm: str, position: str, training: bool, bias: bool
) -> None:
    """conv output -> moments -> coefficients -> materialise equals the steps one by one, to 1e-12."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=FLOAT64).requires_grad_()

    y, conv_bias = draw(2, 6, 5, 4), draw(6) if bias else None
    weight, shift, gamma, beta = draw(6), draw(6), draw(2, 6), draw(2, 6)
    mask = (draw(2, 6).detach() > 0).double() / 0.6
    slope = draw(6).abs().detach().requires_grad_()
    mean, var = draw(6).detach(), draw(6).detach().abs() + 0.5
    running = norm in ("batch", "instance")

    def buffers() -> dict[str, Tensor]:
        return {"running_mean": mean.clone(), "running_var": var.clone()} if running else {}

    uses_input = norm in spec.SAMPLE_NORMS or (running and training)
    kind = kind_of(
        norm=norm,
        activation="prelu",
        order=order,
        dropout_position=position,
        groups=3 if norm == "group" else 1,
        count=20,
        training=training,
        uses_input=uses_input,
        update=running and training,
    )
    affine = (weight, shift) if norm != "none" else (None, None)
    rest = TailTensors(None, None, None, *affine, conv_bias, gamma, beta, mask, slope)
    first = buffers()
    expected = reference.block_tail(
        y if conv_bias is None else y + reference.spread(conv_bias, 4),
        kind,
        rest._replace(**first),
        0.1,
    )
    second = buffers()
    tensors = rest._replace(**second)
    if uses_input:
        pre = None
        if kind.activation_first:
            offset = torch.zeros(6, dtype=FLOAT64) if conv_bias is None else conv_bias
            pre = torch.stack([offset, slope])
        tensors = tensors._replace(stats=reference.moments(y, pre, kind.pre_activation))
    coef = reference.of_block(kind, tensors, y.device, 0.1)
    value = reference.materialise(y, coef, "prelu")
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    leaves = [t for t in (y, conv_bias, weight, shift, gamma, beta, slope) if t is not None]
    wave = torch.cos(torch.arange(value.numel(), dtype=FLOAT64)).reshape(value.shape)
    for ours, theirs in zip(
        torch.autograd.grad(
            (value * wave).sum(), leaves, materialize_grads=True, allow_unused=True
        ),
        torch.autograd.grad(
            (expected * wave).sum(), leaves, materialize_grads=True, allow_unused=True
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    for name, buffer in first.items():
        if training:
            torch.testing.assert_close(second[name], buffer, rtol=0, atol=1e-12)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "prelu": lambda x: F.prelu(x, x.new_tensor([0.1])),
    "elu": lambda x: F.elu(x, 0.1),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", spec.ACTIVATIONS[1:])
def test_activations_and_their_derivatives_equal_pytorchs(name: str) -> None:
    def values(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.randn(2, 3, 4, 4, dtype=FLOAT64, generator=torch.Generator().manual_seed(0)) * 3
        x[..., 0], x[..., 1] = 0.0, -0.0
        v = function(x.requires_grad_())
        (first,) = torch.autograd.grad(v.sum(), x, create_graph=True)
        second = torch.autograd.grad(first.sum(), x)[0] if first.requires_grad else first
        return [v, first, second]

    ours = values(lambda x: reference.activation(x, name, 0.1))
    theirs = values(ACTIVATIONS[name])
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a, b)
    if name not in ("relu", "leaky_relu", "prelu"):  # where they are 0, or not there
        torch.testing.assert_close(ours[2][..., 2:], theirs[2][..., 2:])


def test_instance_norm_of_one_sample_with_a_channels_last_gradient() -> None:
    x = torch.randn(1, 4, 6, 5, dtype=FLOAT64, requires_grad=True)
    grad = torch.randn(1, 4, 6, 5, dtype=FLOAT64)
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
    (expected,) = torch.autograd.grad((x - mean) * (var + 1e-5).rsqrt(), x, grad)
    v = reference.block_tail(x, kind_of(norm="instance", uses_input=True), TailTensors())
    (ours,) = torch.autograd.grad(v, x, grad.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
