"""A plan as a table for statistics: one case of each subject, its metadata, labels and fold.

Cases of a subject are alike, so that tests over cases find associations that are not there. One case of each
subject, drawn by the seed, keeps rows independent whatever varies within a subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..config.sections import MetadataKey
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..metadata.encoder import (
    KeyEncoder,
    MetadataEncoder,
    as_category,
    is_missing,
)
from ..support.errors import UserError
from ..support.records import Record, read_record

KINDS = ("category", "ordered", "multilabel", "continuous")
"""Kinds of keys that the audit knows."""

MOST = 2000
"""Subjects that are looked at: the work grows with their square, and intervals are narrow by then."""


@dataclass(frozen=True)
class Column:
    """One variable of the rows: a key, or one value of a multilabel key.

    Attributes:
        name: of the column, such as "site", or "findings: edema".
        key: metadata key that it belongs to.
        input: the network gets it.
        values: names of the categories; none for a number.
        x: [n] float64: position in ``values``, or the number; NaN where missing.
    """

    name: str
    key: str
    input: bool
    values: list[str]
    x: NDArray[np.float64]

    @property
    def categorical(self) -> bool:
        """Whether it is one of several values."""
        return bool(self.values)

    def there(self) -> NDArray[np.bool_]:
        """[n]: where it has a value."""
        return ~np.isnan(self.x)


@dataclass
class Rows:
    """One case of each subject.

    Attributes:
        cases: in the order of their subjects.
        columns: of all keys.
        encoded: key -> [n, w], what the network sees, and for numbers their ranks and squared ranks, so that a
            linear model can bend.
        inputs: keys that the network gets.
        volumes: label -> [n] mL, NaN where it is not annotated.
        geometry: [n, 6]: logarithms of the image's shape and spacing.
        fold: [n]: fold that holds the subject out; NaN where none does.
        notes: what was left out.
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
    """What of a case's ``CaseFacts`` is read from a plan."""

    id: str
    digest: str
    shape: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)]
    spacing: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    voxels: dict[str, int]


class Fingerprint(Record):
    """A plan's fingerprint.json."""

    cases: list[Facts]

    def by_id(self) -> dict[str, Facts]:
        """Case -> its facts."""
        return {f.id: f for f in self.cases}


def read_rows(plan: PlanFolder, seed: int) -> Rows:
    """The rows of a plan.

    Raises:
        UserError: no metadata keys; a fingerprint that is none, or lacks a case.
    """
    if not plan.config.metadata:
        raise UserError("metadata: the configuration has no key, so there is nothing to audit")
    file = plan.path / "fingerprint.json"
    facts = read_record(file, Fingerprint, "the fingerprint of a plan").by_id()
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
    """Columns and encodings of the keys; those that cannot be used are said in the notes."""
    for name, key in keys.items():
        values = [c.metadata.get(name) for c in rows.cases]
        if key.kind not in KINDS:
            rows.notes.append(f"{name} is left out: kind {key.kind} is not audited")
            continue
        if all(is_missing(v, key) for v in values):
            rows.notes.append(f"{name} is left out: none of the drawn cases has a value")
            continue
        # "unseen" and dropout are about training
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
    """One case of each subject; of subjects with identical images the first."""
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
    """[n, 2]: rank in -1..1 (0 where missing) and its square."""
    from scipy import stats

    there = ~np.isnan(x)
    rank = np.zeros(len(x))
    rank[there] = 2 * (stats.rankdata(x[there]) - 0.5) / there.sum() - 1
    return np.stack([rank, rank**2], 1)
