"""torch.compile: one graph of our operators, with eager's results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.ops import backends
from tests.yardstick import relative_error

CPU = backends.BACKENDS["cpu"]
pytestmark = [
    pytest.mark.skipif(CPU.unavailable() is not None, reason=str(CPU.unavailable())),
    pytest.mark.filterwarnings("ignore"),
]


class Recorder:
    """A compiler that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        run: Callable[..., Any] = graph.forward
        return run

    def operators(self) -> set[str]:
        return {
            str(n.target) for g in self.graphs for n in g.graph.nodes if n.op == "call_function"
        }


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def network(**options: Any) -> fastfilm.FiLMedUNet:
    torch.manual_seed(0)
    return fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=4, metadata_size=3, **options)


@pytest.mark.parametrize(
    ("kind", "training"),
    [("unet", True), ("unet", False), ("unet3d", True), ("block", True), ("block", False)],
)
def test_one_graph_gives_eagers_output_and_gradients(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    eager: nn.Module
    if kind == "unet":
        eager, inputs = network(), (torch.randn(2, 1, 16, 16), torch.eye(3)[:2])
    elif kind == "unet3d":
        eager = fastfilm.Modified3DUNet(1, 1, base_filters=2, metadata_size=3)
        inputs = (torch.randn(1, 1, 32, 32, 32), torch.eye(3)[:1])
    else:
        eager = fastfilm.ConvNormFiLM2d(3, 8, activation="prelu")
        inputs = (torch.randn(2, 3, 9, 8), torch.rand(2, 8), torch.rand(2, 8))
    eager.train(training)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected, found = eager(*inputs), compiled(*inputs)
        assert relative_error(found, expected.double()) < 1e-5
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    ours = [p.grad for p in model.parameters() if p.grad is not None]
    theirs = [p.grad for p in eager.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 0
    flat = [torch.cat([g.flatten() for g in grads]) for grads in (ours, theirs)]
    # two compilers of the same sums round differently, and ReLUs pass that on
    assert relative_error(flat[0], flat[1].double()) < 1e-3
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_graph_consists_of_our_operators() -> None:
    recorder = Recorder()
    net = network().train()
    torch.compile(net, backend=recorder, fullgraph=True)(
        torch.randn(1, 1, 16, 16), torch.eye(3)[:1]
    )
    assert len(recorder.graphs) == 1
    assert "fastfilm.conv" in recorder.operators()
    with torch.no_grad():
        torch._dynamo.reset()
        recorder = Recorder()
        net.eval()
        torch.compile(net, backend=recorder, fullgraph=True)(
            torch.randn(1, 1, 16, 16), torch.eye(3)[:1]
        )
    assert any("fastfilm" in name for name in recorder.operators())


def test_recompilations_are_counted_and_none_is_needless() -> None:
    recorder = Recorder()
    net = network().eval()
    compiled = torch.compile(net, backend=recorder, fullgraph=True, dynamic=False)
    rows = torch.eye(3)[:1]
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(1, 1, 16, 16), rows)
        assert len(recorder.graphs) == 1
        compiled(torch.randn(1, 1, 24, 16), rows)
    assert len(recorder.graphs) == 2


def test_inductor_compiles_a_block() -> None:
    """Inductor fuses around the operators; skipped where it has no C++ compiler."""
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="instance").eval()
    x, gamma = torch.randn(1, 3, 8, 8), torch.rand(1, 4)
    compiled = torch.compile(block, fullgraph=True)
    try:
        with torch.no_grad():
            found: Tensor = compiled(x, gamma, gamma)
    except Exception as error:
        if "compiler" in str(error).lower() or "fatal error" in str(error).lower():
            pytest.skip(f"Inductor cannot compile here: {str(error).splitlines()[0]}")
        raise
    assert relative_error(found, block(x, gamma, gamma).double()) < 1e-5
