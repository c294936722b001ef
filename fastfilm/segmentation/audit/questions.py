"""The questions of an audit; each is a statistical test on the rows, with a finding as its answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import prediction
from .association import associate
from .findings import CLASS, FEWEST, Finding
from .rows import Column, Rows
from .values import is_identifier

Array = NDArray[np.float64]

How = tuple[int, int]
"""Seed of a test, and its number of permutations at most."""


@dataclass(frozen=True)
class Question:
    """A test of an audit.

    Attributes:
        kind, about: those of the finding.
        ask: performs the test.
    """

    kind: str
    about: str
    ask: Callable[[], Finding]


def label_questions(rows: Rows, how: How) -> Iterator[Question]:
    """Predictions of each label's presence and volume from all input keys together, and from each key."""
    sources = {name: name for name in rows.encoded}
    tables = dict(rows.encoded)
    if len(rows.inputs) > 1:
        sources = {"all input keys": "all input keys", **sources}
        tables["all input keys"] = np.concatenate([rows.encoded[k] for k in rows.inputs], 1)
    for label, volume in rows.volumes.items():
        known = ~np.isnan(volume)
        here = volume[known] > 0
        n = int(known.sum())
        if n < FEWEST:
            rows.notes.append(f"label {label} is annotated in {n} subjects: not audited")
            continue
        both = min(int(here.sum()), int((~here).sum()))
        if 0 < both < CLASS:
            rows.notes.append(
                f"presence of {label} is not audited: {both} subjects are unlike the others, {CLASS} are needed"
            )
        for source in sources:
            x = tables[source][known]
            if both >= CLASS:
                about = f"{source} -> presence of {label}"
                yield _predicted("label", about, "AUC", x, here, 0.5, how)
            if np.ptp(volume[known]) > 0:
                about, y = f"{source} -> volume of {label}", np.log1p(volume[known])
                yield _predicted("label", about, "R2", x, y, 0.0, how)


def image_questions(rows: Rows, kind: str, x: Array, how: How) -> Iterator[Question]:
    """Predictions of each column of the metadata from features of the images.

    Args:
        kind: "intensity" or "geometry".
        x: features [n, f].
    """
    if not (np.ptp(x, 0) > 0).any():
        rows.notes.append(f"{kind} is the same in all images: nothing is predicted from it")
        return
    for column in rows.columns:
        about = f"{kind} -> {column.name}"
        if not column.categorical:
            there = column.there()
            if there.sum() >= FEWEST and np.ptp(column.x[there]) > 0:
                yield _predicted(kind, about, "R2", x[there], column.x[there], 0.0, how)
            continue
        values, counts = np.unique(column.x[column.there()], return_counts=True)
        common = values[counts >= CLASS]
        used = np.isin(column.x, common)
        if len(common) < 2 or used.sum() < FEWEST:
            if len(values) > 1:
                rows.notes.append(
                    f"{about} is not audited: fewer than two values with {CLASS} subjects each"
                )
            continue
        y = np.searchsorted(common, column.x[used])
        chance = 1 / len(common)
        yield _predicted(kind, about, "balanced accuracy", x[used], y, chance, how)


def pair_questions(rows: Rows, how: How) -> Iterator[Question]:
    """Associations between columns of different keys."""
    usable = [c for c in rows.columns if not is_identifier(c)]
    for i, a in enumerate(usable):
        for b in usable[i + 1 :]:
            if a.key != b.key:
                yield from _associated("confounding", a, b, how)


def gap_questions(rows: Rows, chosen_by: set[str], how: How) -> Iterator[Question]:
    """Associations of each column with annotation and fold, and of its missing values with the labels.

    Args:
        chosen_by: keys by which the folds were made, and which are therefore associated with the fold.
    """
    usable = [c for c in rows.columns if not is_identifier(c)]
    fold = _of("fold", rows.fold, [str(k) for k in range(int(np.nanmax([*rows.fold, 0])) + 1)])
    for column in usable:
        for label, volume in rows.volumes.items():
            annotated = _of(f"{label} annotated", ~np.isnan(volume), ["no", "yes"])
            yield from _associated("annotation", column, annotated, how)
        if column.key not in chosen_by:
            yield from _associated("fold", column, fold, how)
    seen = set()
    for column in rows.columns:
        if column.key in seen:
            continue
        seen.add(column.key)
        gap = _of(f"{column.key} missing", ~column.there(), ["no", "yes"])
        for label, volume in rows.volumes.items():
            known = np.where(np.isnan(volume), np.nan, volume > 0)
            presence = _of(f"presence of {label}", known, ["no", "yes"])
            amount = _of(f"volume of {label}", np.log1p(volume), [])
            yield from _associated("missing", gap, presence, how)
            yield from _associated("missing", gap, amount, how)


def _of(name: str, x: NDArray[np.generic], values: list[str]) -> Column:
    return Column(name, name, False, values, np.asarray(x, float))


def _associated(kind: str, a: Column, b: Column, how: How) -> Iterator[Question]:
    """The association of two columns; no question if there are too few subjects or a column hardly varies."""
    both = a.there() & b.there()
    x, y = a.x[both], b.x[both]
    if both.sum() < FEWEST or not (_varies(a, x) and _varies(b, y)):
        return
    about = f"{a.name} - {b.name}"

    def ask() -> Finding:
        found = associate(x, y, (a.categorical, b.categorical), *how)
        return Finding(kind=kind, about=about, **vars(found))

    yield Question(kind, about, ask)


def _varies(column: Column, x: Array) -> bool:
    """Whether ``CLASS`` subjects or more differ from the most common value."""
    counts = np.unique(x, return_counts=True)[1]
    return bool(counts.sum() - counts.max() >= CLASS)


def _predicted(
    kind: str,
    about: str,
    measure: str,
    x: Array,
    y: NDArray[np.generic],
    chance: float,
    how: How,
) -> Question:
    tests: dict[str, Callable[..., prediction.Predicted]] = {
        "AUC": prediction.auc,
        "R2": prediction.r2,
        "balanced accuracy": prediction.balanced_accuracy,
    }

    def ask() -> Finding:
        found = tests[measure](x, y, *how)
        return Finding(kind=kind, about=about, measure=measure, chance=chance, **vars(found))

    return Question(kind, about, ask)
