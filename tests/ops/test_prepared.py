"""Weights that inference casts and packs once: the same numbers, made again when a value changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.ops.vendor import convolutions as vendor

from ..support.yardstick import relative_error

pytest.importorskip("fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built")

ONEDNN = (
    hasattr(torch.ops.mkldnn, "_convolution_pointwise") and torch.backends.mkldnn.is_available()
)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that were packed, in order."""
    shapes: list[tuple[int, ...]] = []
    if not ONEDNN:
        pytest.skip("this PyTorch packs no weights")
    reorder = torch.ops.mkldnn._reorder_convolution_weight

    def noted(weight: Tensor, *rest: object) -> Tensor:
        shapes.append(tuple(weight.shape))
        packed: Tensor = reorder(weight, *rest)
        return packed

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", noted)
    return shapes


@pytest.fixture
def made(packed: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """``packed``, where bfloat16 weights are."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this PyTorch packs no bfloat16 weights on this CPU")
    return packed


def block(dims: int = 2) -> nn.Module:
    torch.manual_seed(0)
    cls = fastfilm.ConvNormFiLM2d if dims == 2 else fastfilm.ConvNormFiLM3d
    return cls(24, 32, norm="batch").eval()


def image(dims: int = 2) -> Tensor:
    x = torch.randn(2, 24, *(40, 36, 20)[:dims], generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)


def autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out: Tensor = model(x)
    return out


def narrow(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x.bfloat16())
    return out


CALLS = pytest.mark.parametrize("call", [autocast, narrow])


def prepare(call: Callable[..., Tensor], model: nn.Module) -> nn.Module:
    return model.bfloat16() if call is narrow else model


@CALLS
@pytest.mark.parametrize("dims", [2, 3])
def test_the_numbers_are_those_of_the_weight_itself(
    call: Callable[..., Tensor],
    dims: int,
    made: list[tuple[int, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = prepare(call, block(dims)), image(dims)
    found = [call(model, x) for _ in range(3)]
    assert made == [(32, 24, *(3,) * dims)]
    monkeypatch.setattr(vendor, "_packs", lambda *given: False)
    for out in found:
        assert torch.equal(out, call(copy.deepcopy(model), x))


@CALLS
def test_a_weight_written_behind_pytorchs_back_is_noticed(
    call: Callable[..., Tensor], made: list[tuple[int, ...]]
) -> None:
    model, x = prepare(call, block()), image()
    before = call(model, x)
    version = model.weight._version
    model.weight.data[3, 5, 1, 1] += 1
    assert model.weight._version == version
    after = call(model, x)
    assert len(made) == 2
    with fastfilm.backend("reference"):
        truth = call(copy.deepcopy(model), x)
    assert relative_error(after, truth.double()) < 1e-2 < relative_error(before, truth.double())


@CALLS
def test_other_shapes_types_and_copies_are_made_anew(
    call: Callable[..., Tensor], made: list[tuple[int, ...]]
) -> None:
    model, x = prepare(call, block()), image()
    call(model, x)
    call(model, x[..., :20])
    call(copy.deepcopy(model), x)
    assert len(made) == 3


@CALLS
@pytest.mark.parametrize("dims", [2, 3])
def test_inference_in_bfloat16_runs_on_every_cpu(call: Callable[..., Tensor], dims: int) -> None:
    model, x = prepare(call, block(dims)), image(dims)
    with fastfilm.backend("reference"):
        truth = call(copy.deepcopy(model), x)
    assert relative_error(call(model, x), truth.double()) < 1e-2


def test_winograds_form_keeps_what_it_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastfilm.ops.launchers.cpu import _C, convolution, rules

    shapes = (40, 36), (32, 32, 3, 3)
    if not rules.by_winograd(torch.float32, 2, *shapes, _C.instruction_set()):
        pytest.skip("this processor has no AVX-512")
    made: list[tuple[int, ...]] = []
    real = convolution._transformed

    def noted(kernels: object, weight: Tensor) -> Tensor:
        made.append(tuple(weight.shape))
        return real(kernels, weight)  # type: ignore[arg-type]

    monkeypatch.setattr(convolution, "_transformed", noted)
    torch.manual_seed(0)
    model = fastfilm.ConvNormFiLM2d(32, 32, norm="batch").eval()
    x = torch.randn(2, 32, 40, 36).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        first, again, smaller = model(x), model(x), model(x[..., :20])
        assert made == [(32, 32, 3, 3)]
        assert torch.equal(first, again) and torch.equal(first, copy.deepcopy(model)(x))
        model.weight.data *= 2
        changed = model(x)
        assert len(made) == 3
        with fastfilm.backend("reference"):
            truth = model(x)
    assert relative_error(changed, truth.double()) < 1e-5 < relative_error(first, truth.double())
    assert smaller.shape[-1] == 20


def test_gradients_and_other_types_use_the_weight_itself(made: list[tuple[int, ...]]) -> None:
    model, x = block(), image()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x).float().sum().backward()
    assert model.weight.grad is not None and model.weight.grad.any()
    with torch.no_grad():
        model.double()(x.double())
    assert not made


@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("dims", [2, 3])
def test_inference_packs_float32_weights_of_the_vendors_convolutions(
    dims: int, norm: str, packed: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    cls = fastfilm.ConvNormFiLM2d if dims == 2 else fastfilm.ConvNormFiLM3d
    # no kernel of the extension takes a dilation
    model, x = cls(24, 32, norm=norm, dilation=2, padding=2).eval(), image(dims)
    with torch.no_grad():
        first, again = model(x), model(x)
        assert packed == [(32, 24, *(3,) * dims)]
        model.weight.data[3, 5, 1, 1] += 1
        changed = model(x)
        assert len(packed) == 2
        with fastfilm.backend("reference"):
            truth = copy.deepcopy(model).double()(x.double())
    assert torch.equal(first, again)
    assert relative_error(changed, truth) < 2e-6 < relative_error(first, truth)
