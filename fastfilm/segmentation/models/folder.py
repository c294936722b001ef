"""The model folder: everything that prediction needs, as JSON and safetensors.

    MODEL/model.json          ``ModelInfo``: network, metadata encoder, preprocessing, labels, output, patch size
    MODEL/best.safetensors    weights with the best validation Dice
    MODEL/final.safetensors   weights at the end of training
    MODEL/last.safetensors    the training's state, for ``--resume`` (not needed to predict)
    MODEL/config.yaml, splits.json, log.jsonl, tensorboard/    how it came about

Loading executes nothing that the folder contains: there is no pickle, and a network of another library is built by
class name from a fixed list of libraries.

How to predict a case with it::

    model = load_model("MODEL", device="cpu")
    case = model.preprocess([array_xyz, ...], affine)  # one array a channel, in the order of model.info.contrasts
    row = model.encode({"tumor_type": "astrocytoma"})  # [1, M]; model.tasks() first where the task is metadata
    # windows [N, C, *patch_size] of case.image [C, D, H, W]; in 2D each of the D slices is a sample [C, H, W]
    p = model.probabilities(windows, row)  # [N, K, *S], one channel a label (or one, the task's)
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
from ..config.sections import (
    LabelValue,
    NetworkConfig,
    PatchSide,
    Section,
)
from ..images.preprocessing import (
    Preprocessed,
    Preprocessing,
    Volume,
)
from ..metadata.encoder import KeyEncoder, MetadataEncoder
from ..support.errors import Problems, UserError
from ..support.files import (
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from .network import build_network, call

FORMAT = 2
"""Of model.json. In format 1 the spellings of a missing value came on top of ``MISSING_IN_FORMAT_1``."""

MISSING_IN_FORMAT_1 = ("n/a", "na", "nan", "none", "null")

LARGEST = 64 * 2**20
"""Bytes of a model.json."""

MODEL = "model"
"""Name in the header of weights: digest of the model.json that they were trained with."""


class LabelInfo(Section):
    """One label: its name, the values that stand for it in label files, the value written for it."""

    name: str
    values: list[LabelValue] = Field(default_factory=list)
    value: LabelValue


class ModelInfo(Section):
    """What model.json holds.

    Attributes:
        format: of this file; a newer one than this version knows is refused.
        fastfilm: version that wrote it.
        network: as configured (depth filled in).
        spatial_dims: 2 (slices) or 3.
        in_channels: image channels.
        contrasts: the channels' names, in order (BIDS: what stands behind the subject; CSV: columns); with
            ``combine`` "samples" any one of them is the only channel.
        combine, missing_contrast, dicom_column: as in the configuration's data section.
        labels: in the order of the channels.
        output: "channels": a sigmoid for each label; "classes": softmax over background and labels; "task": one
            sigmoid channel for the label whose name is the metadata value of ``task_key``.
        task_key: name of that key; None in the other modes.
        metadata: the fitted encoder.
        preprocessing: fitted.
        patch_size: (H, W) or (D, H, W): size of training patches, for sliding windows.
        divisor: windows smaller than the patch must have sizes that are multiples of this.
        training: fold, best Dice and the like; for information.
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
        """Channels of the logits: one for each label, one more for the background in "classes", 1 in "task"."""
        if self.output == "task":
            return 1
        return len(self.labels) + (self.output == "classes")

    @property
    def separate(self) -> bool:
        """Whether each label gets a file of its own: they may overlap.

        Those from masks of their own may, and so do labels that share values (regions: ``whole: [1, 2]``,
        ``core: 2``).
        """
        values = [v for label in self.labels for v in label.values]
        own = any(not label.values for label in self.labels)
        return self.output != "classes" and (own or len(set(values)) < len(values))

    def build(self) -> nn.Module:
        """The network without its weights; nothing is fetched."""
        return build_network(
            self.network,
            spatial_dims=self.spatial_dims,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            metadata_size=self.metadata.size,
        )


def _check_key(key: KeyEncoder) -> None:
    """Raises ValueError where the key would divide by zero, or give a value two meanings."""
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
        network: in evaluation mode, on ``device``; its output are logits.
        info: labels, contrasts, patch size, output mode …
        device: where it runs.
        folder: where it came from.
        weights: name of the file they are from.
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
        """Values of the task key, one prediction each, in the order of the labels; empty in other modes."""
        return [label.name for label in self.info.labels] if self.info.output == "task" else []

    def metadata_keys(self) -> list[str]:
        """Keys that the user gives a case (all but the task)."""
        return [k for k in self.encoder.names() if k != self.info.task_key]

    def encode(self, values: Mapping[str, Any], task: str | None = None) -> NDArray[np.float32]:
        """The metadata row [1, M] of a case.

        Args:
            values: key -> value (text, number, list); a missing key is "unknown" if the model learned that.
            task: which label is asked for, where the task is metadata.

        Raises:
            MetadataError (a UserError): unknown key, value never seen, missing value that has no "unknown".
        """
        if self.info.task_key is not None and task is not None:
            values = {**values, self.info.task_key: task}
        return self.encoder.encode(values)[None]

    def preprocess(
        self, images: Sequence[Volume | None], affine: NDArray[np.floating]
    ) -> Preprocessed:
        """A case's channels ([X, Y, Z] each, None where one is missing) as [C, D, H, W], and the way back."""
        return self.info.preprocessing(images, affine)

    def probabilities(self, image: Tensor, rows: Tensor | NDArray[np.float32]) -> Tensor:
        """Probabilities [N, K, *S] in float32: one channel a label, or the one of the task in the rows.

        Args:
            image: [N, C, *S] with ``spatial_dims`` spatial dimensions, on ``device``.
            rows: metadata [N, M] or [1, M] (from ``encode``).
        """
        rows = torch.as_tensor(rows, dtype=torch.float32, device=image.device)
        return self.activate(call(self.network, image, rows))

    def activate(self, logits: Tensor | Sequence[Tensor]) -> Tensor:
        """Logits -> probabilities, one channel a label (the background of "classes" is left out).

        Of several (deep supervision) the first, full size, are taken.
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
        info: the model.json that the weights belong to; beside another one they are refused.
    """
    state = network.state_dict() if isinstance(network, nn.Module) else network
    header = None if info is None else {MODEL: digest(info.model_dump(mode="json"))}
    write_tensors(Path(folder) / f"{name}.safetensors", state, header)


def digest(model: Mapping[str, Any]) -> str:
    """Of everything in a model.json that a prediction depends on (not ``training``, nor the version)."""
    kept = {k: v for k, v in model.items() if k not in ("training", "fastfilm")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_info(folder: str | Path) -> ModelInfo:
    """model.json of a model folder.

    A newer minor version of fastfilm than this one is said on stderr, once.

    Raises:
        UserError: not a model folder, damaged, or written by a newer format or major version.
    """
    return _read(folder)[0]


def _read(folder: str | Path) -> tuple[ModelInfo, str]:
    """The description, and the digest of the file that it came from."""
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
    """model.json's value in today's format; what is not as it should be is left to the validation."""
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
    print(f"{about}: what is new there is not known here", file=sys.stderr)


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
        UserError: not a model folder, no such weights, weights that are damaged, of another model.json, or do not
            fit the network.
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
    """Copies ``state`` into the network; UserError naming ``origin`` if names or shapes differ."""
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        first = next((t.strip() for t in str(error).splitlines()[1:] if t.strip()), str(error))
        raise UserError(f"{origin}: does not fit the network in model.json: {first}") from error
