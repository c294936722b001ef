"""Networks on the CUDA kernels, on the host: what goes through memory, and how good gradients are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from benchmarks.counted import traffic
from fastfilm.ops import maps
from fastfilm.ops.maps import DeferredMap
from fastfilm.ops.spec import forks
from tests.cuda.test_backend import emulation
from tests.support import emulated
from tests.support.emulated import extension, library
from tests.support.yardstick import assert_typically_as_good_as_eager

__all__ = ["emulation", "extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

BRAIN, SINGLE = torch.bfloat16, torch.float32

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "batch": (
        lambda: fastfilm.FiLMedUNet(1, 2, depth=2, base_filters=8, metadata_size=3),
        (16, 18),
        SINGLE,
    ),
    "batch_several_tiles": (
        lambda: fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=8, metadata_size=3),
        (15, 17),
        BRAIN,
    ),
    "instance_conv_norm_film_act": (
        lambda: fastfilm.FiLMedUNet(
            2,
            1,
            depth=1,
            base_filters=8,
            metadata_size=3,
            norm="instance",
            order="conv-norm-film-act",
        ),
        (12, 13),
        SINGLE,
    ),
    "layer_conv_norm_act_film": (
        lambda: fastfilm.FiLMedUNet(
            1, 1, depth=1, base_filters=8, metadata_size=3, norm="layer", order="conv-norm-act-film"
        ),
        (12, 13),
        SINGLE,
    ),
    "3d": (
        lambda: fastfilm.FiLMedUNet(
            1, 1, depth=1, base_filters=8, metadata_size=3, spatial_dims=3, norm="instance"
        ),
        (4, 6, 7),
        SINGLE,
    ),
}


def _step(net: nn.Module, image: Tensor, rows: Tensor, backend: str) -> dict[str, Tensor]:
    net = copy.deepcopy(net)
    with fastfilm.backend(backend, "fused" if backend == "cuda" else None):
        out = net(image, rows)
    generator = torch.Generator().manual_seed(9)
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"output": out.detach(), **found}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_as_good_as_eager(name: str, emulation: ModuleType) -> None:
    make, size, dtype = NETWORKS[name]

    def drawn(seed: int) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(seed)
        net = make().train().to(dtype)
        for p in net.parameters():
            if p.dim() > 3 and p[0, 0].numel() > 1:
                # kernels drawn with the input channels innermost: the draws for which the bound was found
                p.data = p.data.reshape(len(p), *p.shape[2:], -1).movedim(-1, 1).contiguous()
        channels = next(p for p in net.parameters() if p.dim() > 2).shape[1]
        return net, torch.randn(2, channels, *size).to(dtype), torch.eye(3)[:2].to(dtype)

    def right(net: nn.Module, image: Tensor, rows: Tensor) -> dict[str, Tensor]:
        found = _step(copy.deepcopy(net).double(), image.double(), rows.double(), "reference")
        # a bias in front of a norm has no gradient: what is left there is rounding of larger numbers
        return {k: v for k, v in found.items() if v.norm() > 1e-6 * found["output"].norm()}

    ours, eager = [], []
    for seed in range(40):
        exact = right(*drawn(seed))
        for draws, backend in ((ours, "cuda"), (eager, "reference")):
            found = _step(*drawn(seed), backend)
            draws.append(({k: found[k] for k in exact}, exact))
    assert_typically_as_good_as_eager(ours, eager, dtype)


def _launches(
    emulation: ModuleType, **options: Any
) -> tuple[list[traffic.Launch], list[traffic.Launch]]:
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=8, metadata_size=3, **options)
    net = net.train().to(BRAIN)
    image, rows = torch.randn(1, 1, 16, 16).to(BRAIN), torch.eye(3)[:1].to(BRAIN)
    with fastfilm.backend("cuda", "fused"):
        with traffic.counted() as forward:
            out = net(image, rows)
        with traffic.counted() as backward:
            out.sum().backward()
    return forward, backward


def test_only_pooled_and_resized_maps_are_written_in_front(emulation: ModuleType) -> None:
    forward, backward = _launches(emulation)
    moved = [k for k in forward if k.passes and k.name != "fill_"]  # the test run's own
    # one map in and one out, a second source at the two concatenations, and the last one's unfinished output
    convolutions = [k.passes for k in moved if k.name == "fprop"]
    assert convolutions == [2.0] * 6 + [3.0, 2.0, 3.0, 2.0, 3.0]
    assert {k.name for k in moved} == {"fprop", "gather"}
    names = [k.name for k in backward if k.passes]
    # of the finished output only the coefficients' gradient is taken; the two pooled maps have two consumers
    assert not {"moments_backward", "apply_backward"} & set(names)
    assert names.count("dgrad") == 10 and names.count("wgrad") == 11
    assert names.count("add") == 2


def _block(ci: int, co: int) -> fastfilm.ConvNormFiLM2d:
    return fastfilm.ConvNormFiLM2d(ci, co, norm="batch")


class _Shared(nn.Module):
    """A map with three consumers: pooled, concatenated and written."""

    def __init__(self) -> None:
        super().__init__()
        # the second of two sources is the wider one
        self.first, self.low, self.high = _block(8, 8), _block(8, 16), _block(24, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        skip = self.first(x, deferred=True)
        low = self.low(maps.max_pool(skip, 2), deferred=True)
        up = maps.interpolate(low, size=tuple(skip.shape[2:]), mode="bilinear", align_corners=True)
        high = self.high(maps.join([skip, up]))
        return high, skip


def _gradients(
    net: _Shared, x: Tensor, backend: str, of: Callable[[Tensor, Any], Tensor]
) -> list[Tensor | None]:
    net = copy.deepcopy(net)
    with fastfilm.backend(backend, "fused" if backend == "cuda" else None):
        loss = of(*net(x))
    return list(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    "of",
    [
        lambda high, skip: high.square().sum(),
        lambda high, skip: high.square().sum() + skip.tensor().square().sum(),
        lambda high, skip: skip.tensor().square().sum(),
    ],
    ids=["two_consumers", "three_consumers", "only_the_written_one"],
)
def test_gradients_of_a_shared_map_add_up(
    of: Callable[[Tensor, Any], Tensor], emulation: ModuleType
) -> None:
    torch.manual_seed(1)
    net, x = _Shared().train(), torch.randn(2, 8, 9, 10)
    ours, theirs = (_gradients(net, x, b, of) for b in ("cuda", "reference"))
    for mine, right in zip(ours, theirs, strict=True):
        assert (mine is None) == (right is None)
        if mine is not None and right is not None:
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_voxels_behind_the_last_window_have_a_gradient(emulation: ModuleType) -> None:
    torch.manual_seed(3)
    first, second = _block(8, 8), _block(8, 8)
    x = torch.randn(1, 8, 9, 7, requires_grad=True)
    found = []
    for name, route in (("cuda", "fused"), ("reference", None)):
        with fastfilm.backend(name, route):
            v = second(maps.max_pool(first(x, deferred=True), 2))
        found.append(torch.autograd.grad(v.square().sum(), [x, first.weight, first.norm_weight]))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_a_pooled_nan_is_nan(emulation: ModuleType) -> None:
    x, weight = torch.randn(1, 8, 6, 6), torch.eye(8)[:, :, None, None]
    x[0, 3, 1, 1], x[0, 5, 2, 4] = float("nan"), float("nan")
    found = []
    for name, route in (("cuda", "fused"), ("reference", None)):
        with fastfilm.backend(name, route):
            skip: Any = fastfilm.conv_norm_film(
                x, weight, beta=torch.ones(8), activation="relu", deferred=True
            )
            found.append(fastfilm.conv_norm_film(maps.max_pool(skip, 2), weight).isnan())
    assert found[1].any() and torch.equal(*found)


def test_the_gradient_at_a_shared_raw_map_is_whole(emulation: ModuleType) -> None:
    """Also for somebody who asks for it, twice, and for a part of the graph alone."""
    torch.manual_seed(2)
    net, x = _Shared().train(), torch.randn(1, 8, 8, 8)
    with fastfilm.backend("cuda", "fused"):
        high, skip = net(x)
        assert isinstance(skip, DeferredMap)
        raw, loss = skip.raw, high.square().sum()
    # of the last block alone: the first consumer's ledger stays open
    torch.autograd.grad(loss, list(net.high.parameters()), retain_graph=True)
    first = torch.autograd.grad(loss, raw, retain_graph=True)[0]
    second = torch.autograd.grad(loss, raw, retain_graph=True)[0]
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with fastfilm.backend("cuda", "fused"):
        (graph,) = torch.autograd.grad(loss, raw, create_graph=True)
    torch.testing.assert_close(first, graph.detach(), rtol=1e-3, atol=1e-3)


def test_a_branch_adds_only_what_is_its_own_pass() -> None:
    x = torch.ones(3, requires_grad=True)
    fork = forks.Fork(x)
    (first, ledger), (second, below) = fork.branch(), fork.branch()
    assert ledger is not None and below is not None
    assert ledger.rest() is None
    (first.sum() + 2 * second.sum()).backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full((3,), 3.0))
    with torch.no_grad():
        alone, none = forks.Fork(x).branch()
    assert alone is x and none is None


def test_inference_writes_each_output_once(emulation: ModuleType) -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=8, metadata_size=3).eval()
    image, rows = torch.randn(1, 1, 16, 16), torch.eye(3)[:1]
    with torch.no_grad():
        with fastfilm.backend("reference"):
            right = net(image, rows)
        with fastfilm.backend("cuda", "fused"), traffic.counted() as launches:
            ours = net(image, rows)
    torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)
    moved = [k for k in launches if k.passes and k.name != "fill_"]
    assert {k.name for k in moved} == {"fprop", "gather"}
    assert sum(k.passes for k in moved if k.name == "fprop") == 2 * 11 + 2
