"""Who is trained on and who is validated on: folds of subjects, spread evenly over metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .config import MetadataKey, Splits
from .metadata import KeyEncoder, MetadataError, as_category, is_missing
from .sources import Case

Fold = dict[str, list[str]]
"""``train``, ``val`` (and ``test``) -> subjects."""


def make_splits(
    cases: Sequence[Case],
    config: Splits,
    keys: Mapping[str, MetadataKey],
    same: Sequence[set[str]] = (),
) -> tuple[list[Fold], list[str]]:
    """Folds over subjects; or the one split that the data set's column says.

    A subject is wholly in one part, and so are subjects in one set of ``same`` (identical images under several
    names). Each stratum (combination of values of ``config.stratify``; quarters of continuous values) is dealt out
    evenly over the folds.

    Returns:
        the folds, and problems (one line each).
    """
    if config.column is not None:
        return _fixed(cases, same)
    units = _units(cases, same)
    if len(units) < config.folds:
        return [], [
            f"{config.folds} folds need as many subjects, got {len(units)} (splits.folds; subjects with identical"
            " images count once)"
        ]
    rng = np.random.default_rng(config.seed)
    strata: dict[tuple[str, ...], list[list[str]]] = {}
    levels = _levels(cases, config.stratify, keys)
    for unit in units:
        strata.setdefault(levels[unit[0]], []).append(unit)
    parts: list[list[str]] = [[] for _ in range(config.folds)]
    turn = 0
    for level in sorted(strata):
        for i in rng.permutation(len(strata[level])):
            parts[turn % config.folds] += strata[level][i]
            turn += 1
    folds = []
    for k in range(config.folds):
        rest = [s for j, part in enumerate(parts) if j != k for s in part]
        folds.append({"train": sorted(rest), "val": sorted(parts[k])})
    return folds, []


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
