"""``torch.export`` and ONNX: graphs of PyTorch's own operators, metadata as an input, any batch size."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import fastfilm
from fastfilm.ops import spec

BATCH = {0: Dim.DYNAMIC}


class Block(nn.Module):
    """A block with FiLM as inputs, behind another that it reads deferred."""

    def __init__(self, norm: str | None, order: str) -> None:
        super().__init__()
        self.first = fastfilm.ConvNormFiLM2d(1, 3, norm="instance", activation="prelu")
        self.second = fastfilm.ConvNormFiLM2d(
            3,
            4,
            stride=2,
            norm=norm,
            num_groups=2 if norm == "group" else None,
            activation="gelu",
            order=order,
        )

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        gamma, beta = film.chunk(2, 1)
        return self.second(self.first(x, deferred=True), gamma, beta)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def unet() -> tuple[nn.Module, tuple[int, ...], int]:
    return fastfilm.FiLMedUNet(1, 2, base_filters=4, depth=1, metadata_size=3), (1, 6, 7), 3


def unet3d() -> tuple[nn.Module, tuple[int, ...], int]:
    layers = [1, 0, 0, 0, 1, 0, 0, 0, 0, 1]
    net = fastfilm.Modified3DUNet(1, 1, base_filters=1, metadata_size=3, film_layers=layers)
    return net, (1, 32, 16, 16), 3


def block() -> tuple[nn.Module, tuple[int, ...], int]:
    return Block("group", "conv-norm-act-film"), (1, 6, 5), 8


def converted() -> tuple[nn.Module, tuple[int, ...], int]:
    """A network of PyTorch's own layers, conditioned and converted."""
    conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
    net = nn.Sequential(
        *(conv(1, 4), nn.BatchNorm2d(4), nn.ReLU()),
        *(conv(4, 4), nn.InstanceNorm2d(4), nn.PReLU(), nn.Conv2d(4, 2, 1)),
    )
    fastfilm.condition(net, metadata_size=3, where="all")
    with torch.no_grad():
        for parameter in fastfilm.generator_parameters(net):
            parameter.add_(0.1)
    return fastfilm.convert(net, verbose=False), (1, 6, 7), 3


MODELS = {f.__name__: f for f in (unet, unet3d, block, converted)}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[nn.Module, ExportedProgram, Any, int]:
    """A network in evaluation, its exported program with a dynamic batch, and shapes of its inputs."""
    return made(request.param)


@functools.cache
def made(name: str) -> tuple[nn.Module, ExportedProgram, tuple[int, ...], int]:
    torch.manual_seed(1)
    net, shape, size = MODELS[name]()
    net.eval()
    given = (draw(2, *shape), draw(2, size))
    program = torch.export.export(net, given, dynamic_shapes=(BATCH, BATCH))
    return net, program, shape, size


def foreign(program: ExportedProgram) -> set[str]:
    """Namespaces of the operators in a graph that are not PyTorch's."""
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert calls
    return {c for c in calls if c.startswith(("fastfilm", "<"))} - {
        c for c in calls if c.startswith("<built-in")
    }


def test_exported_graph_has_operators_of_pytorch_only(model: Any) -> None:
    assert foreign(model[1]) == set()


def test_exported_program_agrees_with_eager_for_any_batch(model: Any) -> None:
    net, program, shape, size = model
    run = program.module()
    for batch in (1, 5):
        given = (draw(batch, *shape), draw(batch, size))
        torch.testing.assert_close(run(*given), net(*given), rtol=1e-4, atol=1e-5)


def test_exported_program_is_saved_and_loaded() -> None:
    _, program, shape, size = made("block")
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    given = (draw(3, *shape), draw(3, size))
    again = torch.export.load(stream).module()(*given)
    assert torch.equal(again, program.module()(*given))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_model_agrees_with_eager_under_onnxruntime(model: Any, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=f"the package {package} is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the package onnxruntime is not installed")
    net, program, shape, size = model
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    path = tmp_path / "model.onnx"
    exported.save(path)
    session = runtime.InferenceSession(path)
    inputs = session.get_inputs()
    assert len(inputs) == 2, "the image and the metadata"
    assert not any(isinstance(i.shape[0], int) for i in inputs), "the batch is dynamic"
    for batch in (1, 3):
        given = (draw(batch, *shape), draw(batch, size))
        feed = {i.name: t.numpy() for i, t in zip(inputs, given, strict=True)}
        found = torch.from_numpy(session.run(None, feed)[0])
        torch.testing.assert_close(found, net(*given).detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "order"),
    [
        (None, spec.ORDERS[0]),
        ("batch", spec.ORDERS[0]),
        ("instance", spec.ORDERS[1]),
        ("batch", spec.ORDERS[2]),
        ("layer", spec.ORDERS[2]),
    ],
)
def test_a_block_of_any_kind_is_exported(norm: str | None, order: str) -> None:
    net = Block(norm, order).eval()
    program = torch.export.export(
        net, (draw(2, 1, 6, 5), draw(2, 8)), dynamic_shapes=(BATCH, BATCH)
    )
    assert foreign(program) == set()
    given = (draw(4, 1, 6, 5), draw(4, 8))
    torch.testing.assert_close(program.module()(*given), net(*given), rtol=1e-4, atol=1e-5)


def test_export_in_strict_mode_takes_the_same_operators() -> None:
    net = Block("batch", "conv-act-norm-film").eval()
    given = (draw(2, 1, 6, 5), draw(2, 8))
    program = torch.export.export(net, given, dynamic_shapes=(BATCH, BATCH), strict=True)
    assert foreign(program) == set()
    torch.testing.assert_close(program.module()(*given), net(*given), rtol=1e-4, atol=1e-5)


def test_a_forced_backend_stays_in_the_exported_graph() -> None:
    """The check of the graphs above would see an operator of ours."""
    net = Block("batch", "conv-act-norm-film").eval()
    if fastfilm.ops.choice.BACKENDS["cpu"].unavailable() is not None:
        pytest.skip("the C++ extension was not built")
    with fastfilm.backend("cpu"):
        program = torch.export.export(net, (draw(2, 1, 6, 5), draw(2, 8)))
    assert foreign(program)
