"""The questions that an audit asks of the rows; each is one test, made into a finding when all are answered."""

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


@dataclass(frozen=True)
class Question:
    """A test that can be made.

    Attributes:
        kind, about: of the finding.
        ask: makes the test.
    """

    kind: str
    about: str
    ask: Callable[[], Finding]


def label_questions(rows: Rows, seed: int, permutations: int) -> Iterator[Question]:
    """Presence and volume of each label from all input keys together, and from each key."""
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
                yield _predicted(
                    "label",
                    f"{source} -> presence of {label}",
                    "AUC",
                    x,
                    here,
                    0.5,
                    seed,
                    permutations,
                )
            if np.ptp(volume[known]) > 0:
                y = np.log1p(volume[known])
                yield _predicted(
                    "label", f"{source} -> volume of {label}", "R2", x, y, 0.0, seed, permutations
                )


def image_questions(
    rows: Rows, kind: str, x: Array, seed: int, permutations: int
) -> Iterator[Question]:
    """Each column of the metadata from features [n, f] of the images.

    Args:
        kind: "intensity" or "geometry".
    """
    if not (np.ptp(x, 0) > 0).any():
        rows.notes.append(f"{kind} is the same in all images: nothing is predicted from it")
        return
    for column in rows.columns:
        about = f"{kind} -> {column.name}"
        if not column.categorical:
            there = column.there()
            if there.sum() >= FEWEST and np.ptp(column.x[there]) > 0:
                yield _predicted(
                    kind, about, "R2", x[there], column.x[there], 0.0, seed, permutations
                )
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
        yield _predicted(kind, about, "balanced accuracy", x[used], y, chance, seed, permutations)


def pair_questions(rows: Rows, seed: int, permutations: int) -> Iterator[Question]:
    """Each pair of columns of different keys."""
    usable = [c for c in rows.columns if not is_identifier(c)]
    for i, a in enumerate(usable):
        for b in usable[i + 1 :]:
            if a.key != b.key:
                yield from _associated(rows, "confounding", a, b, seed, permutations)


def gap_questions(
    rows: Rows, chosen_by: set[str], seed: int, permutations: int
) -> Iterator[Question]:
    """Each column against what is not there: annotations, other subjects of its fold; and labels against its gaps.

    Args:
        chosen_by: keys that the folds were made by; those go with the fold.
    """
    usable = [c for c in rows.columns if not is_identifier(c)]
    fold = _of("fold", rows.fold, [str(k) for k in range(int(np.nanmax([*rows.fold, 0])) + 1)])
    for column in usable:
        for label, volume in rows.volumes.items():
            annotated = _of(f"{label} annotated", ~np.isnan(volume), ["no", "yes"])
            yield from _associated(rows, "annotation", column, annotated, seed, permutations)
        if column.key not in chosen_by:
            yield from _associated(rows, "fold", column, fold, seed, permutations)
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
            yield from _associated(rows, "missing", gap, presence, seed, permutations)
            yield from _associated(rows, "missing", gap, amount, seed, permutations)


def _of(name: str, x: NDArray[np.generic], values: list[str]) -> Column:
    return Column(name, name, False, values, np.asarray(x, float))


def _associated(
    rows: Rows, kind: str, a: Column, b: Column, seed: int, permutations: int
) -> Iterator[Question]:
    """Nothing where there are too few subjects, or one of the columns hardly varies."""
    both = a.there() & b.there()
    x, y = a.x[both], b.x[both]
    if both.sum() < FEWEST or not (_varies(a, x) and _varies(b, y)):
        return
    about = f"{a.name} - {b.name}"

    def ask() -> Finding:
        found = associate(x, y, (a.categorical, b.categorical), seed, permutations)
        return Finding(
            kind,
            about,
            found.measure,
            found.value,
            found.low,
            found.high,
            found.chance,
            found.n,
            found.p,
        )

    yield Question(kind, about, ask)


def _varies(column: Column, x: Array) -> bool:
    """Whether enough subjects differ from the most common value."""
    counts = np.unique(x, return_counts=True)[1]
    return bool(counts.sum() - counts.max() >= CLASS)


def _predicted(
    kind: str,
    about: str,
    measure: str,
    x: Array,
    y: NDArray[np.generic],
    chance: float,
    seed: int,
    permutations: int,
) -> Question:
    tests: dict[str, Callable[..., prediction.Predicted]] = {
        "AUC": prediction.auc,
        "R2": prediction.r2,
        "balanced accuracy": prediction.balanced_accuracy,
    }

    def ask() -> Finding:
        found = tests[measure](x, y, seed, permutations)
        return Finding(
            kind, about, measure, found.value, found.low, found.high, chance, found.n, found.p
        )

    return Question(kind, about, ask)
