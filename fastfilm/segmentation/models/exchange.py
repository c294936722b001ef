"""Models from and for elsewhere: weights of ivadomed, ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

import fastfilm
from fastfilm.nn import FiLMedUNet, Modified3DUNet

from ..config.sections import NetworkConfig
from ..images.preprocessing import Normalisation, Preprocessing
from ..metadata.encoder import KeyEncoder, MetadataEncoder
from ..support.errors import UserError
from ..support.files import atomic, read_tensors
from ..support.records import check_writable
from .folder import (
    LabelInfo,
    LoadedModel,
    ModelInfo,
    load_model,
    load_weights,
    save_model,
    save_weights,
)
from .network import divisor

TOLERANCE = 1e-3
"""Largest difference of probabilities between ONNX Runtime and the model."""


class _Probabilities(nn.Module):
    """The network with its final activation, with or without metadata as second input."""

    def __init__(self, model: LoadedModel) -> None:
        super().__init__()
        self.network, self.model = model.network, [model]

    def forward(self, image: Tensor, metadata: Tensor | None = None) -> Tensor:
        out = self.network(image) if metadata is None else self.network(image, metadata)
        return self.model[0].activate(out)


def export_onnx(model: LoadedModel, path: Path) -> float | None:
    """Writes the network with its final activation as ONNX.

    Inputs: ``image`` [N, C, *patch_size] and, with metadata, ``metadata`` [N, M]; output ``probabilities``
    [N, K, *patch_size]; N is free. The file's metadata hold model.json under ``fastfilm``: labels, preprocessing
    and the encoder that makes the rows.

    Returns:
        the largest difference from the model under ONNX Runtime; None where that is not installed.

    Raises:
        UserError: the packages for ONNX are missing, the network cannot be exported, the exported model does not
            agree, or the file cannot be written; nothing is written then.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f'export needs {error.name}: pip install "fastfilm[export]"') from error
    info = model.info
    rng = torch.Generator().manual_seed(0)

    def given(n: int) -> tuple[Tensor, ...]:
        image = torch.randn(n, info.in_channels, *info.patch_size, generator=rng)
        rows = torch.eye(max(1, info.metadata.size))[torch.arange(n) % max(1, info.metadata.size)]
        return (image, rows) if info.metadata.size else (image,)

    whole = _Probabilities(model).eval()
    example = given(2)
    names = ["image", "metadata"][: len(example)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                whole,
                example,
                dynamo=True,
                verbose=False,
                dynamic_shapes=tuple({0: Dim.DYNAMIC} for _ in example),
                input_names=names,
                output_names=["probabilities"],
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{model.folder}: cannot be exported as ONNX: {reason}") from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"fastfilm": json.dumps(info.model_dump(mode="json"))})
    with atomic(path) as temporary:
        onnx.save(proto, str(temporary))
        try:
            import onnxruntime
        except ModuleNotFoundError:
            return None
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        worst = 0.0
        for n in (1, 3):
            inputs = given(n)
            feed = {k: t.numpy() for k, t in zip(names, inputs, strict=True)}
            with torch.no_grad():
                expected = whole(*inputs).numpy()
            worst = max(worst, float(np.abs(session.run(None, feed)[0] - expected).max()))
        # a file that does not agree is not moved into place
        if not worst <= TOLERANCE:
            raise UserError(f"{path}: ONNX Runtime differs from the model by up to {worst:.2g}")
    return worst


def import_ivadomed(
    weights: Path,
    folder: Path,
    *,
    metadata: Mapping[str, Sequence[str]],
    contrasts: Sequence[str],
    labels: Sequence[str],
    patch_size: Sequence[int],
    slice_axis: Literal[0, 1, 2] = 2,
) -> ModelInfo:
    """A model folder from the weights of ivadomed's ``FiLMedUnet``, ``Unet`` or ``Modified3DUNet``.

    Args:
        weights: a state_dict, as .safetensors or as torch.save wrote it (read without executing anything).
        metadata: the one key and its values in the order of the one-hot columns (ivadomed sorts them).
        contrasts: names of the image channels.
        labels: names of the outputs, without the background that ivadomed drops.
        patch_size: (H, W) or (D, H, W), numbers above 0.
        slice_axis: of a 2D network: 0, 1, 2 for right, anterior, superior.

    Raises:
        UserError: not such weights, names that do not fit their sizes, are empty or there twice, a window that the
            network cannot take, a folder that is not empty; nothing is written then.
    """
    _check_folder(folder)
    values = [v for several in metadata.values() for v in several]
    for option, names in (
        ("--contrast", contrasts),
        ("--label", labels),
        ("--metadata", list(metadata)),
        ("--metadata", values),
    ):
        _check_names(option, names)
    state = _state(weights)
    for name, t in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not t.is_floating_point() or not bool(t.isfinite().all()):
            raise UserError(f"{weights}: {name} must hold finite floating-point numbers")
    flat = "encoder.down_path.0.conv1.weight" in state
    try:
        network: FiLMedUNet | Modified3DUNet = (
            FiLMedUNet.from_ivadomed(state, final_activation=None)
            if flat
            else Modified3DUNet.from_ivadomed(state, final_activation=None)
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{weights}: {error}") from error
    except (KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"{weights}: not weights of such a network: {error}") from error
    own = dict(network.state_dict())
    outputs = int(own["last.weight"].shape[0]) if flat else 0
    if not flat:
        outputs = int(state["conv3d_l4.weight"].shape[0])
        if outputs > 1:
            raise UserError(
                f"{weights}: Modified3DUNet with {outputs} outputs: only one is supported"
            )
    if outputs > 1:
        # ivadomed computes the background and drops it
        own = _without_background(own, outputs)
        outputs -= 1
    dims = network.spatial_dims if isinstance(network, FiLMedUNet) else 3
    first = state["encoder.down_path.0.conv1.weight" if flat else "conv3d_c1_1.weight"]
    size = network.metadata_size
    for name, expected, got in (
        ("--metadata values", size, len(values)),
        ("--contrast", int(first.shape[1]), len(contrasts)),
        ("--label", outputs, len(labels)),
        ("--patch numbers", dims, len(patch_size)),
    ):
        if expected != got:
            raise UserError(f"{weights}: the network has {expected} {name}, got {got}")
    switches = [int(s) for s in network.film_layers]
    config = NetworkConfig(
        name="FiLMedUNet" if isinstance(network, FiLMedUNet) else "Modified3DUNet",
        depth=network.depth if isinstance(network, FiLMedUNet) else None,
        base_filters=network.base_filters,
        norm="batch" if any("running_mean" in k for k in own) else "instance",
        order="conv-act-norm-film",
        activation="relu",
        generator="paper",
        film_layers=switches if size else None,
    )
    info = ModelInfo(
        network=config,
        spatial_dims=2 if dims == 2 else 3,
        in_channels=len(contrasts),
        contrasts=list(contrasts),
        labels=[LabelInfo(name=n, values=[i], value=i) for i, n in enumerate(labels, start=1)],
        output="channels",
        metadata=MetadataEncoder(
            keys=[KeyEncoder(name=k, kind="category", values=list(v)) for k, v in metadata.items()]
        ),
        preprocessing=Preprocessing(
            slice_axis=slice_axis,
            channels=[Normalisation(kind="zscore") for _ in contrasts],
            crop=False,
        ),
        patch_size=list(patch_size),
        divisor=divisor(config),
        training={"imported_from": weights.name, "with": f"fastfilm {fastfilm.__version__}"},
    )
    # a multiple is needed by the one, at least as much by the other
    step = info.divisor if config.name == "Modified3DUNet" else 1
    if any(n % step or n < info.divisor for n in patch_size):
        what = "multiples of" if step > 1 else "at least"
        raise UserError(f"--patch: numbers must be {what} {info.divisor}, got {list(patch_size)}")
    load_weights(info.build(), own, str(weights))
    save_weights(folder, "best", own, info)
    save_model(folder, info)
    load_model(folder)
    return info


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        held = "is a model" if (folder / "model.json").exists() else "are files"
        raise UserError(f"{folder}: there {held} in it already; give another folder")
    check_writable(folder)


def _check_names(option: str, names: Sequence[str]) -> None:
    for name in names:
        if not name.strip():
            raise UserError(f"{option}: a name is empty")
        if list(names).count(name) > 1:
            raise UserError(f"{option}: {name!r} is there twice")


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling has many
        raise UserError(
            f"{path}: not a state_dict that can be read without executing code; in ivadomed's own environment,"
            " torch.save(torch.load(FILE).state_dict(), NEW) makes one of a whole model"
        ) from error
    for name in ("state_dict", "model_state_dict"):
        if isinstance(value, dict) and isinstance(value.get(name), dict):
            value = value[name]
    if not isinstance(value, dict) or not all(isinstance(v, Tensor) for v in value.values()):
        raise UserError(f"{path}: not a state_dict")
    return value


def _without_background(state: Mapping[str, Tensor], outputs: int) -> dict[str, Tensor]:
    """A FiLMedUNet's weights without output channel 0: of the last convolution, and γ and β of the logits."""
    last = max(
        (k for k in state if k.startswith("film.")), key=lambda k: int(k.split(".")[1]), default=""
    )
    prefix = ".".join(last.split(".")[:2])
    result = {}
    for name, t in state.items():
        if name in ("last.weight", "last.bias"):
            t = t[1:].clone()
        elif (
            prefix
            and name in (f"{prefix}.last.weight", f"{prefix}.last.bias")
            and t.shape[0] == 2 * outputs
        ):
            t = torch.cat([t[1:outputs], t[outputs + 1 :]])
        result[name] = t
    return result
