"""What a data set is made of: cases, the names of their files, and where a case's metadata come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config.schema import Config
from ..config.sections import MetadataKey
from ..metadata.dicom import read_tags
from ..metadata.encoder import (
    KeyEncoder,
    is_blank,
    is_missing,
)
from ..metadata.vectors import read_vector
from ..support.hints import some

SUFFIXES = (".nii.gz", ".nii")

IMAGE_ENTITIES = frozenset({"ce", "trc", "stain", "mod", "echo", "flip", "inv", "mt", "part"})
"""BIDS entities that make another kind of image: a file that has one belongs to a contrast only if it names it."""


@dataclass(frozen=True)
class Case:
    """One thing to segment.

    Attributes:
        id: unique in the data set.
        subject: whose image it is: all cases of a subject are in one split.
        images: one a channel, None where a contrast is missing.
        labels: label name -> its file; a name that is not there was not annotated.
        metadata: key -> value as found, None where missing.
        split: "train", "val" or "test" where the data set says so.
        origins: key -> where its value was found: table, entity, sidecar, inherited sidecar, dicom.
        stamps: file -> its size and time when it was checked.
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; inverse of ``from_json``."""
        return {
            "id": self.id,
            "subject": self.subject,
            "images": [None if p is None else str(p) for p in self.images],
            "labels": {k: str(p) for k, p in self.labels.items()},
            "metadata": self.metadata,
            "split": self.split,
            "origins": self.origins,
            "stamps": self.stamps,
            "vectors": {k: str(p) for k, p in self.vectors.items()},
        }

    def stamped(self) -> Case:
        """With the size and time that its files have now."""
        images = [p for p in self.images if p is not None]
        files = [*images, *self.labels.values(), *self.vectors.values()]
        found = {str(p): p.stat() for p in dict.fromkeys(files) if p.exists()}
        return replace(self, stamps={k: [s.st_size, s.st_mtime_ns] for k, s in found.items()})

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Case:
        """The case in ``to_json``'s value."""
        return cls(
            id=value["id"],
            subject=value["subject"],
            images=tuple(None if p is None else Path(p) for p in value["images"]),
            labels={k: Path(p) for k, p in value["labels"].items()},
            metadata=dict(value["metadata"]),
            split=value["split"],
            origins=dict(value.get("origins", {})),
            stamps=dict(value.get("stamps", {})),
            vectors={k: Path(p) for k, p in value.get("vectors", {}).items()},
        )

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


@dataclass
class Places:
    """Where metadata were looked for.

    Attributes:
        table: the table, None where there is none.
        columns: of the table.
        entities: that file names have.
        sidecar: keys of the JSON sidecars.
    """

    table: Path | None = None
    columns: list[str] = field(default_factory=list)
    entities: set[str] = field(default_factory=set)
    sidecar: set[str] = field(default_factory=set)


@dataclass
class Found:
    """What a data set holds.

    Attributes:
        cases: in the order of their names.
        problems: everything that is wrong with it, one line each.
        notes: what is not wrong but worth knowing, one line each.
        places: where metadata were looked for.
        unlabelled: the cases that were left out as no label file is there.
        excluded: names of ``data.exclude`` that are there.
        several: cases with label files of several contrasts.
    """

    cases: list[Case] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    places: Places = field(default_factory=Places)
    unlabelled: list[str] = field(default_factory=list)
    excluded: set[str] = field(default_factory=set)
    several: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sidecar:
    """The JSON values that hold for an image, and which of them stand in files further up (BIDS inheritance).

    Attributes:
        folder: that paths in the values are relative to: the BIDS data set's root, else the image's folder.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    inherited: frozenset[str] = frozenset()
    folder: Path = field(default_factory=Path)


@dataclass
class Metadata:
    """What was found for a case.

    Attributes:
        values: key -> value, None where no place has one.
        origins: key -> the place that has it.
        vectors: key -> the .npy file that its value was read from.
        problems: vectors and DICOM headers that cannot be read, one line each.
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
    """Each key's value from the first place that has it.

    Args:
        folder: the table's; paths in ``row`` are relative to it.
        dicom: file or folder that the image was made from, where it is known.

    Raises:
        UserError: a DICOM header is asked for, and pydicom is not installed, or the keyword is none of DICOM's.
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
    """The table's columns with a vector's components; none for a key whose value is one cell or entry."""
    return (key.columns if isinstance(key, MetadataKey) else key.table_columns) or []


def finish(
    found: Found, case: Case, config: Config, row: Mapping[str, str], expected: Mapping[str, str]
) -> None:
    """Adds the case, with the labels that were annotated, unless it is to be left out.

    Args:
        expected: label -> where its file was looked for.
    """
    data, labels = config.data, dict(case.labels)
    if data.annotated_column is not None:
        text = row.get(data.annotated_column, "")
        annotated = [] if is_blank(text) else [t.strip() for t in text.split(";") if t.strip()]
        for name in annotated:
            if name not in data.labels:
                found.problems.append(
                    f"{case.id}: {data.annotated_column} names {name!r}, which is no label"
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
        # without any label there is nothing to learn from
        found.unlabelled.append(case.id)
        return
    found.cases.append(Case(**{**vars(case), "labels": labels}))


def split_of(config: Config, row: Mapping[str, str], where: str, found: Found) -> str | None:
    """The part of a fixed split that a row names; None without one."""
    if config.splits.column is None or config.splits.column not in row:
        # a column or row that is not there is said once
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
    """The name without .nii or .nii.gz."""
    for s in SUFFIXES:
        if path.name.endswith(s):
            return path.name.removesuffix(s)
    return path.stem


def contrast_of(path: Path, contrasts: list[str]) -> str | None:
    """The most specific contrast that the file is of."""
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
    """Metadata that an image's file name carries: its BIDS entities, ``suffix`` and ``contrast``."""
    entities, suffix = parts(path)
    return {**entities, "suffix": suffix, "contrast": contrast_of(path, contrasts) or suffix}
