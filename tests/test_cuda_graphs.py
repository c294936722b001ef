"""Capture in CUDA graphs, and streams; these need a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastfilm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def network() -> tuple[fastfilm.FiLMedUNet, Tensor, Tensor]:
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(
        1, 1, depth=2, base_filters=8, metadata_size=3, norm="instance"
    ).cuda()
    return net, torch.randn(2, 1, 32, 32, device="cuda"), torch.eye(3, device="cuda")[:2]


def step(net: fastfilm.FiLMedUNet, image: Tensor, rows: Tensor) -> Tensor:
    for p in net.parameters():
        p.grad = None
    loss: Tensor = net(image, rows).square().mean()
    loss.backward()
    return loss


def test_a_training_step_is_captured_and_replayed_with_new_data() -> None:
    net, image, rows = network()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(net, image, rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    for p in net.parameters():
        p.grad = None
    with torch.cuda.graph(graph):
        loss = net(image, rows).square().mean()
        loss.backward()
    captured = [p.grad for p in net.parameters()]
    image.copy_(torch.randn_like(image))
    graph.replay()
    torch.cuda.synchronize()
    found = [loss.clone(), *(g.clone() for g in captured if g is not None)]
    expected = [step(net, image, rows)]
    expected += [p.grad for p in net.parameters() if p.grad is not None]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_inference_is_captured() -> None:
    net, image, rows = network()
    net.eval()
    with torch.no_grad():
        patient = net.modulate(rows)
        for _ in range(3):
            net(image, patient)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(image, patient)
        image.copy_(torch.randn_like(image))
        graph.replay()
        torch.testing.assert_close(out, net(image, patient), rtol=1e-5, atol=1e-6)


def test_work_goes_to_the_current_stream() -> None:
    net, image, rows = network()
    expected = step(net, image, rows).detach()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # long enough that a kernel on another stream would read the image before it is written
        torch.cuda._sleep(50_000_000)
        late = image * 1.0
        found = step(net, late, rows).detach()
    side.synchronize()
    torch.testing.assert_close(found, expected)
