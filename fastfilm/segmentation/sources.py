"""Data sets -> cases: which files belong together, and the metadata of each."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import Config, Data, MetadataKey
from .errors import UserError
from .metadata import KeyEncoder, is_missing

SUFFIXES = (".nii.gz", ".nii")

IMAGE_ENTITIES = frozenset({"ce", "trc", "stain", "mod", "echo", "flip", "inv", "mt", "part"})
"""BIDS entities that make another kind of image: a file that has one belongs to a contrast only if it names it."""


@dataclass(frozen=True)
class Case:
    """One thing to segment.

    Attributes:
        id: unique, usable as a file name.
        subject: whose image it is: all cases of a subject are in one split.
        images: one a channel, None where a contrast is missing.
        labels: label name -> its file; a name that is not there was not annotated.
        metadata: key -> value as found, None where missing.
        split: "train", "val" or "test" where the data set says so.
    """

    id: str
    subject: str
    images: tuple[Path | None, ...]
    labels: dict[str, Path]
    metadata: dict[str, Any] = field(default_factory=dict)
    split: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; inverse of ``from_json``."""
        return {
            "id": self.id,
            "subject": self.subject,
            "images": [None if p is None else str(p) for p in self.images],
            "labels": {k: str(p) for k, p in self.labels.items()},
            "metadata": self.metadata,
            "split": self.split,
        }

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
        )


@dataclass(frozen=True)
class Found:
    """What a data set holds: its cases, and everything that is wrong with it (one line each)."""

    cases: list[Case]
    problems: list[str]


def find_cases(config: Config) -> Found:
    """The cases of ``config.data``, in the order of their names.

    Raises:
        UserError: no such folder or file, or nothing in it that matches.
    """
    data = config.data
    found = _bids(config) if data.source == "bids" else _table_cases(config)
    cases = [c for c in found.cases if c.subject not in data.exclude and c.id not in data.exclude]
    if not cases and not found.problems:
        raise UserError(f"{data.root}: no images of the contrasts {', '.join(data.contrasts)}")
    return Found(sorted(cases, key=lambda c: c.id), found.problems)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a .tsv (tabs) or .csv table, column -> text.

    Raises:
        UserError: no such file, no columns, a row with more cells than columns (its line is named).
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            rows = []
            for row in reader:
                if None in row:
                    raise UserError(f"{path}: line {reader.line_num} has more cells than columns")
                rows.append({k.strip(): (v or "").strip() for k, v in row.items()})
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a table: {error}") from error
    return rows


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


def _bids(config: Config) -> Found:
    data = config.data
    if not data.root.is_dir():
        raise UserError(f"{data.root}: no such folder")
    rows, problems = _participants(config)
    groups: dict[tuple[str, str], dict[str, Path]] = {}
    for path in _images(data.root):
        contrast = contrast_of(path, data.contrasts)
        if contrast is None:
            continue
        entities, _ = parts(path)
        own = {k for k, _, _ in (p.partition("-") for p in contrast.split("_")[:-1])}
        rest = [f"{k}-{v}" for k, v in entities.items() if k not in own]
        case = "_".join(rest) + (f"_{contrast}" if data.combine == "samples" else "")
        channels = groups.setdefault((f"sub-{entities['sub']}", case), {})
        if contrast in channels:
            problems.append(f"{path} and {channels[contrast]}: both are {contrast} of case {case}")
        channels[contrast] = path
    cases: list[Case] = []
    for (subject, case), channels in sorted(groups.items()):
        if subject in data.exclude or case in data.exclude:
            continue
        names = list(channels) if data.combine == "samples" else data.contrasts
        absent = [n for n in names if n not in channels]
        if absent and data.missing_contrast == "skip":
            continue
        if absent and data.missing_contrast == "error":
            problems.append(f"{case}: no image of contrast {', '.join(absent)}")
        labels = {
            name: file
            for name, label in data.labels.items()
            if (file := _bids_label(data, channels, label.suffix or data.label_suffix)) is not None
        }
        row = rows.get(subject)
        if row is None and rows and _uses_table(config, next(iter(rows.values()))):
            problems.append(f"{data.root / data.table}: no row for {subject}")
        row = row or {}
        first = channels[names[0]] if names[0] in channels else next(iter(channels.values()))
        cases += _finish(
            Case(
                id=case,
                subject=subject,
                images=tuple(channels.get(n) for n in names),
                labels=labels,
                metadata=find_metadata(
                    config.metadata,
                    row,
                    find_entities(first, data.contrasts),
                    read_sidecar(first, problems),
                ),
                split=_split(config, row, case, problems),
            ),
            config,
            row,
            problems,
        )
    return Found(cases, problems)


def _finish(
    case: Case, config: Config, row: Mapping[str, str], problems: list[str]
) -> Iterable[Case]:
    """The case with the labels that were annotated; none if it is to be left out."""
    data, labels = config.data, dict(case.labels)
    if data.annotated_column is not None:
        text = row.get(data.annotated_column, "")
        annotated = [] if is_missing(text) else [t.strip() for t in text.split(";") if t.strip()]
        for name in annotated:
            if name not in data.labels:
                problems.append(
                    f"{case.id}: {data.annotated_column} names {name!r}, which is no label"
                )
        labels = {k: v for k, v in labels.items() if k in annotated}
    absent = [n for n in data.labels if n not in labels]
    if absent and data.annotated_column is None and data.missing_labels == "error":
        problems.append(f"{case.id}: no label file for {', '.join(absent)}")
    if absent and data.missing_labels == "skip":
        return []
    if not labels and data.missing_labels == "mask":
        # nothing to learn from
        return []
    return [Case(case.id, case.subject, case.images, labels, case.metadata, case.split)]


def _images(root: Path) -> Iterator[Path]:
    for subject in sorted(root.glob("sub-*")):
        for path in sorted(subject.rglob("*")):
            if path.name.endswith(SUFFIXES) and path.name.startswith("sub-"):
                yield path


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


def _bids_label(data: Data, channels: Mapping[str, Path], suffix: str) -> Path | None:
    names = [data.label_contrast] if data.label_contrast else list(channels)
    for name in names:
        image = channels.get(name)
        if image is None:
            continue
        folder = data.root / data.derivatives / image.parent.relative_to(data.root)
        for s in SUFFIXES:
            path = folder / f"{stem(image)}_{suffix}{s}"
            if path.exists():
                return path
    return None


def _participants(config: Config) -> tuple[dict[str, dict[str, str]], list[str]]:
    path = config.data.root / config.data.table
    needed = any(k.source == "table" for k in config.metadata.values()) or config.splits.column
    if not path.exists():
        return {}, [f"{path}: no such table"] if needed else []
    rows: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for i, row in enumerate(read_table(path), start=2):
        subject = row.get("participant_id", "")
        if not subject:
            problems.append(f"{path}: line {i} has no participant_id")
            continue
        subject = subject if subject.startswith("sub-") else f"sub-{subject}"
        if subject in rows:
            problems.append(f"{path}: line {i}: a second row for {subject}")
        rows[subject] = row
    return rows, problems


def _uses_table(config: Config, columns: Mapping[str, str]) -> bool:
    """Whether a metadata key or the split comes from the table."""
    keys = [k for k, c in config.metadata.items() if c.source in ("auto", "table")]
    return any(k in columns for k in [*keys, config.splits.column])


def find_entities(path: Path, contrasts: list[str]) -> dict[str, str]:
    """Metadata that an image's file name carries: its BIDS entities, ``suffix`` and ``contrast``."""
    entities, suffix = parts(path)
    return {**entities, "suffix": suffix, "contrast": contrast_of(path, contrasts) or suffix}


def read_sidecar(image: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object beside an image; {} where there is none. What cannot be read is added to ``problems``."""
    path = image.with_name(f"{stem(image)}.json")
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read as JSON: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def find_metadata(
    keys: Mapping[str, MetadataKey] | Mapping[str, KeyEncoder],
    row: Mapping[str, str],
    entities: Mapping[str, str],
    sidecar: Mapping[str, Any],
) -> dict[str, Any]:
    """Each key's value from the first place that has it; None where none has."""
    places: dict[str, Mapping[str, Any]] = {"table": row, "entity": entities, "sidecar": sidecar}
    values = {}
    for name, key in keys.items():
        order = places.values() if key.source == "auto" else [places[key.source]]
        candidates = (p[name] for p in order if name in p)
        values[name] = next((v for v in candidates if not is_missing(v, key.missing)), None)
    return values


def _split(config: Config, row: Mapping[str, str], case: str, problems: list[str]) -> str | None:
    if config.splits.column is None:
        return None
    names = {"train": "train", "training": "train", "val": "val", "valid": "val"}
    names |= {"validation": "val", "test": "test"}
    value = row.get(config.splits.column, "")
    if value.lower() not in names:
        problems.append(
            f"{case}: column {config.splits.column!r} must be train, val or test, got {value!r}"
        )
        return None
    return names[value.lower()]


def _table_cases(config: Config) -> Found:
    data = config.data
    problems: list[str] = []
    rows = read_table(data.root)
    if not rows:
        raise UserError(f"{data.root}: the table has no rows")
    wanted = {*data.contrasts, *(c for c in [config.splits.column, data.annotated_column] if c)}
    wanted |= {label.column or data.label_column for label in data.labels.values()}
    wanted |= {k for k, c in config.metadata.items() if c.source == "table"}
    for column in sorted(wanted - set(rows[0])):
        problems.append(f"{data.root}: no column {column!r}; it has {', '.join(rows[0])}")
    if problems:
        return Found([], problems)
    cases: list[Case] = []
    taken: dict[str, int] = {}
    for line, row in enumerate(rows, start=2):
        paths = {
            c: None if is_missing(row[c]) else data.root.parent / row[c] for c in data.contrasts
        }
        there = [p for p in paths.values() if p is not None]
        name = row.get("case") or row.get("id") or row.get("subject")
        where = f"{data.root}: line {line}"
        if not there:
            problems.append(f"{where}: no image")
            continue
        name = re.sub(r"[^\w.=+-]", "_", name or stem(there[0]))
        subject = row.get("subject") or name
        missing = [c for c, p in paths.items() if p is None]
        if missing and data.combine == "channels":
            if data.missing_contrast == "skip":
                continue
            if data.missing_contrast == "error":
                problems.append(f"{where}: no image in column {', '.join(missing)}")
        labels = {}
        for label, c in data.labels.items():
            value = row[c.column or data.label_column]
            if not is_missing(value):
                labels[label] = data.root.parent / value
        channels: list[tuple[str, tuple[Path | None, ...]]] = [(name, tuple(paths.values()))]
        if data.combine == "samples" and len(data.contrasts) > 1:
            channels = [(f"{name}_{c}", (p,)) for c, p in paths.items() if p is not None]
        for case, images in channels:
            if case in taken:
                problems.append(f"{where}: case {case!r} is in line {taken[case]} already")
                continue
            taken[case] = line
            first = next(p for p in images if p is not None)
            column = next(c for c, p in paths.items() if p == first)
            metadata = find_metadata(
                config.metadata, row, {"contrast": column}, read_sidecar(first, problems)
            )
            made = Case(
                case, subject, images, labels, metadata, _split(config, row, where, problems)
            )
            cases += _finish(made, config, row, problems)
    return Found(cases, problems)
