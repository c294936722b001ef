"""Converted models under other tools: tracers, compilers, copies and pickles."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastfilm

from .test_same import Net, X, block, pair


@pytest.mark.parametrize(
    "way", ["jit.trace", "jit.script", "export", "fx", "vmap", "functional_call", "fake"]
)
def test_tracers_and_transforms_see_the_models_own_layers(way: str) -> None:
    model, converted = pair(lambda: nn.Sequential(block(), block(4, 2)).eval())
    converted(X)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(X)
        if way == "jit.trace":
            found = torch.jit.trace(converted, X)(X)
        elif way == "jit.script":
            found = torch.jit.script(converted)(X)
        elif way == "export":
            program = torch.export.export(converted, (X,))
            assert not [n for n in program.graph.nodes if "fastfilm" in str(n.target)]
            found = program.module()(X)
        elif way == "fx":
            found = torch.fx.symbolic_trace(converted)(X)
        elif way == "vmap":
            found = torch.func.vmap(lambda x: converted(x[None])[0])(X)
        elif way == "functional_call":
            found = torch.func.functional_call(converted, dict(converted.named_parameters()), (X,))
        else:
            with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
                assert converted(mode.from_tensor(X)).shape == expected.shape
            return
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "way", ["compile", "compile in place", "converted inside", "convert a compiled one"]
)
def test_compiled_and_converted_in_either_order(way: str) -> None:
    model, converted = pair(Net)
    if way == "compile":
        made: Any = torch.compile(converted, backend="aot_eager")
    elif way == "compile in place":
        converted.compile(backend="aot_eager")
        made = converted
    elif way == "converted inside":
        fastfilm.restore(converted)
        fastfilm.convert(converted.encoder, verbose=False)
        fastfilm.convert(converted, verbose=False)
        made = fastfilm.convert(converted, verbose=False)
    else:
        fastfilm.restore(converted)
        made = fastfilm.convert(torch.compile(converted, backend="aot_eager"), verbose=False)
    theirs, ours = model(X), made(X)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_backend_has_a_name() -> None:
    model, _ = pair(Net)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="fastfilm")
    torch.testing.assert_close(compiled(X), model(X), rtol=1e-4, atol=1e-5)
    with pytest.raises(Exception, match="rest must be one of"):
        torch.compile(copy.deepcopy(model), backend="fastfilm", options={"rest": "fast"})(X)
    with pytest.raises(ValueError, match="rest must be one of 'eager', 'inductor', got 'fast'"):
        fastfilm.convert(model, rest="fast")


def test_copies_shallow_and_deep_and_files_run_on_their_own() -> None:
    model, converted = pair(Net)
    model(X), converted(X)
    file = io.BytesIO()
    torch.save(converted, file)
    file.seek(0)
    twins = [
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(file, weights_only=False),
        copy.copy(converted),
    ]
    for twin in twins:
        assert type(twin) is Net
        twin.encoder = copy.deepcopy(twin.encoder)
        with torch.no_grad():
            twin.encoder[0].weight.mul_(2)
            model_twin = copy.deepcopy(model)
            model_twin.encoder[0].weight.mul_(2)
            for m in (twin, model_twin):
                m.eval()
            torch.testing.assert_close(twin(X), model_twin(X), rtol=1e-4, atol=1e-5)


def test_many_models_of_a_class_do_not_share_what_is_compiled() -> None:
    for i in range(12):
        torch.manual_seed(i)
        model = nn.Sequential(nn.Conv2d(3, 4 + i, 3), nn.ReLU())
        converted = fastfilm.convert(model, copy=True, verbose=False)
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-5)
        assert fastfilm.conversion_report(converted).graphs == 1


QUESTIONS: dict[str, Callable[[], bool]] = {
    "compiler": lambda: torch.compiler.is_compiling(),
    "dynamo": lambda: torch.compiler.is_dynamo_compiling(),
    "deprecated": lambda: torch._dynamo.is_compiling(),
}


class Checking(nn.Module):
    """Checks its input and output only where no compiler follows it, as smp's and MONAI's networks do."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        super().__init__()
        self.layers, self.asked, self.checks = block(), asked, 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.asked():
            self.checks += 1
            if x.shape[-1] % 2:
                raise RuntimeError("an odd width")
        y: Tensor = self.layers(x)
        if not self.asked() and not bool(y.isfinite().all()):
            raise ValueError("not finite")
        return y


@pytest.mark.filterwarnings("ignore:.*is_compiling.* is deprecated:FutureWarning")
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_model_that_asks_is_not_compiled(question: str) -> None:
    model, converted = pair(lambda: Checking(QUESTIONS[question]))
    for calls in (1, 2):
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-5)
        assert converted.checks == calls
    with pytest.raises(RuntimeError, match="an odd width"):
        converted(X[..., :-1])
    with pytest.raises(ValueError, match="not finite"):
        converted(X * float("nan"))
    # errors do not leave the forward unconverted
    converted(X)
    again = fastfilm.convert(model, copy=True, verbose=False)
    again(X)
    for made in (converted, again):
        assert len(fastfilm.conversion_report(made).fused) == 1
    # a compiler that the user chose is still noticed
    compiled = torch.compile(converted, backend="eager")
    compiled(X[..., :-1])


class Repeated(nn.Module):
    """Blocks of one class that TorchDynamo gives up: it cannot go on behind a break inside of a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(3, 3) for _ in range(2))
        self.times = 6

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.step(x)
        return x

    def step(self, x: Tensor) -> Tensor:
        for layers in self.blocks:
            x = layers(x)
            if not bool(x.isfinite().all()):
                raise ValueError("not finite")
        return x


def test_what_cannot_be_compiled_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import convert_frame

    tried: list[str] = []
    original = convert_frame._compile
    monkeypatch.setattr(
        convert_frame,
        "_compile",
        lambda code, *args, **kwargs: (tried.append(code.co_name), original(code, *args, **kwargs))[
            1
        ],
    )
    model, converted = pair(Repeated)
    for _ in range(3):
        torch.testing.assert_close(converted(X), model(X), rtol=1e-4, atol=1e-5)
    assert tried.count("step") == 1, tried


class WithoutAnnotations(nn.Module):
    """``torch.jit.script`` takes the annotations of ``nn.Module`` for those of a class that has none."""

    def __init__(self):  # type: ignore[no-untyped-def]
        super().__init__()
        self.layers = block()
        self.unknown_to_scripts = object()

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.layers(x)


@pytest.mark.parametrize("own", ["none", "of the class", "of the module"])
def test_scripts_leave_out_what_a_conversion_adds(own: str) -> None:
    name, names = "__jit_ignored_attributes__", ["unknown_to_scripts"]
    kind = type("Kind", (WithoutAnnotations,), {name: names} if own == "of the class" else {})

    def make() -> nn.Module:
        module: nn.Module = kind()
        if own == "of the module":
            module.__dict__[name] = names
        return module.eval()

    model, converted = pair(make)
    fastfilm.convert(fastfilm.convert(converted, verbose=False), verbose=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(X)
        torch.testing.assert_close(torch.jit.script(copy.deepcopy(converted))(X), expected)
    torch.testing.assert_close(converted(X), expected, rtol=1e-4, atol=1e-5)
    fastfilm.restore(converted)
    assert vars(converted).keys() == vars(model).keys()
    assert vars(converted).get(name) == vars(model).get(name)


@pytest.mark.parametrize("way", ["training", "inference", "in parts", "restored", "copied"])
def test_a_model_that_nobody_has_is_freed(way: str) -> None:
    """TorchDynamo and our own memories hold neither a model nor what it was given."""
    model: Any = Checking(torch.compiler.is_compiling) if way == "in parts" else Net()
    converted: Any = fastfilm.convert(model.train(way != "inference"), verbose=False)
    x = X.clone()
    if way == "inference":
        with torch.no_grad():
            converted(x)
    else:
        converted(x).sum().backward()
    if way == "copied":
        copy.deepcopy(converted)(x).sum().backward()
    fastfilm.conversion_report(converted)
    if way == "restored":
        fastfilm.restore(converted)
    held = [weakref.ref(t) for t in (*converted.parameters(), *converted.modules(), x)]
    del model, converted, x
    gc.collect()
    assert not [r() for r in held if r() is not None]
