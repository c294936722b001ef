"""Groups of cases by their metadata: one for each value of a key, or tertiles of a continuous key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoder import as_category, is_missing

GROUPS_AT_MOST = 12
"""Number of groups up to which a key makes any; numbers with more different values count as continuous."""

BINNED_FROM = 6
"""Number of cases with a value from which a continuous key makes groups."""

UNKNOWN, MISSING = "unknown", "(missing)"
"""Name of the group without a value, and its name if there is a value "unknown"."""


@dataclass(frozen=True)
class Grouping:
    """The groups of one key.

    Attributes:
        binned: whether the groups are ranges of a number, as in "20–34".
        members: name of the group -> its cases, in the order in which groups are shown.
    """

    binned: bool
    members: dict[str, list[str]]


def groupings(
    metadata: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]
) -> dict[str, Grouping]:
    """Key -> its groups, for each key that makes any.

    Args:
        metadata: case -> key -> value.
        kinds: key -> category, continuous, ordered, multilabel or vector, where it is known.
    """
    keys = sorted({k for values in metadata.values() for k in values})
    every = {k: grouping({c: v.get(k) for c, v in metadata.items()}, kinds.get(k)) for k in keys}
    return {k: g for k, g in every.items() if g is not None}


def grouping(
    values: Mapping[str, Any],
    kind: str | None = None,
    most: float = GROUPS_AT_MOST,
    taken: Collection[str] = (),
) -> Grouping | None:
    """The groups of one key; None if it makes none.

    A continuous key makes three groups of about equal size if ``BINNED_FROM`` or more cases have a value. A vector
    makes none. Any other key makes a group for each value; a case with several values is in the group of each.

    Args:
        values: case -> value; None, blank text and NaN are missing.
        kind: kind of the key; None: continuous if all values are numbers and more than ``GROUPS_AT_MOST`` differ.
        most: number of groups above which the result is None.
        taken: names that the group without a value must not have.
    """
    if kind == "vector":
        return None
    present = {c: v for c, v in values.items() if not is_missing(v)}
    missing = [c for c in values if c not in present]
    numbers = {c: x for c, v in present.items() if (x := _number(v)) is not None}
    numeric = len(numbers) == len(present)
    if kind is None and numeric and len(set(numbers.values())) > GROUPS_AT_MOST:
        kind = "continuous"
    members: dict[str, list[str]] = {}
    if kind == "continuous" and numeric:
        if len(numbers) < BINNED_FROM:
            return None
        members = _tertiles(numbers)
    else:
        for case, value in present.items():
            for name in _names(value, kind):
                members.setdefault(name, []).append(case)
        members = dict(sorted(members.items(), key=lambda m: _order(m[0])))
    if missing:
        members[MISSING if UNKNOWN in (*members, *taken) else UNKNOWN] = missing
    if len(members) > most:
        return None
    return Grouping(kind == "continuous" and numeric, members)


def _names(value: Any, kind: str | None) -> list[str]:
    if isinstance(value, list | tuple):
        # each name once
        return list(dict.fromkeys(as_category(v) for v in value if not is_missing(v)))
    if kind == "multilabel":
        return list(dict.fromkeys(v.strip() for v in as_category(value).split(";") if v.strip()))
    return [as_category(value)]


def _number(value: Any) -> float | None:
    """A finite number, or the mean of a list of these, as in the metadata encoder; None for any other value."""
    if isinstance(value, list | tuple):
        parts = [_number(v) for v in value]
        known = [p for p in parts if p is not None]
        return float(np.mean(known)) if known and len(known) == len(parts) else None
    if isinstance(value, bool):
        return None
    try:
        x = float(value)
    except (TypeError, ValueError):
        return None
    return x if math.isfinite(x) else None


def _order(name: str) -> tuple[bool, float, str]:
    """Sorts numbers by size, and words behind them."""
    x = _number(name)
    return x is None, x or 0.0, name


def _tertiles(numbers: Mapping[str, float]) -> dict[str, list[str]]:
    edges = np.quantile(list(numbers.values()), (1 / 3, 2 / 3))
    bins: dict[int, list[str]] = {}
    for case, x in numbers.items():
        bins.setdefault(int(np.searchsorted(edges, x)), []).append(case)
    cases = [bins[i] for i in sorted(bins)]
    ends = [(min(numbers[c] for c in b), max(numbers[c] for c in b)) for b in cases]
    return dict(zip(_ranges(ends), cases, strict=True))


def _ranges(ends: Sequence[tuple[float, float]]) -> list[str]:
    """Names of ranges, such as ``20–34``, with as many digits as keep them apart."""
    text: list[tuple[str, str]] = []
    for digits in range(4, 18):
        text = [(_short(low, digits), _short(high, digits)) for low, high in ends]
        if all(float(a[1]) < float(b[0]) for a, b in itertools.pairwise(text)):
            break
    dash = " to " if any(low < 0 for low, _ in ends) else "–"
    return [low if low == high else f"{low}{dash}{high}" for low, high in text]


def _short(x: float, digits: int) -> str:
    return str(int(x)) if x.is_integer() and abs(x) < 1e15 else f"{x:.{digits}g}"
