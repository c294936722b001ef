"""Which prediction and which truth belong together: case by case, label by label."""

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
from ..support.records import (
    Plain,
    Record,
    inside,
    read_record,
)

VALUES_AT_MOST = 1000
"""Different values in the truth up to which each is taken as a label."""


@dataclass
class Pair:
    """Prediction and truth of one label of one case.

    Attributes:
        case, subject: names.
        label: name, values in the truth (none: a mask of its own), and the value that the summary is keyed by.
        written: values in the prediction; none: a mask of its own.
        prediction, truth: files.
        metadata: of the case.
        image: its first image, where it is known.
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
        kinds: metadata key -> category, continuous, ordered or multilabel, where it is known.
        foreign: the predictions are of another program: their values are not known beforehand.
        notes: what is worth knowing, a line each.
    """

    pairs: list[Pair]
    kinds: dict[str, str]
    foreign: bool
    notes: list[str]


class Entry(Record):
    """One case in predictions.json."""

    subject: str
    outputs: dict[str, str]
    images: list[str | None] = Field(default_factory=list)
    metadata: dict[str, Plain] = Field(default_factory=dict)
    truth: dict[str, str] = Field(default_factory=dict)


class Manifest(Record):
    """What is read of predictions.json."""

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
    """Which files belong together.

    Args:
        folder: predictions; predictions.json, if there, says what they are.
        truth: folder with the truth, searched with all folders in it; None: the files that the predictions came
            with (those of a plan's cases).
        labels: name -> values in the files. For predictions with a predictions.json: of a label of theirs, its
            values in the truth; another name stands for several of their values together. None: the model's, or
            all values that the truth has.

    A file in ``truth`` is of the case that it is called like, perhaps with ``_`` and more behind it; of two such
    cases it is of the one with the longer name. With masks of their own, the name goes on or ends in the label's.
    Images and predictions of the cases are never taken for truth.

    Raises:
        UserError: no such folder, no predictions, labels that do not fit, a damaged predictions.json.
        Problems: cases without truth, with several files that could be it, or with a prediction as truth.
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
                # a label of the predictions that their truth leaves out was not annotated
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
    """Every file as a case; BIDS names say whose it is."""
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
    """Each label, and its values in the predictions."""
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
    """Of a file of another program, whose values may be larger than those that fastfilm writes."""
    return LabelInfo.model_construct(name=name, values=list(values), value=value)


def _truth(
    truth: Path | None,
    folder: Path,
    known: Manifest,
    outputs: Mapping[str, Mapping[str, Path]],
    own: Sequence[str],
    common: bool,
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Case -> label ("" for a file of all labels) -> file, and a line for each case that has none or too many.

    Args:
        own: labels with masks of their own in the truth.
        common: other labels are values of one file.
    """
    found: dict[str, dict[str, Path]] = {case: {} for case in known.cases}
    wrong = []
    if truth is None:
        for case, entry in known.cases.items():
            found[case] = {k: Path(p) for k, p in entry.truth.items()}
            if not known.separate and len(set(entry.truth.values())) == 1:
                # of a label that the user makes of several
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
            # a file that names no label can be of the only one
            mine.setdefault(own[0], whole)
        for files in mine.values():
            if len(files) > 1:
                wrong.append(f"{case}: several files could be its truth: {some(files)}")
        found[case] = {label: files[0] for label, files in mine.items()}
        if not mine:
            wrong.append(f"{case}: no truth in {truth}")
    return found, wrong


def _files(truth: Path, folder: Path, taken: set[Path]) -> Iterator[Path]:
    """NIfTI files in ``truth``, without those in ``taken`` and those of a folder of predictions inside it."""
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
    """Of the file, under whatever name; None where there is none."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return None
    return about.st_dev, about.st_ino


def _matches(
    files: Iterator[Path], cases: Sequence[str], labels: Sequence[str]
) -> dict[tuple[str, str], list[Path]]:
    """(case, label or "") -> the files that could be its truth; those with just that name go first."""
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
    """The values above 0 in any of the files; a file that cannot be read is left to its case's evaluation.

    Raises:
        UserError: none in any file, or too many.
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
