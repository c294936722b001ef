"""Who is trained on, validated on and tested on: folds of subjects, even over metadata or by a value of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..config.sections import MetadataKey, Splits
from ..metadata.encoder import (
    KeyEncoder,
    MetadataError,
    as_category,
    is_missing,
)
from ..support.hints import some
from .sources import Case

Fold = dict[str, list[str]]
"""``train``, ``val`` (and ``test``) -> subjects."""

FOLDS = 5
"""Folds where ``splits.folds`` says nothing."""

Strata = Mapping[str, tuple[str, ...]]
"""Subject -> its combination of values."""


def make_splits(
    cases: Sequence[Case],
    config: Splits,
    keys: Mapping[str, MetadataKey],
    same: Sequence[set[str]] = (),
) -> tuple[list[Fold], list[str]]:
    """Folds over subjects; or the one split that the data set's column says.

    A subject is wholly in one part, and so are subjects in one set of ``same`` (identical images under several
    names) and subjects with one value of ``config.group``. Each stratum (combination of values of
    ``config.stratify``; quarters of continuous values) is spread evenly over the folds. With ``config.leave_out``
    each fold holds the subjects of one value out, in the order of the values.

    The subjects that a fold holds out are its ``val``; with ``config.nested`` they are its ``test``, and ``val``
    is a part of the others.

    Returns:
        the folds, and problems (one line each).
    """
    if config.column is not None:
        return _fixed(cases, same)
    units = _units(cases, [*same, *_groups(cases, config.group, keys)])
    levels = _levels(cases, config.stratify, keys)
    grouped = config.group is not None
    if config.leave_out is not None:
        parts, problems = _left_out(cases, units, config.leave_out, keys[config.leave_out])
    else:
        n, rng = config.folds or FOLDS, np.random.default_rng(config.seed)
        parts, problems = _parts(units, levels, n, grouped, rng, f"{n} folds", "splits.folds")
    folds = []
    for k in range(len(parts)):
        fold = {
            "train": sorted(s for j, part in enumerate(parts) if j != k for s in part),
            "val": sorted(parts[k]),
        }
        if config.nested is not None:
            fold, more = _nested(fold, units, levels, config, k)
            problems += more
        folds.append(fold)
    return ([] if problems else folds), problems


def split_notes(cases: Sequence[Case], folds: Sequence[Fold], config: Splits) -> list[str]:
    """What a reader of the folds has to know: which value each holds out, and what ``test`` is for."""
    notes = []
    part = "val" if config.nested is None else "test"
    if config.leave_out is not None:
        of = {c.subject: as_category(c.metadata.get(config.leave_out)) for c in cases}
        held = [f"fold {k}: {of[f[part][0]]} ({len(f[part])})" for k, f in enumerate(folds)]
        notes.append(
            f"splits.leave_out: value of {config.leave_out} that is held out (subjects): {', '.join(held)}"
        )
    if config.nested is not None:
        notes.append(
            "splits.nested: val chooses the weights; the held-out subjects are test (fastfilm predict --part test)"
        )
    return notes


def _parts(
    units: Sequence[list[str]],
    levels: Strata,
    n: int,
    grouped: bool,
    rng: np.random.Generator,
    what: str,
    setting: str,
) -> tuple[list[list[str]], list[str]]:
    """``n`` parts of the units' subjects, and problems.

    Subjects on their own are dealt out in turn, stratum by stratum. Groups may be of any size, for which dealing
    is uneven: they are placed one by one.
    """
    if len(units) < n:
        return [], [
            f"{what} need as many subjects, got {len(units)} ({setting}; subjects that stay together count once)"
        ]
    return (_placed if grouped else _dealt)(units, levels, n, rng), []


def _dealt(
    units: Sequence[list[str]], levels: Strata, n: int, rng: np.random.Generator
) -> list[list[str]]:
    strata: dict[tuple[str, ...], list[list[str]]] = {}
    for unit in units:
        strata.setdefault(levels[unit[0]], []).append(unit)
    parts: list[list[str]] = [[] for _ in range(n)]
    turn = 0
    for level in sorted(strata):
        for i in rng.permutation(len(strata[level])):
            parts[turn % n] += strata[level][i]
            turn += 1
    return parts


def _placed(
    units: Sequence[list[str]], levels: Strata, n: int, rng: np.random.Generator
) -> list[list[str]]:
    """The largest first, each into the part in which it adds least to the squared shares of subjects and values.

    For a value with T subjects, c of them in a part, v more add ((c + v)^2 - c^2) / T; the number of subjects
    counts as much as all keys together and once more. A part without any costs least, so that none stays empty.
    """
    found = {(i, v) for level in levels.values() for i, v in enumerate(level)}
    column = {value: 1 + j for j, value in enumerate(sorted(found))}
    have = np.zeros((len(units), 1 + len(column)))  # [units, subjects and values]
    for row, unit in zip(have, units, strict=True):
        row[0] = len(unit)
        for s in unit:
            for value in enumerate(levels[s]):
                row[column[value]] += 1
    weight = np.ones(have.shape[1])
    weight[0] += len({i for i, _ in column})
    # values of subjects that are not in these units have none
    weight /= np.maximum(have.sum(0), 1)
    parts: list[list[str]] = [[] for _ in range(n)]
    counts = np.zeros((n, have.shape[1]))
    for i in sorted(rng.permutation(len(units)), key=lambda i: -len(units[i])):
        cost = ((2 * counts + have[i]) * have[i]) @ weight
        chosen = int(np.argmin(cost))
        counts[chosen] += have[i]
        parts[chosen] += units[i]
    return parts


def _nested(
    fold: Fold, units: Sequence[list[str]], levels: Strata, config: Splits, k: int
) -> tuple[Fold, list[str]]:
    """The fold with its held-out subjects as ``test``, and problems."""
    assert config.nested is not None
    n, train = config.nested, set(fold["train"])
    parts, problems = _parts(
        [u for u in units if u[0] in train],
        levels,
        n,
        config.group is not None,
        np.random.default_rng([config.seed, k]),
        f"fold {k}: {n} parts of the training subjects",
        "splits.nested",
    )
    if problems:
        return fold, problems
    # groups make parts of different sizes
    val = min(parts, key=lambda part: abs(len(part) - len(train) / n))
    return {"train": sorted(train - {*val}), "val": sorted(val), "test": fold["val"]}, []


def _left_out(
    cases: Sequence[Case], units: Sequence[list[str]], name: str, key: MetadataKey
) -> tuple[list[list[str]], list[str]]:
    """The subjects of each value, in the order of the values, and problems."""
    setting = f"splits.leave_out: {name}"
    lacking: list[str] = []
    values: dict[str, set[str]] = {}
    for case in cases:
        value = case.metadata.get(name)
        if is_missing(value, key):
            lacking.append(case.id)
        else:
            values.setdefault(case.subject, set()).add(as_category(value))
    problems = []
    if lacking:
        problems.append(
            f"{setting} is missing in {some(lacking)} ({len(lacking)} in all): give it, or leave them out"
            " (data.exclude)"
        )
    for subject, found in values.items():
        if len(found) > 1:
            problems.append(f"{setting}: {subject} has several values: {', '.join(sorted(found))}")
    for unit in units:
        sets = [values[s] for s in unit if len(values.get(s, ())) == 1]
        if len(found := set().union(*sets)) > 1:
            problems.append(
                f"{setting}: {', '.join(unit)} stay together (identical images, or splits.group) but have"
                f" different values: {', '.join(sorted(found))}"
            )
    every = sorted(set().union(*values.values()))
    if len(every) < 2:
        problems.append(f"{setting} needs two values or more, got {', '.join(every) or 'none'}")
    if problems:
        return [], problems
    return [[s for unit in units for s in unit if v in values[s]] for v in every], []


def _fixed(cases: Sequence[Case], same: Sequence[set[str]]) -> tuple[list[Fold], list[str]]:
    where: dict[str, set[str]] = {}
    for case in cases:
        where.setdefault(case.subject, set()).add(str(case.split))
    problems = [
        f"{subject} is in more than one split: {', '.join(sorted(splits))}"
        for subject, splits in sorted(where.items())
        if len(splits) > 1
    ]
    for group in same:
        splits = set().union(*(where.get(s, set()) for s in group))
        if len(splits) > 1:
            problems.append(
                f"{', '.join(sorted(group))} have identical images but are in different splits"
            )
    fold: Fold = {"train": [], "val": [], "test": []}
    for subject, splits in sorted(where.items()):
        for name in splits & fold.keys():
            fold[name].append(subject)
    problems += [f"no subject is in split {n!r}" for n in ("train", "val") if not fold[n]]
    return [fold], problems


def _groups(
    cases: Sequence[Case], name: str | None, keys: Mapping[str, MetadataKey]
) -> list[set[str]]:
    """Subjects with the same value of the key; one with several values is in several sets."""
    members: dict[str, set[str]] = {}
    for case in cases if name is not None else ():
        value = case.metadata.get(str(name))
        if not is_missing(value, keys[str(name)]):
            members.setdefault(as_category(value), set()).add(case.subject)
    return list(members.values())


def _units(cases: Sequence[Case], same: Sequence[set[str]]) -> list[list[str]]:
    """Subjects that stay together, in the order of their names."""
    group: dict[str, set[str]] = {c.subject: {c.subject} for c in cases}
    for twins in same:
        merged = set().union(*(group[s] for s in twins if s in group))
        for s in merged:
            group[s] = merged
    return sorted({tuple(sorted(g)): sorted(g) for g in group.values()}.values())


def _levels(
    cases: Sequence[Case], names: Sequence[str], keys: Mapping[str, MetadataKey]
) -> dict[str, tuple[str, ...]]:
    """Subject -> its stratum."""
    first: dict[str, Mapping[str, Any]] = {}
    for case in cases:
        first.setdefault(case.subject, case.metadata)
    columns = []
    for name in names:
        values = {s: m.get(name) for s, m in first.items()}
        columns.append(_column(name, keys[name], values))
    return {s: tuple(c[s] for c in columns) for s in first}


def _column(name: str, key: MetadataKey, values: Mapping[str, Any]) -> dict[str, str]:
    missing = {s: "unknown" for s, v in values.items() if is_missing(v, key)}
    present = {s: v for s, v in values.items() if s not in missing}
    if key.kind != "continuous":
        return missing | {s: as_category(v) for s, v in present.items()}
    numbers = {}
    for s, v in present.items():
        try:
            numbers[s] = KeyEncoder(name=name, kind="continuous").number(v)
        except MetadataError:
            missing[s] = "unknown"  # reported by the encoder
    quarters = np.quantile([*numbers.values()] or [0.0], (0.25, 0.5, 0.75))
    return missing | {s: str(int(np.searchsorted(quarters, x))) for s, x in numbers.items()}
