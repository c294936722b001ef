"""Keys and values that teach a network nothing, or the wrong thing: constant, nearly unique, rare, of one site."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..config.sections import MetadataKey
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..metadata.encoder import as_category, is_missing
from ..support.hints import some
from .findings import CLASS, Finding
from .rows import Column, Rows

SHARED = 2
"""Subjects a value must have on average, else the key is nearly an identifier."""

NAMED = ("category", "ordered", "multilabel")
"""Kinds whose values are names."""


def is_identifier(column: Column) -> bool:
    """Whether hardly any two subjects share a value."""
    there = column.x[column.there()]
    return column.categorical and len(there) < SHARED * len(np.unique(there))


def value_findings(rows: Rows, plan: PlanFolder) -> list[Finding]:
    """Constant keys, identifiers, rare values and values of one site."""
    findings = []
    for column in rows.columns:
        there = column.x[column.there()]
        different = len(np.unique(there))
        if different < 2:
            findings.append(_constant(column, len(there)))
        elif column.input and column.name == column.key and is_identifier(column):
            findings.append(_identifier(column, different, len(there)))
    identifiers = {f.about for f in findings if f.kind == "identifier"}
    for name, key in plan.config.metadata.items():
        if key.input and key.kind in NAMED and name not in identifiers:
            findings += _rare(name, key, plan)
    findings += _of_one_site(rows, sites(plan))
    return findings


def sites(plan: PlanFolder) -> list[str]:
    """Keys that say where a subject comes from: not given to the network, or named so in the configuration."""
    config = plan.config
    named = (config.trial.cluster, config.splits.leave_out, config.splits.group)
    return [k for k, key in config.metadata.items() if k in named or not key.input]


def _constant(column: Column, n: int) -> Finding:
    return Finding(
        kind="constant",
        about=column.name,
        measure="values",
        value=1,
        low=None,
        high=None,
        chance=1,
        n=n,
        level="look" if column.input else "fine",
        text=f"{column.name} has the same value in all {n} subjects that have one.",
        advice="Leave it out: a network learns nothing from it, and other values were never trained.",
    )


def _identifier(column: Column, different: int, n: int) -> Finding:
    return Finding(
        kind="identifier",
        about=column.name,
        measure="values",
        value=different,
        low=None,
        high=None,
        chance=n / SHARED,
        n=n,
        level="warning",
        text=f"{column.name} has {different} values in {n} subjects: it nearly names the subject.",
        advice="Leave it out, set input: false, or join values: a network can learn subjects by heart.",
    )


def _rare(name: str, key: MetadataKey, plan: PlanFolder) -> list[Finding]:
    """One finding for the values that have few subjects in the training of some fold."""
    fewest: dict[str, tuple[int, int]] = {}
    every = _subjects(name, key, plan.cases)
    for k, fold in enumerate(plan.folds):
        train = set(fold["train"])
        for value, subjects in every.items():
            fewest[value] = min(
                fewest.get(value, (len(subjects) + 1, 0)), (len(subjects & train), k)
            )
    rare = {v: n for v, n in sorted(fewest.items()) if n[0] < CLASS}
    if not rare:
        return []
    value, (least, k) = min(rare.items(), key=lambda v: v[1])
    listed = some([f"{v} ({n} in fold {j})" for v, (n, j) in rare.items()], 6)
    return [
        Finding(
            kind="rare",
            about=f"{name} = {value}",
            measure="subjects",
            value=least,
            low=None,
            high=None,
            chance=CLASS,
            n=sum(len(s) for s in every.values()),
            level="look",
            text=f"Values of {name} with fewer than {CLASS} training subjects: {listed}.",
            advice="What is learned of them is that of a few subjects: join values, or read results by value.",
        )
    ]


def _subjects(name: str, key: MetadataKey, cases: Sequence[Case]) -> dict[str, set[str]]:
    """Value -> subjects that have it."""
    found: dict[str, set[str]] = {}
    for case in cases:
        value = case.metadata.get(name)
        if is_missing(value, key):
            continue
        names = [as_category(value)]
        if key.kind == "multilabel":
            parts = value if isinstance(value, list) else str(value).split(key.separator)
            names = [as_category(p) for p in parts if not is_missing(p, key)]
        for n in names:
            found.setdefault(n, set()).add(case.subject)
    return found


def _of_one_site(rows: Rows, places: Collection[str]) -> list[Finding]:
    """Values of input keys that occur at one site only, although others could have them."""
    by_name: Mapping[str, Column] = {c.name: c for c in rows.columns}
    findings = []
    for place in places:
        site = by_name.get(place)
        if site is None or not site.categorical or is_identifier(site):
            continue
        for column in rows.columns:
            if not column.input or column.key == place or not column.categorical:
                continue
            both = column.there() & site.there()
            for i, value in enumerate(column.values):
                of = both & (column.x == i)
                at = np.unique(site.x[of])
                if of.sum() < CLASS or len(at) != 1 or len(np.unique(site.x[both])) < 2:
                    continue
                if column.values == ["no", "yes"] and value == "no" and column.name != column.key:
                    continue
                findings.append(
                    Finding(
                        kind="one site",
                        about=f"{column.name} = {value}",
                        measure="subjects",
                        value=float(of.sum()),
                        low=None,
                        high=None,
                        chance=CLASS,
                        n=int(both.sum()),
                        level="look",
                        text=f"All {of.sum()} subjects with {column.name} = {value} have {place} ="
                        f" {site.values[int(at[0])]}.",
                        advice=f"What is learned of the value may be that of {place}: it cannot be told from it.",
                    )
                )
    return findings
