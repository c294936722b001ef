"""Findings on single keys and values: constant, nearly unique, rare, or of one site only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..config.sections import MetadataKey
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..metadata.encoder import as_category, is_missing
from ..support.hints import some
from .findings import CLASS, Finding, Level
from .rows import Column, Rows

SHARED = 2
"""Subjects per value, on average, below which a key is nearly an identifier."""

NAMED = ("category", "ordered", "multilabel")
"""Kinds of keys with names as values."""


def is_identifier(column: Column) -> bool:
    """Whether subjects hardly share values, by ``SHARED``."""
    there = column.x[column.there()]
    return column.categorical and len(there) < SHARED * len(np.unique(there))


def value_findings(rows: Rows, plan: PlanFolder) -> list[Finding]:
    """Findings on constant keys, identifiers, rare values and values of one site."""
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
    """Keys of a subject's origin: not given to the network, or used as such by splits or trial."""
    config = plan.config
    named = (config.trial.cluster, config.splits.leave_out, config.splits.group)
    return [k for k, key in config.metadata.items() if k in named or not key.input]


def _constant(column: Column, n: int) -> Finding:
    level: Level = "look" if column.input else "fine"
    head = "constant", column.name, "values", 1
    text = f"{column.name} has the same value in all {n} subjects that have one."
    advice = "Leave it out: a network learns nothing from it, and other values were never trained."
    return Finding(*head, None, None, 1, n, level=level, text=text, advice=advice)


def _identifier(column: Column, different: int, n: int) -> Finding:
    text = f"{column.name} has {different} values in {n} subjects: it nearly names the subject."
    advice = (
        "Leave it out, set input: false, or join values: a network can learn subjects by heart."
    )
    chance = n / SHARED
    head = "identifier", column.name, "values", different
    return Finding(*head, None, None, chance, n, level="warning", text=text, advice=advice)


def _rare(name: str, key: MetadataKey, plan: PlanFolder) -> list[Finding]:
    """A finding on the values with few training subjects in some fold, if there are any."""
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
    about, n = f"{name} = {value}", sum(len(s) for s in every.values())
    text = f"Values of {name} with fewer than {CLASS} training subjects: {listed}."
    advice = (
        "What is learned of them is that of a few subjects: join values, or read results by value."
    )
    head = "rare", about, "subjects", least
    return [Finding(*head, None, None, CLASS, n, level="look", text=text, advice=advice)]


def _subjects(name: str, key: MetadataKey, cases: Sequence[Case]) -> dict[str, set[str]]:
    """Value -> the subjects with it."""
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
    """Findings on values of input keys that occur at one site only, although there are several sites."""
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
                about, n = f"{column.name} = {value}", int(both.sum())
                where = f"{place} = {site.values[int(at[0])]}"
                text = f"All {of.sum()} subjects with {about} have {where}."
                advice = f"What is learned of the value may be that of {place}: it cannot be told from it."
                head = "one site", about, "subjects", float(of.sum())
                findings.append(
                    Finding(*head, None, None, CLASS, n, level="look", text=text, advice=advice)
                )
    return findings
