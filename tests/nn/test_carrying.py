"""What people do to modules: copy, save, reparametrise, prune, call with other weights, transform."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations, parametrize, prune

import fastfilm

ROWS = torch.eye(3)[:2]


def unet(seed: int = 0) -> fastfilm.FiLMedUNet:
    torch.manual_seed(seed)
    return fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3, dropout=0.1).eval()


def block(**options: Any) -> fastfilm.ConvNormFiLM2d:
    torch.manual_seed(0)
    return fastfilm.ConvNormFiLM2d(3, 4, norm="instance", activation="silu", **options)


def image() -> Tensor:
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def used() -> fastfilm.FiLMedUNet:
    """A network that has been trained a little and called without gradients: whatever it caches is cached."""
    net = unet().train()
    net(image(), ROWS).sum().backward()
    net.eval()
    with torch.no_grad():
        net(image(), net.modulate([1, 0, 0]))
    return net


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_used_network_is_copied_with_its_output(how: str) -> None:
    net = used()
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    expected = net(image(), ROWS)
    assert torch.equal(twin(image(), ROWS), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    assert torch.equal(net(image(), ROWS), expected)
    assert not torch.equal(twin(image(), ROWS), expected)


def test_state_dict_is_loaded_with_weights_only(tmp_path: Path) -> None:
    net = used()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    twin = unet(seed=1)
    assert not torch.equal(twin(image(), ROWS), net(image(), ROWS))
    twin.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.equal(twin(image(), ROWS), net(image(), ROWS))


def test_safetensors_round_trip(tmp_path: Path) -> None:
    """Shared hidden weights of the generators are what ``save_model`` is for."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    net = used()
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.save_file(net.state_dict(), str(tmp_path / "shared.safetensors"))
    safetensors.save_model(net, str(tmp_path / "net.safetensors"))
    twin = unet(seed=1)
    safetensors.load_model(twin, str(tmp_path / "net.safetensors"))
    torch.testing.assert_close(twin(image(), ROWS), net(image(), ROWS), rtol=1e-5, atol=1e-6)


def plain(module: fastfilm.ConvNormFiLM2d, weight: Tensor, x: Tensor) -> Tensor:
    """The block with another weight, in PyTorch."""
    u = nn.functional.instance_norm(nn.functional.conv2d(x, weight, module.bias, padding=1))
    return nn.functional.silu(u)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh() / 2


@pytest.mark.parametrize("how", ["parametrize", "weight_norm", "spectral_norm", "prune"])
def test_a_reparametrised_weight_is_used_and_trained(how: str) -> None:
    module = block()
    original = module.weight.detach().clone()
    if how == "parametrize":
        parametrize.register_parametrization(module, "weight", Halved())
    elif how == "weight_norm":
        parametrizations.weight_norm(module, "weight")
        with torch.no_grad():
            module.parametrizations.weight.original0.add_(1.0)
    elif how == "spectral_norm":
        parametrizations.spectral_norm(module, "weight")
        module.eval()
    else:
        prune.l1_unstructured(module, "weight", amount=0.5)
        assert (module.weight == 0).float().mean().item() == pytest.approx(0.5)
    leaves = [p for n, p in module.named_parameters() if "orig" in n]
    assert leaves and not torch.equal(module.weight, original)
    x = torch.randn(2, 3, 6, 5)
    ours, theirs = module(x), plain(module, module.weight, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(theirs)
    found = torch.autograd.grad(ours, leaves, cotangent, retain_graph=True)
    expected = torch.autograd.grad(theirs, leaves, cotangent)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    before = module(x).detach()
    with torch.no_grad():
        leaves[-1].add_(torch.randn_like(leaves[-1]))
        # nothing computed from the old weight is kept
        assert not torch.allclose(module(x), before, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_uses_the_weights_it_is_given(training: bool) -> None:
    net, other = unet().train(training), unet(seed=1).train(training)
    net.apply(lambda m: setattr(m, "dropout", 0.0) if hasattr(m, "dropout") else None)
    other.apply(lambda m: setattr(m, "dropout", 0.0) if hasattr(m, "dropout") else None)
    weights = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    for _ in range(2):
        found = functional_call(net, weights, (image(), ROWS))
        assert torch.equal(found, other(image(), ROWS))
    assert not torch.equal(net(image(), ROWS), found)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_vmap_over_metadata_is_a_loop_over_metadata(backend: str | None) -> None:
    net, rows, x = unet(), torch.rand(3, 1, 3), image()[:1]
    with fastfilm.backend(backend):
        found = vmap(lambda r: net(x, r))(rows)
        expected = torch.stack([net(x, r) for r in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_per_sample_gradients_are_those_of_a_loop(backend: str | None) -> None:
    module = block()
    weights = {k: v.detach() for k, v in module.named_parameters()}
    x = torch.randn(3, 3, 6, 5)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, weights, (x.unsqueeze(0),)).pow(3).sum()

    with fastfilm.backend(backend):
        found = vmap(grad(loss), in_dims=(None, 0))(weights, x)
        for i in range(3):
            module.zero_grad()
            loss(dict(module.named_parameters()), x[i]).backward()
            for name, p in module.named_parameters():
                if p.grad is not None:
                    torch.testing.assert_close(found[name][i], p.grad, rtol=1e-3, atol=1e-3)


def test_a_forced_backend_inside_a_transform_raises_one_clear_error() -> None:
    if fastfilm.ops.choice.BACKENDS["cpu"].unavailable() is not None:
        pytest.skip("the backend cpu is not available")
    module = block()
    for transform in (vmap, grad):
        with (
            fastfilm.backend("cpu"),
            pytest.raises(NotImplementedError, match=r"fastfilm.backend\('reference'\)"),
        ):
            transform(lambda x: module(x.reshape(1, 3, 6, 5)).sum())(torch.randn(1, 3, 6, 5))
