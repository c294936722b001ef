"""What the metadata do to a network: γ and β of every FiLM layer, for every value of every key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastfilm.nn import FiLMGenerator

from ..models.folder import LoadedModel
from ..support.errors import UserError
from ..support.files import atomic
from ..support.names import file_name

STEPS = 7
"""Values of a continuous key that are looked at, from the lowest to the highest in training."""

VECTOR_NUMBERS, VECTOR_STEP = 3, 2.0
"""Of a vector: the first so many of its numbers are changed, by so many deviations up and down."""


@dataclass(frozen=True)
class Layer:
    """γ and β [V, C] of one FiLM layer under V values."""

    name: str
    gamma: NDArray[np.float32]
    beta: NDArray[np.float32]


@dataclass(frozen=True)
class Inspection:
    """One metadata key: its values (as text) and the layers in the order of the network."""

    key: str
    values: list[str]
    layers: list[Layer]


def has_film(model: LoadedModel) -> bool:
    """Whether the network has FiLM layers."""
    return any(isinstance(m, FiLMGenerator) for m in model.network.modules())


@torch.no_grad()
def inspect(model: LoadedModel) -> list[Inspection]:
    """γ and β of every layer under each value of each key, the other keys unknown (or at their first value).

    Raises:
        UserError: the network has no FiLM layers.
    """
    named = [(n, m) for n, m in model.network.named_modules() if isinstance(m, FiLMGenerator)]
    if not named:
        raise UserError(f"{model.folder}: the network has no FiLM layers")
    titles = layer_names(model)
    result = []
    for key in model.encoder.keys:
        values = _values(model, key.name)
        base = {k.name: _default(model, k.name) for k in model.encoder.keys if k.name != key.name}
        rows = np.stack([model.encoder.encode({**base, key.name: v}) for _, v in values])
        layers = []
        for name, generator in named:
            gamma, beta = generator(torch.from_numpy(rows).to(model.device))
            layers.append(Layer(titles.get(name, name), gamma.cpu().numpy(), beta.cpu().numpy()))
        result.append(Inspection(key.name, [n for n, _ in values], layers))
    return result


def layer_names(model: LoadedModel) -> dict[str, str]:
    """Module path -> what the layer is called; only of FiLMedUNet, others keep their paths."""
    depth = getattr(model.network, "depth", None)
    if model.info.network.name != "FiLMedUNet" or not isinstance(depth, int):
        return {}
    names = [f"encoder {i + 1}" for i in range(depth)] + ["bottom"]
    names += [f"decoder {depth - i}" for i in range(depth)] + ["logits"]
    return {f"film.{i}": name for i, name in enumerate(names)}


def spread(layer: Layer) -> float:
    """Largest standard deviation over the values of any γ or β of a layer: 0 if the metadata change nothing."""
    return max(float(layer.gamma.std(0).max()), float(layer.beta.std(0).max()))


def save_npz(path: Path, inspections: list[Inspection]) -> None:
    """Arrays ``KEY/LAYER/gamma`` and ``KEY/LAYER/beta`` [V, C], ``KEY/values`` [V] as text; no pickle.

    KEY is written as ``names.file_name`` does: the arrays are files in an archive.
    """
    arrays: dict[str, Any] = {}
    for i in inspections:
        key = file_name(i.key)
        arrays[f"{key}/values"] = np.array(i.values)
        for layer in i.layers:
            arrays[f"{key}/{layer.name}/gamma"] = layer.gamma
            arrays[f"{key}/{layer.name}/beta"] = layer.beta
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def principal_components(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], list[float]]:
    """[V, D] -> coordinates [V, 2] on the first two principal axes, and the share of variance of each."""
    centred = rows.astype(float) - rows.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    share = (s**2 / max((s**2).sum(), 1e-30)).tolist()
    coordinates = np.zeros((len(rows), 2))
    n = min(2, len(s))
    coordinates[:, :n] = u[:, :n] * s[:n]
    return coordinates, [*share, 0.0, 0.0][:2]


def _values(model: LoadedModel, name: str) -> list[tuple[str, Any]]:
    """The values that are looked at, each behind its name; of a vector its mean, and steps from it."""
    key = model.encoder[name]
    unknown = [("unknown", None)] if key.unknown else []
    if key.kind == "vector":
        vector = key.fitted_vector
        found: list[tuple[str, Any]] = [("mean", vector.along(0, 0))]
        for i, column in enumerate(key.columns()[: min(VECTOR_NUMBERS, vector.width)]):
            found += [
                (f"{column} {step:+g}σ", vector.along(i, step))
                for step in (-VECTOR_STEP, VECTOR_STEP)
            ]
        return [*found, *unknown]
    if key.kind != "continuous":
        return [*((v, v) for v in key.values), *unknown]
    if key.log:
        steps = np.geomspace(np.exp(key.lowest), np.exp(key.highest), STEPS)
    else:
        steps = np.linspace(key.lowest, key.highest, STEPS)
    return [*((f"{v:.4g}", v) for v in steps.tolist()), *unknown]


def _default(model: LoadedModel, name: str) -> Any:
    return None if model.encoder[name].unknown else _values(model, name)[0][1]
