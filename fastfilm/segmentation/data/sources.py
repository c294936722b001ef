"""Cases, the names of their files, and the places of their metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from ..config.schema import Config
from ..config.sections import MetadataKey
from ..metadata.dicom import read_tags
from ..metadata.encoder import KeyEncoder, is_blank, is_missing
from ..metadata.vectors import read_vector
from ..support.hints import some

SUFFIXES = (".nii.gz", ".nii")

IMAGE_ENTITIES = frozenset({"ce", "trc", "stain", "mod", "echo", "flip", "inv", "mt", "part"})
"""BIDS entities of another kind of image: a file with one belongs to a contrast only if the contrast names it."""


@dataclass(frozen=True)
class Case:
    """An image, of one or more channels, with its labels and metadata.

    Attributes:
        id: name of the case, unique in the data set.
        subject: name of the subject; all cases of a subject are in one part of a split.
        images: file of each channel, None for a missing contrast.
        labels: name of an annotated label -> its file.
        metadata: key -> value as found, None if missing.
        split: "train", "val" or "test" if the data set names the part.
        origins: key -> place of its value: table, entity, sidecar, inherited sidecar or dicom.
        stamps: file -> its size in bytes and modification time in nanoseconds when it was checked.
        vectors: key -> the .npy file that its value was read from.
    """

    id: str
    subject: str
    images: tuple[Path | None, ...]
    labels: dict[str, Path]
    metadata: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    origins: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, list[int]] = field(default_factory=dict)
    vectors: dict[str, Path] = field(default_factory=dict)

    def stamped(self) -> Case:
        """The case with the present sizes and times of its files."""
        images = [p for p in self.images if p is not None]
        files = [*images, *self.labels.values(), *self.vectors.values()]
        found = {str(p): p.stat() for p in dict.fromkeys(files) if p.exists()}
        return replace(self, stamps={k: [s.st_size, s.st_mtime_ns] for k, s in found.items()})

    def changed_vectors(self) -> list[str]:
        """A line for each vector whose file no longer holds the numbers that the plan was made with."""
        wrong = []
        for name, path in self.vectors.items():
            stamp = path.stat() if path.exists() else None
            if stamp and [stamp.st_size, stamp.st_mtime_ns] == self.stamps.get(str(path)):
                continue
            try:
                same = read_vector(str(path), Path())[0] == self.metadata[name]
                what = "" if same else f"{path}: has changed since the plan was made"
            except ValueError as error:
                what = str(error)
            if what:
                wrong.append(f"{self.id}: metadata {name!r}: {what}; run fastfilm plan again")
        return wrong


CASES = TypeAdapter(list[Case])
"""Reads and writes the cases of cases.json."""


@dataclass
class Places:
    """The places in which metadata were looked for.

    Attributes:
        table: the table; None if there is none.
        columns: columns of the table.
        entities: entities in the names of image files.
        sidecar: keys in JSON sidecars.
    """

    table: Path | None = None
    columns: list[str] = field(default_factory=list)
    entities: set[str] = field(default_factory=set)
    sidecar: set[str] = field(default_factory=set)


@dataclass
class Found:
    """The content of a data set.

    Attributes:
        cases: cases in the order of their names.
        problems: a line for each problem.
        notes: a line for each remark that is not a problem.
        places: the places in which metadata were looked for.
        unlabelled: cases that were left out because they have no label file.
        excluded: names in ``data.exclude`` that exist.
        several: cases with label files of several contrasts.
    """

    cases: list[Case] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    places: Places = field(default_factory=Places)
    unlabelled: list[str] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    several: list[str] = field(default_factory=list)

    def note(self, text: str, names: Sequence[str]) -> None:
        """Adds a note with the number of ``names`` and the first of them, if there are any."""
        if names:
            self.notes.append(f"{len(names)} {text}: {some(names)}")


@dataclass(frozen=True)
class Sidecar:
    """The JSON values that apply to an image.

    Attributes:
        values: key -> value.
        inherited: keys of values from other files than the one beside the image (BIDS inheritance).
        folder: folder that paths in the values are relative to: the BIDS data set's root, else the image's folder.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    inherited: frozenset[str] = frozenset()
    folder: Path = field(default_factory=Path)


@dataclass
class Metadata:
    """The metadata of a case.

    Attributes:
        values: key -> value, None if no place has one.
        origins: key -> the place of its value.
        vectors: key -> the .npy file that its value was read from.
        problems: a line for each vector or DICOM header that cannot be read.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def find_metadata(
    keys: Mapping[str, MetadataKey] | Mapping[str, KeyEncoder],
    row: Mapping[str, str],
    entities: Mapping[str, str],
    sidecar: Sidecar,
    folder: Path,
    dicom: Path | None = None,
) -> Metadata:
    """The value of each key from the first place that has one.

    Args:
        keys: name -> key, of a configuration or of a model.
        row: the case's row of the table.
        entities: entities in the name of its image.
        sidecar: its JSON values.
        folder: folder that paths in ``row`` are relative to.
        dicom: file or folder with DICOM headers of the image, if known.

    Raises:
        UserError: a DICOM header is needed, and pydicom is not installed or DICOM has no such keyword.
    """
    found = Metadata()
    tags = {name: key.tag or name for name, key in keys.items() if key.source == "dicom"}
    headers: dict[str, Any] = {}
    if tags and dicom is not None:
        try:
            headers, found.problems = read_tags(dicom, tags)
        except ValueError as error:
            found.problems = [f"metadata {name!r}: {error}" for name in tags]
    places: dict[str, Mapping[str, Any]] = {
        "table": row,
        "entity": entities,
        "sidecar": sidecar.values,
        "dicom": headers,
    }
    for name, key in keys.items():
        found.values[name] = None
        for place in ("table", "entity", "sidecar") if key.source == "auto" else [key.source]:
            value = places[place].get(name)
            columns = columns_of(key)
            if columns:
                value = None if place != "table" else [row.get(c) for c in columns]
            if is_missing(value, key):
                continue
            inherited = place == "sidecar" and name in sidecar.inherited
            found.origins[name] = "inherited sidecar" if inherited else place
            if key.kind == "vector":
                base = folder if place == "table" else sidecar.folder
                _read_vector(found, name, key, value, base)
            else:
                found.values[name] = value
            break
    return found


def _read_vector(
    found: Metadata, name: str, key: MetadataKey | KeyEncoder, value: Any, folder: Path
) -> None:
    columns = columns_of(key)
    gone = [c for c, v in zip(columns, value, strict=True) if is_missing(v, key)] if columns else []
    if gone:
        found.problems.append(
            f"metadata {name!r}: {len(gone)} of {len(columns)} components are missing: {some(gone)}"
        )
        return
    try:
        found.values[name], path = read_vector(value, folder)
    except ValueError as error:
        found.problems.append(f"metadata {name!r}: {error}")
        return
    if path is not None:
        found.vectors[name] = path.resolve()


def columns_of(key: MetadataKey | KeyEncoder) -> list[str]:
    """The table's columns with a vector's components; empty for a key with one cell or entry."""
    return (key.columns if isinstance(key, MetadataKey) else key.table_columns) or []


def add_case(
    found: Found,
    config: Config,
    case: Case,
    *,
    row: Mapping[str, str],
    entities: Mapping[str, str],
    sidecar: Sidecar,
    folder: Path,
    dicom: Path | None,
    expected: Mapping[str, str],
    where: str,
) -> None:
    """Adds a case with its metadata, its part of a fixed split and its annotated labels, unless it is left out.

    Args:
        case: id, subject, images and labels of the case.
        row, entities, sidecar, folder, dicom: places of its metadata, as for ``find_metadata``.
        expected: label -> where its file was looked for.
        where: beginning of messages about the metadata and the split.
    """
    found.places.entities |= entities.keys()
    found.places.sidecar |= sidecar.values.keys()
    metadata = find_metadata(config.metadata, row, entities, sidecar, folder, dicom)
    found.problems += [f"{where}: {p}" for p in metadata.problems]
    split = _split_of(config, row, where, found)
    data, labels = config.data, dict(case.labels)
    if data.annotated_column is not None:
        text = row.get(data.annotated_column, "")
        annotated = [] if is_blank(text) else [t.strip() for t in text.split(";") if t.strip()]
        for name in annotated:
            if name not in data.labels:
                found.problems.append(
                    f"{case.id}: {data.annotated_column} names {name!r}, which is not a label"
                )
            elif name not in labels:
                found.problems.append(
                    f"{case.id}: {data.annotated_column} says that {name} was annotated; there is no"
                    f" {expected.get(name, 'file of it')}"
                )
        labels = {k: v for k, v in labels.items() if k in annotated}
    absent = [n for n in data.labels if n not in labels]
    if absent and data.annotated_column is None and data.missing_labels == "error":
        places = dict.fromkeys(expected[n] for n in absent if n in expected)
        where = f"; looked for {', '.join(places)}" if places else ""
        found.problems.append(f"{case.id}: no label file for {', '.join(absent)}{where}")
    allowed = data.annotated_column is not None or data.missing_labels == "mask"
    if (absent and data.missing_labels == "skip") or (not labels and allowed):
        # a case without any label cannot train the network
        found.unlabelled.append(case.id)
        return
    found.cases.append(
        replace(
            case,
            labels=labels,
            metadata=metadata.values,
            split=split,
            origins=metadata.origins,
            vectors=metadata.vectors,
        )
    )


def _split_of(config: Config, row: Mapping[str, str], where: str, found: Found) -> str | None:
    """The part of a fixed split that a row names; None without one."""
    if config.splits.column is None or config.splits.column not in row:
        # a missing column or row is reported elsewhere, once
        return None
    names = {"train": "train", "training": "train", "val": "val", "valid": "val"}
    names |= {"validation": "val", "test": "test"}
    value = row.get(config.splits.column, "")
    if value.lower() not in names:
        found.problems.append(
            f"{where}: column {config.splits.column!r} must be train, val or test, got {value!r}"
        )
        return None
    return names[value.lower()]


def parts(path: Path) -> tuple[dict[str, str], str]:
    """Entities and suffix of a BIDS file name: ``sub-1_ses-2_T1w.nii.gz`` -> ({sub: 1, ses: 2}, T1w)."""
    *entities, suffix = stem(path).split("_")
    pairs = (e.partition("-") for e in entities)
    return {k: v for k, _, v in pairs}, suffix


def stem(path: Path) -> str:
    """The name of an image file without .nii or .nii.gz."""
    for s in SUFFIXES:
        if path.name.endswith(s):
            return path.name.removesuffix(s)
    return path.stem


def contrast_of(path: Path, contrasts: list[str]) -> str | None:
    """The contrast of an image file, the most specific one if several match; None if none does."""
    entities, suffix = parts(path)
    have = {f"{k}-{v}" for k, v in entities.items()}
    best: tuple[int, str] | None = None
    for contrast in contrasts:
        *wanted, last = contrast.split("_")
        if last != suffix or not have.issuperset(wanted):
            continue
        left = {e.partition("-")[0] for e in have.difference(wanted)}
        if left & IMAGE_ENTITIES:
            continue
        if best is None or len(wanted) > best[0]:
            best = (len(wanted), contrast)
    return None if best is None else best[1]


def find_entities(path: Path, contrasts: list[str]) -> dict[str, str]:
    """The metadata in the name of an image file: its BIDS entities, ``suffix`` and ``contrast``."""
    entities, suffix = parts(path)
    return {**entities, "suffix": suffix, "contrast": contrast_of(path, contrasts) or suffix}
