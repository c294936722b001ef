"""The counter of kernels and of the maps they move."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastfilm
from benchmarks.counted import traffic
from fastfilm.ops import choice, launchers

CPU = choice.BACKENDS["cpu"]
needs_cpu = pytest.mark.skipif(CPU.unavailable() is not None, reason=str(CPU.unavailable()))


def passes(launches: list[traffic.Launch]) -> Counter[str]:
    found: Counter[str] = Counter()
    for launch in launches:
        if launch.name == "fill_":  # of the tests' poisoned buffers
            continue
        found[launch.name] += launch.passes  # type: ignore[assignment]
    return +found


def test_what_pytorch_moves_in_one_block() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with traffic.counted() as forward:
        y = F.conv2d(x, weight, padding=1)
        v = F.batch_norm(torch.relu(y), None, None, training=True)
    assert passes(forward) == {"convolution": 2, "relu": 2, "native_batch_norm": 3}
    with traffic.counted() as backward:
        v.backward(torch.ones_like(v))
    assert passes(backward) == {
        "ones_like": 1,
        "native_batch_norm_backward": 5,
        "threshold_backward": 3,
        "convolution_dgrad": 2,
        "convolution_wgrad": 2,
    }
    size = {k.name: k.bytes for k in forward}
    assert size["convolution"] == 4 * (2 * 3 * 64 + 2 * 4 * 64)
    running = torch.zeros(4), torch.ones(4)
    with traffic.counted() as evaluated, torch.no_grad():
        F.batch_norm(y, *running, training=False)
    assert passes(evaluated) == {"native_batch_norm": 2}


@needs_cpu
def test_what_a_joined_and_pooled_map_moves() -> None:
    """A convolution over half a map's channels pooled, and a skip; its input is written once for all."""
    torch.manual_seed(0)
    first = fastfilm.ConvNormFiLM2d(2, 4, norm="instance", activation="relu")
    second = fastfilm.ConvNormFiLM2d(8, 4, norm="instance", activation="relu")
    x = torch.randn(1, 2, 8, 8)
    with fastfilm.backend("cpu"):
        a, b = first(x, deferred=True), first(x, deferred=True)
        joined = torch.cat([F.avg_pool2d(a, 3, 1, 1), b], 1)
        with traffic.counted() as forward:
            v = second(joined, deferred=True)
        # each source is read, and half of the joined map is written; then convolution (whose it is depends on the
        # processor) and moments
        counts = passes(forward)
        assert counts["convolution"] + counts["convolve"] == 2
        assert counts["gather"] == 3 and counts["moments"] == 1 and counts.total() == 6
        with traffic.counted() as backward:
            v.raw.sum().backward()
    counts = passes(backward)
    assert counts["gather"] == 3 and counts["gather_backward"] == 3
    # the image needs no gradient
    assert counts["convolution_dgrad"] + counts["convolve_dgrad"] == 2
    assert counts["convolution_wgrad"] + counts["convolve_wgrad"] == 6
    owners = {k.name: k.owner for k in forward}
    assert owners["gather"] == owners["moments"] == "cpu"
    assert owners.get("convolve", "cpu") == "cpu" and owners.get("convolution", "aten") == "aten"


@needs_cpu
def test_counting_changes_nothing_and_ends() -> None:
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3)
    x, rows = torch.randn(1, 1, 16, 16), torch.eye(3)[:1]

    def step() -> list[Tensor]:
        net.zero_grad()
        v = net(x, rows)
        v.sum().backward()
        return [v.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]

    expected = step()
    with traffic.counted() as launches:
        found = step()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    # the unwritten maps of eager mode, not the operators that a tracer sees
    names = {k.name for k in launches}
    assert "gather" in names and not any("pool" in n or "upsample" in n for n in names)
    before = len(launches)
    step()
    assert len(launches) == before
    assert launchers.of("cpu").__name__ == "fastfilm.ops.launchers.cpu.kernels"


@needs_cpu
def test_a_network_moves_half_of_eagers_maps_forward() -> None:
    net = fastfilm.FiLMedUNet(1, 1, depth=4, base_filters=2, metadata_size=3)
    x, rows = torch.randn(1, 1, 64, 64), torch.eye(3)[:1]
    counts = []
    for backend in ("cpu", "reference"):
        with fastfilm.backend(backend):
            with traffic.counted() as forward:
                v = net(x, rows)
            with traffic.counted() as backward:
                v.sum().backward()
        counts.append([sum(passes(part).values()) / 19 for part in (forward, backward)])
    (ours, ours_back), (theirs, theirs_back) = counts
    assert ours < 5.3 and theirs > 10
    assert ours_back < 15 < 17 < theirs_back


def test_the_fused_route_loads_once_and_stores_once() -> None:
    triton = choice.BACKENDS["triton"]
    if triton.unavailable() is not None or not choice.interpreting():
        pytest.skip(triton.unavailable() or "the interpreter is not active")
    torch.manual_seed(0)
    blocks = [fastfilm.ConvNormFiLM2d(3, 3, norm="instance") for _ in range(2)]
    x = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    with fastfilm.backend("triton", "fused"):
        with traffic.counted() as forward:
            v = blocks[1](blocks[0](x, deferred=True), deferred=True)
        with traffic.counted() as backward:
            v.raw.sum().backward()
    assert passes(forward) == {"fprop": 4}
    # e from dy and y; dgrad and wgrad read e and the producer's raw map
    counts = passes(backward)
    assert counts["moments_backward"] == 6 and counts["wgrad"] == 4 and counts["dgrad"] in (5, 6)
