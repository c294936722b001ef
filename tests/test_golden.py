"""ivadomed's own networks, array by array: outputs, gradients, γ and β."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastfilm
from fastfilm.nn import FiLMedUNet, FiLMGenerator, Modified3DUNet, ivadomed
from fastfilm.ops import backends

HERE = Path(__file__).parent / "golden"
SHARED = Path(
    os.environ.get("FASTFILM_GOLDEN", Path(__file__).parents[2] / "shared/golden/ivadomed")
)
NAMES = (
    "filmed_unet_2d_depth2",
    "filmed_unet_2d_depth3_partial_multiclass",
    "filmed_unet_3d_depth2",
    "modified_3d_unet_film",
)
ROUTES = [("reference", None), ("cpu", None), ("triton", "fused")]


def golden(name: str) -> dict[str, Any]:
    for folder in (HERE, SHARED):
        path = folder / f"{name}.npz"
        if path.exists():
            arrays = np.load(path)
            data: dict[str, Any] = {
                k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "config"
            }
            data["config"] = json.loads(str(arrays["config"]))
            return data
    pytest.skip(f"{name}.npz is not here; set FASTFILM_GOLDEN to the folder that has it")


def state(data: dict[str, Any]) -> dict[str, Tensor]:
    return {k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")}


def load(data: dict[str, Any]) -> FiLMedUNet | Modified3DUNet:
    cls = Modified3DUNet if data["config"]["model"] == "Modified3DUNet" else FiLMedUNet
    return cls.from_ivadomed(state(data))


def forced(backend: str, route: str | None) -> Any:
    reason = backends.BACKENDS[backend].unavailable()
    if reason is None and backend == "triton" and not backends.interpreting():
        reason = "the interpreter is not active"
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return fastfilm.backend(backend, route)


def assert_close(ours: Tensor, theirs: Tensor, name: str) -> None:
    error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-12)
    assert error <= 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize(("backend", "route"), ROUTES, ids=lambda v: str(v))
@pytest.mark.parametrize("name", NAMES)
def test_every_array(name: str, backend: str, route: str | None) -> None:
    data = golden(name)
    with forced(backend, route):
        model = load(data).eval()
        with torch.no_grad():
            output = model(data["input"], data["context"])
        assert (output - data["eval_output"]).abs().max() <= 1e-6
        assert_close(output, data["eval_output"], "eval_output")

        image = data["input"].clone().requires_grad_()
        output = model.train()(image, data["context"])
        assert (output - data["train_output"]).abs().max() <= 1e-6
        assert_close(output, data["train_output"], "train_output")
        (output * data["loss_weights"]).sum().backward()
    assert image.grad is not None
    assert_close(image.grad, data["grad_input"], "grad_input")
    keys = ivadomed.modified_keys if isinstance(model, Modified3DUNet) else ivadomed.unet_keys
    parameters = dict(model.named_parameters(remove_duplicate=False))
    checked = 0
    scale = max(v.norm().item() for k, v in data.items() if k.startswith("grad/"))
    for theirs, ours in keys(model).items():
        if f"grad/{theirs}" in data:
            expected, grad = data[f"grad/{theirs}"], parameters[ours].grad
            assert grad is not None, ours
            if expected.norm() < 1e-5 * scale:  # zero but for rounding, in both
                assert (grad - expected).norm() <= 1e-6 * scale, theirs
            else:
                assert_close(grad, expected, theirs)
            checked += 1
    assert checked == sum(k.startswith("grad/") for k in data)


@pytest.mark.parametrize("name", NAMES)
def test_gamma_and_beta(name: str) -> None:
    data = golden(name)
    model = load(data)
    layers = [k.removeprefix("gamma/") for k in data if k.startswith("gamma/")]
    generators = [g for g in model.film if isinstance(g, FiLMGenerator)]
    assert len(layers) == len(generators)
    for layer, generator in zip(layers, generators, strict=True):
        gamma, beta = generator(data["context"])
        assert_close(gamma, data[f"gamma/{layer}"], layer)
        assert_close(beta, data[f"beta/{layer}"], layer)


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_back_bit_for_bit(name: str) -> None:
    data = golden(name)
    theirs, ours = state(data), load(data).to_ivadomed()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) and ours[key].dtype == value.dtype, key


def test_first_layers_weights_win_where_a_state_dict_is_untied() -> None:
    data = golden(NAMES[0])
    untied = state(data)
    key = "decoder.up_path.1.generator.linear1.weight"
    untied[key] = untied[key] + 1
    model = FiLMedUNet.from_ivadomed(untied)
    assert torch.equal(model.to_ivadomed()[key], state(data)[key])


def test_attention_gates_are_refused_by_name() -> None:
    data = {
        "conv3d_c1_1.weight": torch.zeros(2, 1, 3, 3, 3),
        "conv3d_l4.weight": torch.zeros(1, 4, 1, 1, 1),
    }
    with pytest.raises(NotImplementedError, match="attention gates"):
        Modified3DUNet.from_ivadomed({**data, "gating.conv1.0.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a FiLMedUnet"):
        FiLMedUNet.from_ivadomed(data)
    with pytest.raises(ValueError, match="does not fit"):
        Modified3DUNet.from_ivadomed(data)
