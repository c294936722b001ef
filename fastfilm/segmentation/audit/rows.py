"""A plan as a table for statistics: a row per subject, with metadata, labels and fold of one of its cases.

Cases of a subject are alike, so that tests over cases would find associations that do not exist. One case of each
subject, drawn at random, keeps the rows independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from ..config.sections import MetadataKey
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..metadata.encoder import KeyEncoder, MetadataEncoder, as_category, is_missing
from ..support.errors import UserError
from ..support.records import Record, read_record

KINDS = ("category", "ordered", "multilabel", "continuous")
"""Kinds of keys that are audited."""

MOST = 2000
"""Subjects at most: the work grows with their square, and their intervals are narrow enough."""


@dataclass(frozen=True)
class Column:
    """A variable: a key, or one value of a multilabel key.

    Attributes:
        name: name of the column, such as "site", or "findings: edema".
        key: its metadata key.
        input: whether it conditions the network.
        values: names of the categories; empty for a number.
        x: [n], float64: position in ``values``, or the number; NaN if missing.
    """

    name: str
    key: str
    input: bool
    values: list[str]
    x: NDArray[np.float64]

    @property
    def categorical(self) -> bool:
        """Whether its values are categories."""
        return bool(self.values)

    def there(self) -> NDArray[np.bool_]:
        """Whether each subject has a value, [n]."""
        return ~np.isnan(self.x)


@dataclass
class Rows:
    """The table: one case of each of n subjects.

    Attributes:
        cases: cases in the order of their subjects.
        columns: columns of all keys.
        encoded: key -> [n, w], the encoded values; for numbers also ranks and squared ranks, for which a linear
            model can be curved.
        inputs: keys that condition the network.
        volumes: label -> volume in mL [n], NaN if it is not annotated.
        geometry: logarithms of the image's shape and spacing, [n, 6].
        fold: fold that holds the subject out, [n]; NaN if none does.
        notes: a line for each note on omissions.
    """

    cases: list[Case]
    columns: list[Column] = field(default_factory=list)
    encoded: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    volumes: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    geometry: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 6)))
    fold: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    notes: list[str] = field(default_factory=list)


class Facts(Record):
    """The entries of a case's ``CaseFacts`` that are read from a plan."""

    id: str
    digest: str
    shape: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)]
    spacing: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    voxels: dict[str, int]


class Fingerprint(Record):
    """A plan's fingerprint.json."""

    cases: list[Facts]


def read_rows(plan: PlanFolder, seed: int) -> Rows:
    """The table of a plan.

    Args:
        seed: seed of the drawn cases.

    Raises:
        UserError: the plan has no metadata keys, or its fingerprint is damaged or lacks a case.
    """
    if not plan.config.metadata:
        raise UserError("metadata: the configuration has no key, so there is nothing to audit")
    file = plan.path / "fingerprint.json"
    facts = {f.id: f for f in read_record(file, Fingerprint, "the fingerprint of a plan").cases}
    lacking = [c.id for c in plan.cases if c.id not in facts]
    if lacking:
        raise UserError(f"{file}: has no case {lacking[0]!r}")
    cases, notes = _drawn(plan.cases, {k: f.digest for k, f in facts.items()}, seed)
    rows = Rows(cases, notes=notes)
    mine = [facts[c.id] for c in cases]
    add_keys(rows, plan.config.metadata)
    for name in plan.config.data.labels:
        rows.volumes[name] = np.array(
            [f.voxels.get(name, np.nan) * np.prod(f.spacing) / 1000 for f in mine], float
        )
    rows.geometry = np.log([[*f.shape, *f.spacing] for f in mine])
    held = {s: k for k, f in enumerate(plan.folds) for s in f.get(plan.held_out, [])}
    rows.fold = np.array([held.get(c.subject, np.nan) for c in cases], float)
    return rows


def add_keys(rows: Rows, keys: Mapping[str, MetadataKey]) -> None:
    """Adds columns and encodings of the keys, and a note for each key that cannot be used."""
    for name, key in keys.items():
        values = [c.metadata.get(name) for c in rows.cases]
        if key.kind not in KINDS:
            rows.notes.append(f"{name} is left out: kind {key.kind} is not audited")
            continue
        if all(is_missing(v, key) for v in values):
            rows.notes.append(f"{name} is left out: none of the drawn cases has a value")
            continue
        # "unseen" and dropout matter in training only
        plain = key.model_copy(update={"unseen": "error", "dropout": 0.0})
        table = {c.id: {name: v} for c, v in zip(rows.cases, values, strict=True)}
        encoder = MetadataEncoder.fit(table, {name: plain})[name]
        found = _columns(name, key, encoder, values)
        x = np.stack([encoder.encode(v) for v in values]).astype(float)
        if key.kind == "continuous":
            x = np.concatenate([x, _bent(found[0].x)], 1)
        rows.columns += found
        rows.encoded[name] = x
        if key.input:
            rows.inputs.append(name)


def _drawn(
    cases: Sequence[Case], digests: Mapping[str, str], seed: int
) -> tuple[list[Case], list[str]]:
    """One case of each subject, and notes; of subjects with identical images only the first is drawn."""
    rng = np.random.default_rng(seed)
    by_subject: dict[str, list[Case]] = {}
    for case in cases:
        by_subject.setdefault(case.subject, []).append(case)
    drawn, notes, same = [], [], []
    seen: set[str] = set()
    for subject in sorted(by_subject):
        mine = by_subject[subject]
        every = {digests[c.id] for c in mine}
        if every & seen:
            same.append(subject)
            continue
        seen |= every
        drawn.append(mine[int(rng.integers(len(mine)))])
    if len(cases) > len(by_subject):
        notes.append(
            f"subjects count, not cases: one of the {len(cases)} cases of each of the {len(by_subject)} subjects"
            " was drawn"
        )
    if len(drawn) > MOST:
        notes.append(f"{MOST} of {len(drawn)} subjects were drawn")
        drawn = [drawn[i] for i in sorted(rng.choice(len(drawn), MOST, replace=False))]
    if same:
        notes.append(f"left out, images identical to another subject's: {', '.join(same)}")
    return drawn, notes


def _columns(
    name: str, key: MetadataKey, encoder: KeyEncoder, values: Sequence[Any]
) -> list[Column]:
    missing = np.array([is_missing(v, key) for v in values])
    if key.kind == "multilabel":
        sets = [
            set() if m else set(encoder.several(v)) for v, m in zip(values, missing, strict=True)
        ]
        return [
            Column(
                f"{name}: {v}",
                name,
                key.input,
                ["no", "yes"],
                np.where(missing, np.nan, [float(v in s) for s in sets]),
            )
            for v in encoder.values
        ]
    if key.kind == "continuous":
        x = [np.nan if m else encoder.number(v) for v, m in zip(values, missing, strict=True)]
        return [Column(name, name, key.input, [], np.array(x, float))]
    x = [
        np.nan if m else float(encoder.values.index(as_category(v)))
        for v, m in zip(values, missing, strict=True)
    ]
    return [Column(name, name, key.input, list(encoder.values), np.array(x, float))]


def _bent(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks of ``x`` [n] in -1..1 (0 if missing) and their squares, [n, 2]."""
    there = ~np.isnan(x)
    rank = np.zeros(len(x))
    rank[there] = 2 * (stats.rankdata(x[there]) - 0.5) / there.sum() - 1
    return np.stack([rank, rank**2], 1)
