"""Parameters and their gradients are contiguous, as optimisers and tools that view them as vectors expect."""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import (
    clip_grad_norm_,
    parameters_to_vector,
    parametrizations,
    prune,
    vector_to_parameters,
)

import fastfilm

from ..support.yardstick import relative_error


def blocks() -> nn.Module:
    """Blocks of 2D convolutions, narrow and wide, grouped and strided."""
    torch.manual_seed(0)
    kind = fastfilm.ConvNormFiLM2d
    return nn.Sequential(
        kind(3, 8), kind(8, 128, norm="instance"), kind(128, 16, stride=2), kind(16, 4, groups=2)
    )


def eager() -> nn.Module:
    """``blocks`` in PyTorch."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b, norm, more in (
        (3, 8, nn.BatchNorm2d, {}),
        (8, 128, nn.InstanceNorm2d, {}),
        (128, 16, nn.BatchNorm2d, {"stride": 2}),
        (16, 4, nn.BatchNorm2d, {"groups": 2}),
    ):
        affine = norm(b, affine=True)
        layers += [nn.Conv2d(a, b, 3, padding=1, **more), affine, nn.ReLU()]
    return nn.Sequential(*layers)


def converted() -> nn.Module:
    return fastfilm.convert(eager(), verbose=False)


def image(draw: int = 0) -> Tensor:
    return torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1 + 2 * draw))


def trained(model: nn.Module, x: Tensor | None = None, draw: int = 0) -> nn.Module:
    """``model`` with gradients."""
    out = model(image() if x is None else x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2 + 2 * draw)))
    return model


OURS = pytest.mark.parametrize("make", [blocks, converted])


@OURS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_and_gradients_are_contiguous(
    make: Callable[[], nn.Module], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    model, x = make(), image().contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        trained(model, x)
    for p in model.parameters():
        assert p.is_contiguous() and p.grad is not None and p.grad.is_contiguous()
        assert p.grad.view(-1).shape == p.data.view(-1).shape
    if layout == torch.contiguous_format:
        for g in torch.autograd.grad(model(x).sum(), list(model.parameters())):
            assert g.is_contiguous()


@OURS
def test_three_dimensional_and_transposed_weights_are_contiguous_too(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    if make is blocks:
        model: nn.Module = fastfilm.FiLMedUNet(3, 2, spatial_dims=3, depth=1, base_filters=4)
    else:
        first = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()
        second = nn.ConvTranspose3d(8, 4, 2, 2), nn.InstanceNorm3d(4), nn.ReLU()
        model = fastfilm.convert(nn.Sequential(*first, *second), verbose=False)
    trained(model, torch.randn(2, 3, 8, 6, 4))
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in model.parameters())  # type: ignore[union-attr]


@OURS
def test_weights_that_were_made_channels_last_stay_so_and_their_gradients_are_as_eagers(
    make: Callable[[], nn.Module],
) -> None:
    models = [m.to(memory_format=torch.channels_last) for m in (make(), eager())]
    x = image().contiguous(memory_format=torch.channels_last)
    found, expected = ([p.grad for p in trained(m, x).parameters()] for m in models)
    assert any(not p.is_contiguous() for p in models[0].parameters())
    for p, g in zip(models[0].parameters(), found, strict=True):
        assert g is not None and g.stride() == p.stride()
    for g, e in zip(found, expected, strict=True):
        assert g.stride() == e.stride()  # type: ignore[union-attr]


@OURS
def test_either_layout_of_the_weights_gives_numbers_as_exact_as_eagers(
    make: Callable[[], nn.Module],
) -> None:
    """The median over draws of each gradient's error: those of a few numbers are a matter of luck in one."""
    models = {"eager": eager(), "contiguous": make(), "channels-last": make()}
    if make is blocks:
        for name in ("contiguous", "channels-last"):
            for block, conv in zip(models[name], models["eager"][::3], strict=True):  # type: ignore[arg-type, index]
                block.load_state_dict(conv.state_dict(), strict=False)
    models["channels-last"].to(memory_format=torch.channels_last)
    exact = eager().double()

    def gradients(model: nn.Module, x: Tensor, draw: int) -> list[Tensor]:
        model.zero_grad()
        return [p.grad for p in trained(model, x, draw).parameters()]  # type: ignore[misc]

    errors: dict[str, list[list[float]]] = {name: [] for name in models}
    for draw in range(40):
        truth = gradients(exact, image(draw).double(), draw)
        # zero but for rounding: those of biases in front of a norm
        told = [i for i, t in enumerate(truth) if t.abs().max() > 1e-6]
        for name, model in models.items():
            found = gradients(model, image(draw), draw)
            errors[name].append([relative_error(found[i], truth[i]) for i in told])
    medians = {
        name: [statistics.median(e) for e in zip(*each, strict=True)]
        for name, each in errors.items()
    }
    for name in ("contiguous", "channels-last"):
        for mine, theirs in zip(medians[name], medians["eager"], strict=True):
            assert mine <= 1.5 * theirs


def _lbfgs(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(image()).square().mean()
        loss.backward()
        return loss

    first = closure().item()
    optimizer.step(closure)  # type: ignore[arg-type]
    assert closure().item() != first


def _vector(model: nn.Module) -> None:
    before = model(image())
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(torch.zeros_like(vector), model.parameters())
    vector_to_parameters(vector, model.parameters())
    assert torch.equal(model.train()(image()), before)


def _muon(model: nn.Module) -> None:
    for p in model.parameters():
        g = p.grad
        assert g is not None
        p.data.view(-1).add_(g.view(len(g), -1).view(-1), alpha=-0.1)


def _flat(model: nn.Module) -> None:
    """Gradients and parameters as slices of one buffer, as flat optimisers and buckets hold them."""
    parameters = list(model.parameters())
    grads = torch.cat([p.grad.view(-1) for p in parameters])  # type: ignore[union-attr]
    flat = torch.cat([p.data.view(-1) for p in parameters])
    start = 0
    for p in parameters:
        part = slice(start, start + p.numel())
        p.data, p.grad = flat[part].view_as(p), grads[part].view_as(p)
        start += p.numel()
    grads.zero_()
    trained(model)
    assert grads.abs().max() > 0


def _pruned(model: nn.Module) -> None:
    weights = [(m, "weight") for m in model.modules() if _convolves(m)]
    prune.l1_unstructured(*weights[0], amount=0.5)
    prune.random_unstructured(*weights[1], amount=0.5)
    prune.ln_structured(*weights[2], amount=0.5, n=2, dim=0)
    prune.remove(*weights[0])
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=0.2)
    trained(model)


def _convolves(m: nn.Module) -> bool:
    return isinstance(m, (nn.Conv2d, fastfilm.ConvNormFiLM2d))


def _normalised(model: nn.Module) -> None:
    layers = [m for m in model.modules() if _convolves(m)]
    parametrizations.orthogonal(layers[0], "weight")
    parametrizations.spectral_norm(layers[1], "weight")
    parametrizations.weight_norm(layers[2], "weight")
    nn.utils.spectral_norm(layers[3], "weight")
    trained(model)


def _numpy(model: nn.Module) -> None:
    for p in model.parameters():
        assert p.detach().numpy().flags.c_contiguous
        assert p.detach().numpy().reshape(-1).base is not None


def _saved(model: nn.Module) -> None:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for name, value in model.state_dict().items():
        assert state[name].stride() == value.stride() and torch.equal(state[name], value)


def _stepped(model: nn.Module) -> None:
    clip_grad_norm_(model.parameters(), 0.1)
    average = copy.deepcopy(model)
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        kind(model.parameters(), lr=1e-3).step()
    for a, p in zip(average.parameters(), model.parameters(), strict=True):
        a.data.view(-1).lerp_(p.data.view(-1), 0.1)


TOOLS: dict[str, Callable[[nn.Module], Any]] = {
    "LBFGS": _lbfgs,
    "vector": _vector,
    "flat": _flat,
    "Muon": _muon,
    "prune": _pruned,
    "norms of weights": _normalised,
    "numpy": _numpy,
    "saved": _saved,
    "stepped": _stepped,
}


@OURS
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_that_reads_parameters_as_vectors_works(
    make: Callable[[], nn.Module], tool: str
) -> None:
    TOOLS[tool](trained(make()))


@OURS
def test_safetensors_saves_a_state_dict(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, path = make(), str(tmp_path / "model.safetensors")
    safetensors.save_file(model.state_dict(), path)
    for name, value in safetensors.load_file(path).items():
        assert torch.equal(model.state_dict()[name], value)


def test_ddp_keeps_gradients_as_views_of_its_buckets(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = blocks()
        ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        trained(ddp)
        expected = [p.grad for p in trained(blocks()).parameters()]
        for p, e in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None and p.grad.is_contiguous()
            torch.testing.assert_close(p.grad, e)
    finally:
        torch.distributed.destroy_process_group()
