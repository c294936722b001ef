"""The true × fed table: how well each group is segmented under every value of a metadata key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .evaluation import Evaluated, load_mask
from .metadata import as_category, is_missing
from .statistics import compare, mean_of


def swap_table(
    runs: Mapping[str, Sequence[Evaluated]], true: Mapping[str, Any], seed: int = 0
) -> dict[str, Any]:
    """Dice by true and by fed value.

    Args:
        runs: fed value -> the metrics of its predictions, on the same cases.
        true: case -> its own value.

    Returns:
        ``rows``: true value -> fed value -> mean with interval (over cases and labels); ``differences``: true
        value -> fed value -> paired comparison of the run fed the true value with it (positive: the truth is
        better).
    """
    names = {c: "unknown" if is_missing(v) else as_category(v) for c, v in true.items()}
    groups = sorted({names[e.pair.case] for run in runs.values() for e in run})
    rows: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for group in groups:
        dice = {}
        for fed, run in runs.items():
            dice[fed] = {
                (e.pair.case, e.pair.label.name): (e.values["Dice"], e.pair.subject)
                for e in run
                if names[e.pair.case] == group
            }
        rows[group] = {
            fed: mean_of(*_columns(d.values()), seed).to_json() for fed, d in dice.items()
        }
        differences[group] = {}
        for fed, d in dice.items():
            both = [k for k in d if group in dice and k in dice[group]]
            if fed == group or not both:
                continue
            subjects = [d[k][1] for k in both]
            found = compare(
                [dice[group][k][0] for k in both], [d[k][0] for k in both], subjects, seed
            )
            differences[group][fed] = None if found is None else found.to_json()
    return {"rows": rows, "differences": differences}


def _columns(pairs: Any) -> tuple[list[float | None], list[str]]:
    listed = list(pairs)
    return [v for v, _ in listed], [s for _, s in listed]


def sensitivity(outputs: Mapping[str, Mapping[str, tuple[Path, int | None]]]) -> dict[str, float]:
    """Case -> 1 - mean Dice between its predictions under two different values (needs no truth).

    0: the metadata change nothing; 1: predictions under different values do not overlap. Two empty masks agree.

    Args:
        outputs: fed value -> case and label -> (file, label's value in it; None: a mask of its own).
    """
    cases = sorted(set.intersection(*(set(o) for o in outputs.values())))
    result: dict[str, list[float]] = {}
    for name in cases:
        masks = []
        for by_case in outputs.values():
            path, value = by_case[name]
            masks.append(load_mask(path, None if value is None else [value])[1])
        for a, b in itertools.combinations(masks, 2):
            total = int(a.sum()) + int(b.sum())
            dice = 2 * int((a & b).sum()) / total if total else 1.0
            result.setdefault(name, []).append(1 - dice)
    return {k: float(np.mean(v)) for k, v in result.items()}
