"""Whether a data set's metadata can be encoded in every fold, and how many cases have each key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..config.schema import Config
from ..config.sections import MetadataKey, Splits
from ..metadata.encoder import (
    MetadataEncoder,
    MetadataError,
    as_category,
    is_missing,
)
from ..support.errors import Problems
from ..support.hints import did_you_mean, some
from .sources import (
    Case,
    Found,
    Places,
)
from .splits import Fold

MANY = 10
"""Different numbers from which on a category looks like a continuous key."""

SHOWN = 3
"""Cases that a line names."""

LISTED = 5
"""Cases of one key whose values do not fit up to which each has a line."""

ORIGINS = {
    "table": "table",
    "entity": "file name",
    "sidecar": "sidecar",
    "inherited sidecar": "sidecar further up",
    "dicom": "DICOM",
}


def metadata_problems(
    found: Found, folds: Sequence[Fold], config: Config
) -> tuple[list[str], list[str]]:
    """What the encoder of any fold would refuse, each key and value in one line; and what looks like a slip.

    Returns:
        problems and notes, one line each.
    """
    wrong: list[str] = []
    notes: list[str] = []
    for name, key in config.metadata.items():
        values = {c.id: c.metadata.get(name) for c in found.cases}
        if all(is_missing(v, key) for v in values.values()):
            if any(name in c.origins for c in found.cases):
                # vectors that could not be read, which is said already
                continue
            if any(f"metadata {name!r}: " in p for p in found.problems):
                # and so are headers
                continue
            wrong.append(_nowhere(name, key, found.places, config))
            continue
        mine = _of_key(name, key, found.cases, folds if key.input else (), notes, config.splits)
        # a key that the network does not get has no columns
        many = _numbers(key, values) if key.input else None
        if many is not None:
            text = (
                f"metadata {name!r}: {many} different numbers as categories, each with a column of its own: if it"
                f" is a quantity, declare metadata.{name}.kind: continuous"
            )
            (wrong if mine else notes).append(text)
        else:
            wrong += mine
    return wrong, notes


def coverage(found: Found, config: Config) -> list[str]:
    """One line a key: how many cases have it, where it was found, which lack it."""
    lines = []
    for name in config.metadata:
        counts = Counter(ORIGINS[c.origins[name]] for c in found.cases if name in c.origins)
        lacking = [c.id for c in found.cases if name not in c.origins]
        where = ", ".join(f"{place} {n}" for place, n in counts.most_common())
        line = f"{name}: in {len(found.cases) - len(lacking)} of {len(found.cases)} cases ({where})"
        lines.append(line + (f"; missing in {some(lacking)}" if lacking else ""))
    return lines


def train_value(rows: Mapping[str, Mapping[str, Any]], name: str, key: MetadataKey) -> Any:
    """The first value that is there."""
    return next(v for r in rows.values() if not is_missing(v := r[name], key))


def _of_key(
    name: str,
    key: MetadataKey,
    cases: Sequence[Case],
    folds: Sequence[Fold],
    notes: list[str],
    splits: Splits,
) -> list[str]:
    def row(case: Case) -> dict[str, Any]:
        return {name: case.metadata.get(name)}

    try:
        MetadataEncoder.fit({c.id: row(c) for c in cases}, {name: key})
    except Problems as error:
        few = error.problems if len(error.problems) <= LISTED else error.problems[:SHOWN]
        rest = len(error.problems) - len(few)
        return [*few, *([f"metadata {name!r}: {rest} further cases like these"] if rest else [])]
    wrong: dict[str, list[str]] = {}
    for k, fold in enumerate(folds):
        train = {c.id: row(c) for c in cases if c.subject in set(fold["train"])}
        try:
            encoder = MetadataEncoder.fit(train, {name: key})
        except Problems as error:
            for p in error.problems:
                wrong.setdefault(p, []).append(f"fold {k}")
            continue
        fitted = encoder[name]
        if fitted.kind == "continuous" and fitted.lowest == fitted.highest:
            notes.append(
                f"metadata {name!r}: one value ({train_value(train, name, key)}) in all training cases of fold {k}"
            )
        if fitted.kind == "vector" and fitted.fitted_vector.constant:
            vector = fitted.fitted_vector
            notes.append(
                f"metadata {name!r}: {vector.constant} of {vector.length} components are the same in all training"
                f" cases of fold {k}, and count as 0"
            )
        for case in cases:
            if case.id in train:
                continue
            try:
                encoder.encode(row(case))
            except MetadataError as error:
                # which values the fold has is no part of what is wrong
                wrong.setdefault(str(error).split("; expected")[0], []).append(
                    f"{case.id} in fold {k}"
                )
    hint = _hint(name, splits)
    return [f"{some(where)}: {text}; {hint}" for text, where in wrong.items()]


def _hint(name: str, splits: Splits) -> str:
    """How values of the key that a fold's training lacks are dealt with."""
    accepted = f"metadata.{name}.unseen: unknown accepts them"
    if splits.leave_out is None:
        return "splits.stratify spreads values over the folds, unseen: unknown accepts them"
    kept = f"metadata.{name}.input: false keeps the key from the network, {accepted}"
    if splits.leave_out == name:
        return f"splits.leave_out keeps every held-out value from its fold's training: {kept}"
    return kept


def _numbers(key: MetadataKey, values: Mapping[str, Any]) -> int | None:
    """How many different numbers a category without given values has, if all are numbers and there are many."""
    if key.kind != "category" or key.values is not None:
        return None
    present = [v for v in values.values() if not is_missing(v, key)]
    names = {as_category(v) for v in present if not isinstance(v, list | dict)}
    try:
        for n in names:
            float(n)
    except ValueError:
        return None
    few = len(names) <= MANY and 2 * len(names) <= len(present)
    return None if few or len(names) < 3 else len(names)


def _nowhere(name: str, key: MetadataKey, places: Places, config: Config) -> str:
    """Why a key has no value in any case."""
    looked: list[str] = []
    known: list[str] = []
    if key.source == "dicom":
        where = (
            "sourcedata/, its folders, and one called like the image"
            if config.data.source == "bids"
            else f"the paths in column {config.data.dicom_column!r}"
        )
        return (
            f"metadata {name!r} has no value in any case: no DICOM file has tag {key.tag or name};"
            f" looked in {where}"
        )
    if key.source in ("auto", "table"):
        if places.table is None:
            looked.append(f"there is no table {config.data.root / config.data.table}")
        elif key.columns:
            return (
                f"metadata {name!r} has no value in any case: its {len(key.columns)} columns of {places.table} are"
                " empty everywhere"
            )
        elif name in places.columns:
            return (
                f"metadata {name!r} has no value in any case: column {name!r} of {places.table} is empty or"
                f" {' or '.join(key.missing or [])} everywhere"
            )
        else:
            looked.append(f"{places.table} has the columns {', '.join(places.columns)}")
            known += places.columns
    if key.source in ("auto", "entity"):
        looked.append(f"file names have {', '.join(sorted(places.entities)) or 'no entities'}")
        known += sorted(places.entities)
    if key.source in ("auto", "sidecar"):
        keys = sorted(places.sidecar)
        looked.append(
            f"sidecars have {len(keys)} keys ({some(keys, 8)})"
            if keys
            else "no image has a JSON sidecar"
        )
        known += keys
    return f"metadata {name!r} has no value in any case: {'; '.join(looked)}{did_you_mean(name, known)}"
