"""Converted models under other tools: tracers, compilers, copies and pickles."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fastfilm

from .test_convert_same import Net, X, block, pair


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
