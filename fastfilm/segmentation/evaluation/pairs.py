"""Pairing of predictions with their truth, by case and label."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from ..data.sources import SUFFIXES, stem
from ..images.labels import whole_labels
from ..images.nifti import dangling, read_volume
from ..models.folder import LabelInfo
from ..prediction.many_cases import MANIFEST
from ..support.errors import Problems, UserError
from ..support.hints import did_you_mean, some
from ..support.names import file_name
from ..support.records import Plain, Record, inside, read_record

VALUES_AT_MOST = 1000
"""Number of different values in the truth up to which each is taken as a label."""


@dataclass
class Pair:
    """Prediction and truth of one label of one case.

    Attributes:
        case, subject: names of the case and its subject.
        label: name of the label, its values in the truth (empty: a mask of its own), and its value in the summary.
        written: its values in the prediction (empty: a mask of its own).
        prediction, truth: files.
        metadata: metadata of the case.
        image: first image of the case, if known.
    """

    case: str
    subject: str
    label: LabelInfo
    written: list[int]
    prediction: Path
    truth: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    image: Path | None = None


@dataclass
class Pairs:
    """All pairs of a folder.

    Attributes:
        pairs: the pairs, case by case.
        kinds: metadata key -> kind, where it is known.
        foreign: whether the predictions are of another program, with values that are not known beforehand.
        notes: a line for each note.
    """

    pairs: list[Pair]
    kinds: dict[str, str]
    foreign: bool
    notes: list[str]


class Entry(Record):
    """A case in predictions.json."""

    subject: str
    outputs: dict[str, str]
    images: list[str | None] = Field(default_factory=list)
    metadata: dict[str, Plain] = Field(default_factory=dict)
    truth: dict[str, str] = Field(default_factory=dict)


class Manifest(Record):
    """The entries of predictions.json that are read."""

    labels: list[LabelInfo] = Field(min_length=1)
    separate: bool
    cases: dict[str, Entry]
    kinds: dict[str, str] = Field(default_factory=dict)
    asked: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _labels_differ(self) -> Manifest:
        for what in ("name", "value"):
            every = [getattr(label, what) for label in self.labels]
            if len(set(every)) < len(every):
                raise ValueError(f"labels: two have the same {what}")
        return self


def find_pairs(
    folder: Path, truth: Path | None, labels: Mapping[str, Sequence[int]] | None = None
) -> Pairs:
    """The pairs of predictions and truth.

    A file in ``truth`` belongs to the case with its name, or with the longest name that its own begins with before
    a ``_``. For a mask of one label, the rest of the name ends in the label's name. Images and predictions of the
    cases are never taken as truth.

    Args:
        folder: folder of the predictions, described by its predictions.json if there is one.
        truth: folder of the truth, searched with all its subfolders; None: the files named in predictions.json
            (those of a plan's cases).
        labels: name -> values. With a predictions.json, the name of one of its labels has its values in the truth,
            and another name combines several of their values. None: the model's labels, or all values in the
                truth.

    Raises:
        UserError: a folder is missing, there are no predictions, labels do not fit, or predictions.json is
            damaged.
        Problems: cases have no truth, several possible files, or a prediction as truth.
    """
    manifest = _manifest(folder)
    foreign = manifest is None
    known = _foreign(folder) if manifest is None else manifest
    if not known.cases:
        raise UserError(f"{folder}: no predictions to evaluate")
    chosen = None if labels is None else _given(labels, manifest)
    if chosen is None and manifest is not None:
        chosen = [(i, [] if known.separate else [i.value]) for i in manifest.labels]
    own = [label.name for label, _ in chosen or [] if known.separate and not label.values]
    common = any(label.values for label, _ in chosen or [])
    outputs = {
        case: {k: inside(folder, p, f"{folder / MANIFEST}: {case}") for k, p in e.outputs.items()}
        for case, e in known.cases.items()
    }
    found, wrong = _truth(truth, folder, known, outputs, own, common)
    predicted = {_identity(p) for files in outputs.values() for p in files.values()} - {None}
    for case, by_label in found.items():
        wrong += [
            f"{case}: {path} is a prediction, and given as truth"
            for path in dict.fromkeys(by_label.values())
            if _identity(path) in predicted
        ]
    if wrong:
        raise Problems(f"{folder}: problems in the evaluation", wrong)
    if chosen is None:
        files = [p for by_label in found.values() for p in by_label.values()]
        chosen = [(_label(str(v), [v], v), [v]) for v in _values_in(files)]
    names = {label.name for label in known.labels}
    pairs = []
    without: dict[str, list[str]] = {}
    for case, entry in known.cases.items():
        for label, written in chosen:
            path = found[case].get(label.name)
            if path is None and label.values and (truth is not None or label.name not in names):
                # a label of the predictions without truth of its own was not annotated
                path = found[case].get("")
            if path is None:
                without.setdefault(label.name, []).append(case)
                continue
            what = label.name if known.separate else "labels"
            if what not in outputs[case]:
                raise UserError(f"{folder / MANIFEST}: {case}: outputs have no {what!r}")
            image = next((Path(p) for p in entry.images if p), None)
            pairs.append(
                Pair(
                    case=case,
                    subject=entry.subject,
                    label=label,
                    written=written,
                    prediction=outputs[case][what],
                    truth=path,
                    metadata=entry.metadata,
                    image=image,
                )
            )
    if not pairs:
        raise UserError(f"{folder}: no truth of {some([label.name for label, _ in chosen])}")
    where = f"in {truth}" if truth is not None else "known"
    notes = [
        f"{name}: no truth {where} for {len(cases)} of {len(known.cases)} cases: {some(cases)}"
        for name, cases in without.items()
    ]
    lost = [case for case in known.asked if case not in known.cases]
    if lost:
        notes.append(
            f"{len(lost)} of {len(known.asked)} cases have no prediction (they failed, or fastfilm predict was"
            f" interrupted) and are in no mean: {some(lost)}"
        )
    return Pairs(pairs, known.kinds, foreign, notes)


def _manifest(folder: Path) -> Manifest | None:
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{folder}: {dangling(folder)}")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    return read_record(path, Manifest, "a list of predictions of fastfilm predict")


def _foreign(folder: Path) -> Manifest:
    """Predictions of another program: each file is a case, with the subject of its BIDS name."""
    cases = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(SUFFIXES) and not path.name.startswith("."):
            name = stem(path)
            if name in cases:
                raise UserError(f"{folder}: {name} is there as .nii and as .nii.gz")
            subject = re.match(r"sub-[^_]+(?=_|$)", name)
            cases[name] = Entry(
                subject=subject[0] if subject else name, outputs={"labels": path.name}
            )
    return Manifest.model_construct(labels=[], separate=False, cases=cases, kinds={})


def _given(
    labels: Mapping[str, Sequence[int]], manifest: Manifest | None
) -> list[tuple[LabelInfo, list[int]]]:
    """The labels of the option ``--label``, each with its values in the predictions."""
    if manifest is None:
        return [(_label(k, v, v[0]), list(v)) for k, v in labels.items()]
    known = {label.name: label for label in manifest.labels}
    written = {label.value for label in manifest.labels}
    chosen = []
    for name, values in labels.items():
        if name in known:
            label = _label(name, values, known[name].value)
            chosen.append((label, [] if manifest.separate else [label.value]))
        elif manifest.separate or not set(values) <= written:
            theirs = ", ".join(f"{k}={label.value}" for k, label in known.items())
            raise UserError(
                f"--label {name}: the predictions have {theirs}{did_you_mean(name, known)}"
            )
        else:
            chosen.append((_label(name, values, values[0]), [*values]))
    keys = [label.value for label, _ in chosen]
    if len(set(keys)) < len(keys):
        raise UserError("--label: two labels have the same value in the predictions")
    return chosen


def _label(name: str, values: Sequence[int], value: int) -> LabelInfo:
    """A label of another program's files, whose values may be larger than those of ``LabelInfo``."""
    return LabelInfo.model_construct(name=name, values=list(values), value=value)


def _truth(
    truth: Path | None,
    folder: Path,
    known: Manifest,
    outputs: Mapping[str, Mapping[str, Path]],
    own: Sequence[str],
    common: bool,
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Case -> label ("" for a file of all labels) -> file, and a line for each case without a unique one.

    Args:
        own: labels with masks of their own in the truth.
        common: whether other labels are values of one file.
    """
    found: dict[str, dict[str, Path]] = {case: {} for case in known.cases}
    wrong = []
    if truth is None:
        for case, entry in known.cases.items():
            found[case] = {k: Path(p) for k, p in entry.truth.items()}
            if not known.separate and len(set(entry.truth.values())) == 1:
                # for labels that combine several
                found[case][""] = Path(next(iter(entry.truth.values())))
            if not found[case]:
                wrong.append(f"{case}: no truth; give --truth")
        return found, wrong
    taken = {Path(p) for e in known.cases.values() for p in e.images if p}
    taken.update(p for files in outputs.values() for p in files.values())
    matches = _matches(_files(truth, folder, taken), list(known.cases), own)
    for case in known.cases:
        mine = {label: files for (c, label), files in matches.items() if c == case}
        whole = mine.pop("", None) if own and not common else None
        if whole is not None and len(own) == 1:
            # a file without a label's name belongs to the only label
            mine.setdefault(own[0], whole)
        for files in mine.values():
            if len(files) > 1:
                wrong.append(f"{case}: several files could be its truth: {some(files)}")
        found[case] = {label: files[0] for label, files in mine.items()}
        if not mine:
            wrong.append(f"{case}: no truth in {truth}")
    return found, wrong


def _files(truth: Path, folder: Path, taken: set[Path]) -> Iterator[Path]:
    """The NIfTI files in ``truth``, without those in ``taken`` and those in ``folder``."""
    if truth.is_symlink() and not truth.exists():
        raise UserError(f"{truth}: {dangling(truth)}")
    if not truth.is_dir():
        raise UserError(f"{truth}: no such folder")
    same = {_identity(p) for p in taken} - {None}
    inner = folder.resolve() if truth.resolve() in folder.resolve().parents else None
    seen = set()
    for name, folders, files in os.walk(truth, followlinks=True):
        where = Path(name)
        real = where.resolve()
        if real in seen or real == inner:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            path = where / file
            if file.startswith(".") or not file.endswith(SUFFIXES):
                continue
            if _identity(path) not in same:
                yield path


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file, which are the same under all its names; None if there is no file."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return None
    return about.st_dev, about.st_ino


def _matches(
    files: Iterator[Path], cases: Sequence[str], labels: Sequence[str]
) -> dict[tuple[str, str], list[Path]]:
    """(case, label or "") -> files that could be its truth; files of exactly that name take precedence."""
    owner = {name: case for case in cases for name in (case, file_name(case))}
    ends = {name: label for label in labels for name in (label, file_name(label))}
    both = {f"{c}_{end}": (owner[c], label) for c in owner for end, label in ends.items()}
    exact: dict[tuple[str, str], list[Path]] = {}
    longer: dict[tuple[str, str], list[Path]] = {}
    for path in files:
        name = stem(path)
        if name in both:
            exact.setdefault(both[name], []).append(path)
            continue
        case = name
        while case and case not in owner:
            case = case.rpartition("_")[0]
        if not case:
            continue
        rest = name[len(case) :]
        fits = [end for end in ends if rest.endswith(f"_{end}")]
        label = ends[max(fits, key=len)] if fits else ""
        (longer if rest else exact).setdefault((owner[case], label), []).append(path)
    return {**longer, **exact}


def _values_in(files: Sequence[Path]) -> list[int]:
    """All values above 0 in the files; a file that cannot be read is reported by its case's evaluation.

    Raises:
        UserError: there are no values, or too many.
    """
    values: set[int] = set()
    wrong = ""
    for path in files:
        try:
            labels, _ = whole_labels(path, read_volume(path).array)
        except UserError as error:
            wrong = wrong or f"; {error}"
            continue
        values.update(int(v) for v in np.unique(labels) if v > 0)
        if len(values) > VALUES_AT_MOST:
            raise UserError(
                f"{path}: more than {VALUES_AT_MOST} values: not labels, or name them with --label NAME=VALUE"
            )
    if not values:
        raise UserError(
            f"the truth has no label, {len(files)} files without a value above 0{wrong}"
        )
    return sorted(values)
