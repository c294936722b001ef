"""torch.compile: one graph of our operators, with eager's results."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm
from fastfilm.ops import choice
from fastfilm.ops.launchers import cuda as cuda_launchers
from fastfilm.ops.settings import tables
from tests.support.case import SLOW
from tests.support.yardstick import relative_error

CPU = choice.BACKENDS["cpu"]
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


class Pooled(nn.Module):
    """The parts of a U-Net, each once: two blocks, pooling, upsampling, a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.first = fastfilm.ConvNormFiLM2d(1, 3)
        self.second = fastfilm.ConvNormFiLM2d(6, 2, norm="instance")

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        skip = self.first(x, rows, rows, deferred=True)
        up = nn.functional.interpolate(nn.functional.max_pool2d(skip, 2), size=skip.shape[2:])
        v: Tensor = self.second(torch.cat([up, skip], 1), rows[:, :2])
        return v


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def network(**options: Any) -> fastfilm.FiLMedUNet:
    torch.manual_seed(0)
    return fastfilm.FiLMedUNet(1, 1, depth=1, base_filters=4, metadata_size=3, **options)


@pytest.mark.parametrize(
    ("kind", "training"),
    [("unet", True), ("unet", False), ("unet3d", True), ("block", True), ("block", False)],
)
def test_one_graph_gives_eagers_output_and_gradients(kind: str, training: bool) -> None:
    if kind == "unet3d" and not SLOW:
        pytest.skip("compiles slowly; set FASTFILM_SLOW_TESTS=1 to run it")
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


def fits(dtype: torch.dtype, channels: tuple[int, int], *rest: object) -> str | None:
    """Stands in for what the compiled CUDA kernels say of a shape."""
    return "no tile fits" if channels[0] > 100 else None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("channels", "plan"), [(64, "cuda/fused"), (128, "reference/eager")])
def test_choices_of_a_gpu_are_followed_in_one_graph(
    channels: int, plan: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables in files, modules of machine code and properties of a device are none of the graph's business."""

    def chosen(x: Tensor) -> tuple[Tensor, str]:
        one = (1, 1)
        shape = {
            "channels": tuple(weight.shape[1::-1]),
            "output": tuple(x.shape[2:]),
            "batch": x.shape[0],
        }
        request = choice.Request("cuda", torch.bfloat16, 2, (3, 3), one, one, **shape)
        return x + 1, str(choice.choose(request))

    weight = nn.Parameter(torch.zeros(64, channels, 3, 3))
    cuda = replace(choice.BACKENDS["cuda"], unavailable=lambda: None)
    monkeypatch.setitem(choice.BACKENDS, "cuda", cuda)
    monkeypatch.setattr(cuda_launchers, "plans", SimpleNamespace(why_not=fits), raising=False)
    monkeypatch.setattr(tables, "architecture", lambda: "sm_90")
    bucket = tables.key(torch.bfloat16, 2, (channels, 64), (3, 3), (1, 1), (16, 16))
    tables.in_force.cache_clear()
    choice.forget()
    try:
        with tables.trying({bucket: tables.Entry("cuda/fused", {}, {})}):
            compiled = torch.compile(chosen, backend="eager", fullgraph=True, dynamic=dynamic)
            assert compiled(torch.zeros(2, 1, 16, 16))[1] == plan
            assert compiled(torch.zeros(2, 1, 64, 64))[1] == "reference/eager"
    finally:
        tables.in_force.cache_clear()
        choice.forget()


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


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_compiles_a_block(mode: str) -> None:
    """Inductor fuses around the operators; on a CPU both modes run the same kernels."""
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="instance").eval()
    x, gamma = torch.randn(1, 3, 8, 8), torch.rand(1, 4)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        found: Tensor = compiled(x, gamma, gamma)
    assert relative_error(found, block(x, gamma, gamma).double()) < 1e-5


def test_dynamic_sizes_take_one_graph_and_give_eagers_results() -> None:
    recorder = Recorder()
    torch.manual_seed(0)
    block = fastfilm.ConvNormFiLM2d(3, 4, norm="instance").eval()
    compiled = torch.compile(block, backend=recorder, fullgraph=True, dynamic=True)
    gamma = torch.rand(1, 4)
    for size in ((8, 10), (14, 12), (9, 21)):
        x = torch.randn(2, 3, *size)
        assert relative_error(compiled(x, gamma, gamma), block(x, gamma, gamma).double()) < 1e-5
    assert len(recorder.graphs) == 1


def test_a_dynamic_network_trains_at_two_sizes_as_eager_does() -> None:
    torch.manual_seed(0)
    eager = network() if SLOW else Pooled()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (16, 24):
        x = torch.randn(2, 1, size, size)
        for call in (eager, compiled):
            call(x, torch.eye(3)[:2]).square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", [2, 3])
def test_flops_are_counted_as_pytorchs_own(dims: int, training: bool) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def counted(backend: str) -> dict[str, int]:
        net = network(spatial_dims=dims).train(training)
        x = torch.randn(2, 1, *[8] * dims)
        with fastfilm.backend(backend), FlopCounterMode(display=False) as counter:
            with torch.set_grad_enabled(training):
                v = net(x, torch.eye(3)[:2])
            if training:
                v.sum().backward()
        return {str(k): n for k, n in counter.get_flop_counts()["Global"].items()}

    ours, theirs = counted("cpu"), counted("reference")
    assert any("fastfilm" in k for k in ours) and not any("convolution" in k for k in ours)
    assert sum(ours.values()) == sum(theirs.values()) > 0
    if training:
        assert ours["fastfilm.conv_backward"] == theirs["aten.convolution_backward"]


def test_flops_of_grouped_strided_and_transposed_convolutions() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    cases: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
        ({"groups": 2, "stride": 2}, (6, 2, 3, 3)),
        ({"transposed": True, "stride": 2}, (4, 6, 3, 3)),
        ({"dilation": 2}, (6, 4, 3, 3)),
    )
    for options, shape in cases:
        totals = []
        for backend in ("cpu", "reference"):
            x, weight = torch.randn(2, 4, 9, 8), torch.randn(shape)
            x.requires_grad_(), weight.requires_grad_()
            with fastfilm.backend(backend), FlopCounterMode(display=False) as counter:
                fastfilm.conv_norm_film(x, weight, norm="instance", **options).sum().backward()
            totals.append(counter.get_total_flops())
        assert totals[0] == totals[1] > 0, options
