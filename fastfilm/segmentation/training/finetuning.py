"""Starting from a trained model: its network, encoder and preprocessing, grown by what is new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..config.schema import Config
from ..data.sources import Case
from ..metadata.encoder import (
    MetadataEncoder,
    MetadataError,
    as_category,
    is_missing,
)
from ..models.folder import (
    LabelInfo,
    ModelInfo,
    load_model,
)
from ..models.network import (
    MetadataChannels,
    generator_parameters,
    grow_metadata,
)
from ..support.errors import UserError
from ..support.hints import some


def start_from(
    folder: Path, info: ModelInfo, cases: Sequence[Case], config: Config
) -> tuple[ModelInfo, nn.Module]:
    """The old model, ready for the new data.

    Network, preprocessing and patch size stay the old model's. Values of its metadata keys (tasks included) that
    the new training cases bring along are added to the encoder, and the generators get inputs for them.

    Args:
        folder: the old model's.
        info: of the new plan.
        cases: the new training cases.

    Raises:
        UserError: channels, dimensions, output mode or metadata keys that differ; labels that do, unless they are
            tasks.
    """
    old = load_model(folder)
    before = old.info
    for name, a, b in (
        ("dimensions", before.spatial_dims, info.spatial_dims),
        ("image channels", before.in_channels, info.in_channels),
        ("output mode", before.output, info.output),
        ("metadata keys", before.metadata.names(), info.metadata.names()),
    ):
        if a != b:
            raise UserError(f"{folder}: {name} of the model are {a}, of the plan {b}")
    for fitted in before.metadata.keys:
        theirs = info.metadata[fitted.name].table_columns
        if fitted.table_columns != theirs:
            raise UserError(
                f"{folder}: the model's metadata {fitted.name!r} have the columns"
                f" {some(fitted.table_columns) or 'none'}, the plan's {some(theirs) or 'none'}: a vector must have"
                " the same components in the same order"
            )
    labels = list(before.labels)
    names = [label.name for label in labels]
    if info.output == "task":
        values = {label.value for label in labels}
        for label in info.labels:
            if label.name not in names:
                free = label.value if label.value not in values else max(values) + 1
                labels.append(label.model_copy(update={"value": free}))
                values.add(free)
    elif names != [label.name for label in info.labels]:
        raise UserError(
            f"{folder}: labels of the model are {names}, of the plan {[x.name for x in info.labels]}"
        )
    new = _new_values(before, info.labels, cases)
    if new and isinstance(old.network, MetadataChannels):
        key, value = new[0]
        raise UserError(
            f"{folder}: {key} has a new value, {value!r}, and the model gets metadata as image channels, whose"
            " number cannot grow (network.conditioning: film can)"
        )
    encoder = _counted(grown_encoder(old.network, before.metadata, new), info.metadata)
    network = old.network
    if config.training.freeze == "all_but_generator":
        freeze_all_but_generator(network)
    update = {
        "metadata": encoder,
        "labels": labels,
        "contrasts": info.contrasts,
        "combine": info.combine,
        "missing_contrast": info.missing_contrast,
        "dicom_column": info.dicom_column,
        "training": info.training,
        "fastfilm": info.fastfilm,
    }
    return before.model_copy(update=update), network


def grown_encoder(
    network: nn.Module, encoder: MetadataEncoder, new: Sequence[tuple[str, str]]
) -> MetadataEncoder:
    """The encoder with further (key, value) pairs; ``network``'s generators grow along, in place."""
    for key, value in new:
        encoder, column = encoder.grow(key, value)
        grow_metadata(network, column)
    return encoder


def _counted(encoder: MetadataEncoder, new: MetadataEncoder) -> MetadataEncoder:
    """With the new training cases added to the counts of values, where both have any."""
    keys = []
    for key in encoder.keys:
        theirs = new[key.name]
        if key.values and key.counts is not None and theirs.counts is not None:
            more = dict(zip(theirs.values, theirs.counts, strict=True))
            counts = [n + more.get(v, 0) for v, n in zip(key.values, key.counts, strict=True)]
            key = key.model_copy(update={"counts": counts})
        keys.append(key)
    return MetadataEncoder(keys=keys)


def freeze_all_but_generator(network: nn.Module) -> None:
    """Only the weights that turn metadata into γ and β are trained.

    Raises:
        UserError: the network has none.
    """
    trained = generator_parameters(network)
    if not trained:
        raise UserError("training.freeze: the network has no FiLM generator that could be trained")
    network.requires_grad_(False)
    for p in trained:
        p.requires_grad_(True)


def _new_values(
    old: ModelInfo, labels: Sequence[LabelInfo], cases: Sequence[Case]
) -> list[tuple[str, str]]:
    new: dict[tuple[str, str], None] = {}
    for key in old.metadata.keys:
        if key.kind in ("continuous", "vector"):
            continue
        if key.name == old.task_key:
            found = [label.name for label in labels]
        else:
            found = []
            for case in cases:
                value = case.metadata.get(key.name)
                if not is_missing(value, key):
                    several = key.kind == "multilabel"
                    found += key.several(value) if several else [as_category(value)]
        for value in found:
            if value in key.values:
                continue
            if key.kind == "ordered":
                raise MetadataError(
                    f"metadata {key.name!r}: {value!r} is new, and where it ranks is not known"
                )
            new[key.name, value] = None
    return list(new)
