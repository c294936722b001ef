"""The model folder: all that prediction needs, as JSON and safetensors.

    MODEL/model.json          ``ModelInfo``: network, metadata encoder, preprocessing, labels, output, patch size
    MODEL/best.safetensors    weights with the best validation Dice
    MODEL/final.safetensors   weights at the end of training
    MODEL/last.safetensors    the training's state, for ``--resume`` (not needed to predict)
    MODEL/config.yaml, splits.json, log.jsonl, tensorboard/    records of the training

Loading executes nothing that the folder contains: there is no pickle, and a network of another library is built by
class name from a fixed list of libraries.

To predict a case::

    model = load_model("MODEL", device="cpu")
    case = model.preprocess([array_xyz, ...], affine)  # an array per channel, in the order of model.info.contrasts
    row = model.encode({"tumor_type": "astrocytoma"})  # [1, M]; in output mode "task" also one of model.tasks()
    # windows [N, C, *patch_size] of case.image [C, D, H, W]; in 2D each of the D slices is a sample [C, H, W]
    p = model.probabilities(windows, row)  # [N, K, *S], a channel per label (in mode "task" one, that of the task)
    back = case.geometry.from_network(whole)  # [K, D, H, W] -> [K, X, Y, Z], the file's grid
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor, nn

import fastfilm

from ..config.schema import problems
from ..config.sections import LabelValue, NetworkConfig, PatchSide, Section
from ..images.preprocessing import Preprocessed, Preprocessing, Volume
from ..metadata.encoder import KeyEncoder, MetadataEncoder
from ..support.errors import Problems, UserError
from ..support.files import read_json, read_tensors, write_json, write_tensors
from ..support.hints import did_you_mean
from .network import build_network, call

FORMAT = 2
"""Version of model.json's format. In format 1, ``MISSING_IN_FORMAT_1`` was not among a key's missing values."""

MISSING_IN_FORMAT_1 = ("n/a", "na", "nan", "none", "null")

LARGEST = 64 * 2**20
"""Bytes of a model.json at most."""

MODEL = "model"
"""Entry in the header of weights with the digest of their model.json."""


class LabelInfo(Section):
    """A label: its name, its values in label files, and the value written for it."""

    name: str
    values: list[LabelValue] = Field(default_factory=list)
    value: LabelValue


class ModelInfo(Section):
    """The content of model.json.

    Attributes:
        format: version of the file's format; a newer one than ``FORMAT`` is refused.
        fastfilm: version of fastfilm that wrote the file.
        network: the configured network, with its depth.
        spatial_dims: 2 (slices) or 3.
        in_channels: number of image channels.
        contrasts: names of the channels, in order (BIDS: file name behind the subject; CSV: columns); with
            ``combine`` "samples" any one of them is the only channel.
        combine, missing_contrast, dicom_column: as in the configuration's data section.
        labels: in the order of the channels.
        output: "channels": a sigmoid for each label; "classes": softmax over background and labels; "task": one
            sigmoid channel for the label that the metadata key ``task_key`` names.
        task_key: name of that key; None in the other modes.
        metadata: the fitted encoder.
        preprocessing: the fitted preprocessing.
        patch_size: (H, W) or (D, H, W): size of training patches and of sliding windows.
        divisor: number of which sizes of smaller windows must be multiples.
        training: fold, best Dice and further information.
    """

    format: int = FORMAT
    fastfilm: str = fastfilm.__version__
    network: NetworkConfig
    spatial_dims: Literal[2, 3]
    in_channels: int = Field(ge=1)
    contrasts: list[str]
    combine: Literal["channels", "samples"] = "channels"
    missing_contrast: Literal["error", "zeros", "skip"] = "error"
    dicom_column: str = "dicom"
    labels: list[LabelInfo] = Field(min_length=1)
    output: Literal["channels", "classes", "task"]
    task_key: str | None = None
    metadata: MetadataEncoder
    preprocessing: Preprocessing
    patch_size: list[PatchSide]
    divisor: int = Field(1, ge=1)
    training: dict[str, Any] = Field(default_factory=dict)

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, value: list[LabelInfo]) -> list[LabelInfo]:
        names = [label.name for label in value]
        if len(set(names)) < len(names):
            raise ValueError(f"names must differ, got {names}")
        return value

    @field_validator("metadata")
    @classmethod
    def _encodes(cls, value: MetadataEncoder) -> MetadataEncoder:
        names = value.names()
        if len(set(names)) < len(names):
            raise ValueError(f"names of keys must differ, got {names}")
        for key in value.keys:
            _check_key(key)
        return value

    @model_validator(mode="after")
    def _fits(self) -> ModelInfo:
        for name, expected, got in (
            ("patch_size", self.spatial_dims, len(self.patch_size)),
            ("preprocessing.channels", self.in_channels, len(self.preprocessing.channels)),
        ):
            if expected != got:
                raise ValueError(f"{name} needs {expected} entries, got {got}")
        if (self.output == "task") != (self.task_key in self.metadata.names()):
            raise ValueError(
                f"output 'task' needs task_key, one of metadata's; got {self.task_key!r}"
            )
        return self

    @property
    def out_channels(self) -> int:
        """Number of channels of the logits: the labels', one more for the background in "classes", 1 in "task"."""
        if self.output == "task":
            return 1
        return len(self.labels) + (self.output == "classes")

    @property
    def separate(self) -> bool:
        """Whether each label is written to a file of its own, as labels may overlap.

        Labels with masks of their own may overlap, and labels with common values do (``whole: [1, 2]``, ``core:
        2``).
        """
        values = [v for label in self.labels for v in label.values]
        own = any(not label.values for label in self.labels)
        return self.output != "classes" and (own or len(set(values)) < len(values))

    def build(self) -> nn.Module:
        """A new network with random weights; nothing is fetched."""
        return build_network(
            self.network,
            spatial_dims=self.spatial_dims,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            metadata_size=self.metadata.size,
        )


def _check_key(key: KeyEncoder) -> None:
    """Raises ValueError for an inconsistent key, such as one that would divide by zero."""
    edges = key.edges or []
    groups = len(edges) + 1 if key.kind == "continuous" else len(key.values)
    for holds, what in (
        (key.std > 0, f"std must be above 0, got {key.std}"),
        (len(set(key.values)) == len(key.values), f"values must differ, got {key.values}"),
        (all(a < b for a, b in itertools.pairwise(edges)), f"edges must ascend, got {edges}"),
        (0 <= key.dropout <= 1, f"dropout must be 0 to 1, got {key.dropout}"),
        (key.separator, "separator must not be empty"),
        (
            key.counts is None or (len(key.counts) == groups and min(key.counts, default=0) >= 0),
            f"counts do not fit the values: {key.counts}",
        ),
        (
            (key.kind == "vector") == (key.vector is not None),
            f"kind {key.kind!r} {'needs' if key.kind == 'vector' else 'takes no'} vector",
        ),
        (key.vector is None or key.vector.problem() is None, key.vector and key.vector.problem()),
        (
            not key.table_columns
            or (key.vector is not None and len(key.table_columns) == key.vector.length),
            f"{len(key.table_columns)} table_columns do not fit the vector",
        ),
    ):
        if not holds:
            raise ValueError(f"key {key.name!r}: {what}")


@dataclass
class LoadedModel:
    """A model ready to predict.

    Attributes:
        network: the network, in evaluation mode and on ``device``; it returns logits.
        info: content of model.json.
        device: device of the network.
        folder: the model folder.
        weights: name of the weights' file, without suffix.
    """

    network: nn.Module
    info: ModelInfo
    device: torch.device
    folder: Path
    weights: str = "best"

    @property
    def encoder(self) -> MetadataEncoder:
        """The metadata encoder."""
        return self.info.metadata

    def tasks(self) -> list[str]:
        """Values of the task key, in the order of the labels, each for one prediction; empty in other modes."""
        return [label.name for label in self.info.labels] if self.info.output == "task" else []

    def metadata_keys(self) -> list[str]:
        """The metadata keys that users give values of: all but the task."""
        return [k for k in self.encoder.names() if k != self.info.task_key]

    def check_key(self, name: str, origin: str) -> None:
        """Raises UserError, which begins with ``origin``, if ``name`` is none of ``metadata_keys``."""
        keys = self.metadata_keys()
        if name not in keys:
            raise UserError(
                f"{origin}: the model has no metadata key {name!r}; it has {', '.join(keys) or 'none'}"
                + did_you_mean(name, keys)
            )

    def encode(self, values: Mapping[str, Any], task: str | None = None) -> NDArray[np.float32]:
        """The metadata row [1, M] of a case.

        Args:
            values: key -> value (text, number, list); a missing key is "unknown" if the model has learned that.
            task: label to predict, in output mode "task".

        Raises:
            MetadataError (a UserError): the model has no such key, never saw a value, or a value is missing and
                its key has no "unknown".
        """
        if self.info.task_key is not None and task is not None:
            values = {**values, self.info.task_key: task}
        return self.encoder.encode(values)[None]

    def preprocess(
        self, images: Sequence[Volume | None], affine: NDArray[np.floating]
    ) -> Preprocessed:
        """A case's channels ([X, Y, Z] each, None if missing) as the network's input, as in ``Preprocessing``."""
        return self.info.preprocessing(images, affine)

    def probabilities(self, image: Tensor, rows: Tensor | NDArray[np.float32]) -> Tensor:
        """Probabilities [N, K, *S], float32: a channel per label, or in output mode "task" that of the task.

        Args:
            image: [N, C, *S] with ``spatial_dims`` spatial dimensions, on ``device``.
            rows: metadata [N, M] or [1, M], from ``encode``.
        """
        rows = torch.as_tensor(rows, dtype=torch.float32, device=image.device)
        return self.activate(call(self.network, image, rows))

    def activate(self, logits: Tensor | Sequence[Tensor]) -> Tensor:
        """Probabilities [N, K, *S], float32, of logits, without the background of "classes".

        Of a list of logits (deep supervision) the first, of full size, are used.
        """
        logits = logits if isinstance(logits, Tensor) else logits[0]
        if self.info.output == "classes":
            return torch.softmax(logits.float(), 1)[:, 1:]
        return torch.sigmoid(logits.float())


def save_model(folder: str | Path, info: ModelInfo) -> None:
    """Writes model.json, atomically."""
    write_json(Path(folder) / "model.json", info.model_dump(mode="json"))


def save_weights(
    folder: str | Path,
    name: str,
    network: nn.Module | Mapping[str, Tensor],
    info: ModelInfo | None = None,
) -> None:
    """Writes NAME.safetensors, atomically.

    Args:
        info: the weights' model.json; beside another one they are refused when loaded.
    """
    state = network.state_dict() if isinstance(network, nn.Module) else network
    header = None if info is None else {MODEL: digest(info.model_dump(mode="json"))}
    write_tensors(Path(folder) / f"{name}.safetensors", state, header)


def digest(model: Mapping[str, Any]) -> str:
    """Digest of the entries of a model.json that a prediction depends on (not ``training``, nor the version)."""
    kept = {k: v for k, v in model.items() if k not in ("training", "fastfilm")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_info(folder: str | Path) -> ModelInfo:
    """The model.json of a model folder.

    A file of a newer minor version of fastfilm is read, with a warning on stderr.

    Raises:
        UserError: the folder is not a model folder, its file is damaged, or has a newer format or major version.
    """
    return _read(folder)[0]


def _read(folder: str | Path) -> tuple[ModelInfo, str]:
    """The model.json of a folder, and its digest."""
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a model folder: it has no model.json")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: not a fastfilm model: larger than {LARGEST >> 20} MiB")
    value = read_json(path)
    if not isinstance(value, dict) or type(value.get("format")) is not int or value["format"] < 1:
        raise UserError(f"{path}: not a fastfilm model")
    if value["format"] > FORMAT:
        raise UserError(
            f"{path}: format {value['format']} was written by fastfilm {value.get('fastfilm')}; this is"
            f" fastfilm {fastfilm.__version__}, which reads up to format {FORMAT}"
        )
    _check_version(str(path), str(value.get("fastfilm")))
    try:
        return ModelInfo.model_validate(_upgraded(value)), digest(value)
    except ValidationError as error:
        raise Problems(f"{path}: not a valid model", problems(error, ModelInfo)) from error


def _upgraded(value: dict[str, Any]) -> dict[str, Any]:
    """The value of a model.json in today's format; faulty entries are left to the validation."""
    if value["format"] == FORMAT:
        return value
    value = json.loads(json.dumps(value)) | {"format": FORMAT}
    metadata = value.get("metadata")
    keys = metadata.get("keys") if isinstance(metadata, dict) else None
    for key in keys if isinstance(keys, list) else []:
        if isinstance(key, dict) and isinstance(key.get("missing", []), list):
            key["missing"] = [*MISSING_IN_FORMAT_1, *key.get("missing", [])]
    return value


@functools.cache
def _check_version(path: str, written: str) -> None:
    ours, theirs = _numbers(fastfilm.__version__), _numbers(written)
    if ours is None or theirs is None or theirs <= ours:
        return
    about = f"{path}: was written by fastfilm {written}, this is fastfilm {fastfilm.__version__}"
    if theirs[0] > ours[0]:
        raise UserError(f"{about}; a newer major version is not read")
    print(f"{about}: its new features are not supported", file=sys.stderr)


def _numbers(version: str) -> tuple[int, int, int] | None:
    """(major, minor, patch)."""
    match = re.match(r"(\d+)(?:\.(\d+))?(?:\.(\d+))?", version)
    return None if match is None else (int(match[1]), int(match[2] or 0), int(match[3] or 0))


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", weights: str = "best"
) -> LoadedModel:
    """The model in ``folder``, in evaluation mode on ``device``.

    Args:
        weights: "best" or "final" (or the name of another NAME.safetensors in the folder).

    Raises:
        UserError: the folder is not a model folder or lacks the weights, or the weights are damaged, belong to
            another model.json, or do not fit the network.
    """
    info, described = _read(folder)
    path = Path(folder) / f"{weights}.safetensors"
    if not path.is_file():
        there = sorted(p.stem for p in Path(folder).glob("*.safetensors"))
        raise UserError(
            f"{path}: no such weights; the folder has {', '.join(there) or 'none'}"
            " (training writes best.safetensors at its first validation)"
        )
    state, header = read_tensors(path)
    if header.get(MODEL, described) != described:
        raise UserError(
            f"{path.parent / 'model.json'} is not the one that {path.name} was trained with:"
            " take both from one folder"
        )
    network = info.build()
    load_weights(network, state, str(path))
    network.eval().to(device)
    return LoadedModel(network, info, torch.device(device), Path(folder), weights)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Copies ``state`` into the network.

    Raises:
        UserError: names or shapes differ; the message begins with ``origin``.
    """
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        first = next((t.strip() for t in str(error).splitlines()[1:] if t.strip()), str(error))
        raise UserError(f"{origin}: does not fit the network in model.json: {first}") from error
