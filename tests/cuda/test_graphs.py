"""Capture in CUDA graphs, and streams; these need a GPU."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.ops.choice import BACKENDS
from fastfilm.ops.maps import residual
from fastfilm.ops.spec import views
from tests.support.yardstick import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(params=["triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> str:
    """A backend that is available."""
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def network(norm: str = "instance") -> tuple[fastfilm.FiLMedUNet, Tensor, Tensor]:
    """A network that pools, resizes and concatenates, with image and metadata."""
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=8, metadata_size=3, norm=norm).cuda()
    return net, torch.randn(2, 1, 32, 32, device="cuda"), torch.eye(3, device="cuda")[:2]


def step(net: fastfilm.FiLMedUNet, image: Tensor, rows: Tensor) -> list[Tensor]:
    """The loss and all gradients, in tensors of their own."""
    for p in net.parameters():
        p.grad = None
    loss: Tensor = net(image, rows).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def captured(work: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """``work`` as a graph, captured behind three calls on a stream of their own; and what it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = work()
    evict(side)
    return graph, filled


def evict(side: torch.cuda.Stream) -> None:
    """Empties the caches and writes zeros into the memory that they had, on each stream that allocated some."""
    views._table.cache_clear()
    residual._kept_slope.cache_clear()
    gc.collect()
    for stream in (side, torch.cuda.current_stream()):
        with torch.cuda.stream(stream):
            # zeros, so that what reads them by mistake computes wrong numbers and no wrong addresses
            _ = [torch.zeros(n, device="cuda") for n in (32, 128, 512, 2048) for _ in range(256)]
    torch.cuda.synchronize()


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_training_step_is_replayed_with_new_data_behind_emptied_caches(
    norm: str, kernels: str
) -> None:
    net, image, rows = network(norm)
    with fastfilm.backend(kernels, "fused"):
        graph, filled = captured(lambda: step(net, image, rows))
        image.copy_(torch.randn_like(image))
        graph.replay()
        found = [t.clone() for t in filled]
        assert_same(found, step(net, image, rows))


def test_a_training_step_of_the_automatic_choice_is_captured() -> None:
    net, image, rows = network()
    graph, filled = captured(lambda: step(net, image, rows))
    image.copy_(torch.randn_like(image))
    graph.replay()
    found = [t.clone() for t in filled]
    assert_same(found, step(net, image, rows))


@torch.no_grad()
def test_inference_is_replayed_with_the_parameters_of_then(kernels: str) -> None:
    net, image, rows = network("batch")
    net.eval()
    with fastfilm.backend(kernels, "fused"):
        patient = net.modulate(rows)
        graph, (filled,) = captured(lambda: [net(image, patient)])
        for statistics in net.buffers():
            if statistics.is_floating_point():
                statistics.add_(0.5)
        image.copy_(torch.randn_like(image))
        graph.replay()
        found = filled.clone()
        assert_same([found], [net(image, patient)])


@torch.no_grad()
def test_calls_behind_a_replay_use_what_it_has_written(kernels: str) -> None:
    net, image, rows = network("batch")
    net.eval()

    def write() -> list[Tensor]:
        return [t.mul_(0.9) for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()]

    with fastfilm.backend(kernels, "fused"):
        before = net(image, rows)
        graph, _ = captured(write)
        for _ in range(2):
            graph.replay()
            found = net(image, rows)
            with fastfilm.backend("reference"):
                expected = net(image, rows)
            assert relative_error(found, expected) < 1e-4 < relative_error(before, expected)
            before = found


@torch.no_grad()
def test_a_first_view_inside_a_capture_is_refused_and_later_calls_work(kernels: str) -> None:
    net, image, rows = network()
    with fastfilm.backend("reference"):
        expected = net(image, rows)
    with fastfilm.backend(kernels, "fused"):
        net(image, rows)  # the kernels are loaded
        views._table.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="warm up"):
            net(image, rows)
        assert relative_error(net(image, rows), expected) < 1e-4
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            filled = net(image, rows)
        graph.replay()
        assert relative_error(filled, expected) < 1e-4


FIRST = """
import sys, torch, fastfilm
torch.backends.cudnn.allow_tf32 = False
x, weight = torch.randn(1, 8, 16, 16, device="cuda"), torch.randn(8, 8, 3, 3, device="cuda")
said = ""

def call(*plan):
    with torch.no_grad(), fastfilm.backend(*plan):
        return fastfilm.conv_norm_film(x, weight, padding=1, norm="instance", activation="relu")

expected = call("reference")
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        try:
            call(sys.argv[1], "fused")
        except RuntimeError as error:
            said = str(error)
except RuntimeError:
    # a capture that a refused call has made invalid ends with an error, and leaves its stream the current one
    torch.cuda.set_stream(torch.cuda.default_stream())
assert not said or "(warm up)" in said, said
error = (call(sys.argv[1], "fused") - expected).norm() / expected.norm()
assert error < 1e-5, error
print("fine:", said or "captured")
"""


def test_the_first_kernel_of_a_process_may_meet_a_capture(kernels: str) -> None:
    """It is captured, or refused with what to do; in both cases the same call works afterwards."""
    command = [sys.executable, "-c", FIRST, kernels]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("fine:"), done.stdout + done.stderr


def test_work_goes_to_the_current_stream() -> None:
    net, image, rows = network()
    expected = step(net, image, rows)[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # long enough that a kernel on another stream would read the image before it is written
        torch.cuda._sleep(50_000_000)
        late = image * 1.0
        found = step(net, late, rows)[0]
    side.synchronize()
    torch.testing.assert_close(found, expected)
