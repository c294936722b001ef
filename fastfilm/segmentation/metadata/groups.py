"""Which cases belong together by their metadata: by value, continuous keys by tertiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoder import as_category

GROUPS_AT_MOST = 12
"""Values of a key up to which each makes a group; a number with more different ones counts as continuous."""

BINNED_FROM = 6
"""Cases with a value that a continuous key needs to make groups."""

UNKNOWN, MISSING = "unknown", "(missing)"
"""The group without a value, and its name where there is a value that is called so."""


@dataclass(frozen=True)
class Grouping:
    """The groups of one key.

    Attributes:
        binned: the groups are ranges of a number, as in "20–34".
        members: group -> its cases, in the order in which groups are shown.
    """

    binned: bool
    members: dict[str, list[str]]


def groupings(
    metadata: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]
) -> dict[str, Grouping]:
    """Key -> its groups, for each key that makes any.

    Args:
        metadata: case -> key -> value.
        kinds: key -> category, continuous, ordered, multilabel or vector (which makes none), where it is known.
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
    """The groups of one key; None where it makes none.

    A continuous key makes three groups of about one size out of ``BINNED_FROM`` cases or more. Any other makes
    one a value (several values at once: a case is in the group of each), if these are ``GROUPS_AT_MOST`` or fewer.

    Args:
        values: case -> value, as found; None, "" and NaN are missing.
        kind: of the key; None: continuous if all values are numbers, and many.
        taken: names that the group without a value must not have.
    """
    if kind == "vector":
        return None
    present = {c: v for c, v in values.items() if not is_absent(v)}
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


def is_absent(value: Any) -> bool:
    """Whether a resolved metadata value is none, or a list of such."""
    if isinstance(value, list | tuple):
        return all(map(is_absent, value))
    return value in (None, "") or (isinstance(value, float) and math.isnan(value))


def _names(value: Any, kind: str | None) -> list[str]:
    if isinstance(value, list | tuple):
        # a name that is there twice is one
        return list(dict.fromkeys(as_category(v) for v in value if not is_absent(v)))
    if kind == "multilabel":
        return list(dict.fromkeys(v.strip() for v in as_category(value).split(";") if v.strip()))
    return [as_category(value)]


def _number(value: Any) -> float | None:
    """A finite number, or the mean of a list of them, as the metadata encoder takes it."""
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
    """Numbers by size, then words."""
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
    """``20–34``; with so many digits that one range ends, as it is written, before the next begins."""
    text: list[tuple[str, str]] = []
    for digits in range(4, 18):
        text = [(_short(low, digits), _short(high, digits)) for low, high in ends]
        if all(float(a[1]) < float(b[0]) for a, b in itertools.pairwise(text)):
            break
    dash = " to " if any(low < 0 for low, _ in ends) else "–"
    return [low if low == high else f"{low}{dash}{high}" for low, high in text]


def _short(x: float, digits: int) -> str:
    return str(int(x)) if x.is_integer() and abs(x) < 1e15 else f"{x:.{digits}g}"
