"""The scores of all runs of a trial, read, checked against the design and each other, and as arrays.

OUT/design.json                              ``Design``
OUT/runs/ARM/fold-K/seed-S/scores.json       ``Run``: what one network made of the cases that its fold holds out
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..support.errors import Problems, UserError
from ..support.hints import some
from ..support.records import (
    Measured,
    Plain,
    Record,
    read_record,
)

Array = NDArray[np.float64]

CONDITIONED, UNCONDITIONED, SHUFFLED = "conditioned", "unconditioned", "shuffled"

LISTED = 10
"""Runs that a message names at most."""

Triple = Annotated[list[Measured], Field(min_length=3, max_length=3)]
"""A bin of a reliability diagram: voxels, sum of their probabilities, voxels of the label."""


class Design(Record):
    """What is read of design.json."""

    arms: list[str]
    folds: int = Field(ge=1)
    seeds: list[int] = Field(min_length=1)
    margin: float = Field(gt=0, lt=1)
    alpha: float = Field(gt=0, lt=1)
    cluster: str | None
    labels: list[str] = Field(min_length=1)
    keys: dict[str, str]
    kinds: dict[str, str] = Field(default_factory=dict)
    endpoint: str
    test: str
    sha256: str

    @model_validator(mode="after")
    def _complete(self) -> Design:
        for name, entries in (("arms", self.arms), ("seeds", self.seeds), ("labels", self.labels)):
            if len(set(entries)) < len(entries):
                raise ValueError(f"{name} must differ, got {entries}")
        if not {CONDITIONED, UNCONDITIONED} <= {*self.arms}:
            raise ValueError(f"arms must have {CONDITIONED} and {UNCONDITIONED}, got {self.arms}")
        return self

    def every_kind(self) -> dict[str, str]:
        """Key -> kind, of the keys that the network gets and of those that it does not."""
        return self.kinds | self.keys

    def shown(self) -> dict[str, Any]:
        """The entries that results repeat."""
        return self.model_dump(include=set(Design.model_fields))


class Case(Record):
    """One held-out case under one network.

    Attributes:
        metrics: label -> metric -> value; a label that is not annotated in the case is not there.
        swaps: key -> value that was fed instead of the true one -> label -> Dice.
        reliability: label -> bins.
    """

    subject: str
    cluster: str | None = None
    metadata: dict[str, Plain] = Field(default_factory=dict)
    metrics: dict[str, dict[str, Measured | None]]
    swaps: dict[str, dict[str, dict[str, Measured | None]]] = Field(default_factory=dict)
    reliability: dict[str, list[Triple]] = Field(default_factory=dict)

    def about(self) -> tuple[Any, ...]:
        """What has to be the same under every network."""
        return self.subject, self.cluster, self.metadata, sorted(self.metrics)


class Point(Record):
    """A point of a training curve."""

    step: int
    dice_mean: Measured | None


class Run(Record):
    """What is read of scores.json."""

    arm: str
    fold: int
    seed: int
    design: str
    steps: int
    cases: dict[str, Case]
    curve: list[Point] = Field(default_factory=list)


@dataclass(frozen=True)
class Scores:
    """All runs of a trial.

    Attributes:
        runs: (arm, fold, seed) -> run.
        names: the cases, sorted.
        fold: of each case, in the order of ``names``.
        cases: their entries in one of the runs, in that order: what is the same in all of them.
    """

    design: Design
    runs: Mapping[tuple[str, int, int], Run]
    names: list[str]
    fold: list[int]
    cases: list[Case]

    def of(self, arm: str) -> list[list[Case]]:
        """Each case under each seed of an arm."""
        return [
            [self.runs[arm, fold, seed].cases[name] for seed in self.design.seeds]
            for name, fold in zip(self.names, self.fold, strict=True)
        ]

    def array(self, arm: str, value: Callable[[Case, str], float | None]) -> Array:
        """[cases, seeds, labels]; NaN where ``value`` of a case and label is None."""
        return np.array(
            [[[_nan(value(c, x)) for x in self.design.labels] for c in row] for row in self.of(arm)]
        )

    def metric(self, arm: str, metric: str) -> Array:
        """[cases, seeds, labels]; NaN where it is not defined or the label not annotated."""
        return self.array(arm, lambda case, label: case.metrics.get(label, {}).get(metric))

    def swap(self, key: str, value: str) -> Array:
        """Dice under another value, [cases, seeds, labels]; NaN where it was not fed or is not defined."""
        return self.array(
            CONDITIONED, lambda case, label: case.swaps.get(key, {}).get(value, {}).get(label)
        )

    def annotated(self) -> NDArray[np.bool_]:
        """Which labels each case has, [cases, labels]."""
        return np.array([[x in c.metrics for x in self.design.labels] for c in self.cases])

    def fed(self) -> dict[str, list[str]]:
        """Key -> the values that were fed instead of true ones, sorted."""
        found: dict[str, set[str]] = {}
        for row in self.of(CONDITIONED):
            for key, values in itertools.chain.from_iterable(c.swaps.items() for c in row):
                found.setdefault(key, set()).update(values)
        return {key: sorted(found[key]) for key in sorted(found)}


def scores_file(out: Path, arm: str, fold: int, seed: int) -> Path:
    """Where the scores of a run lie."""
    return out / "runs" / arm / f"fold-{fold}" / f"seed-{seed}" / "scores.json"


def read_scores(out: Path) -> Scores:
    """The design and all runs of a trial.

    Raises:
        UserError: files that are not there or damaged, a run of another design, runs that disagree on a case.
    """
    design = read_record(out / "design.json", Design, "the design of a trial")
    every = list(itertools.product(design.arms, range(design.folds), design.seeds))
    files = {key: scores_file(out, *key) for key in every}
    missing = [key for key, path in files.items() if not path.is_file()]
    if missing:
        listed = some([f"{a} fold {k} seed {s}" for a, k, s in missing], LISTED)
        raise UserError(
            f"{out}: {len(missing)} of {len(every)} runs are not finished: {listed};"
            " the same command of fastfilm trial goes on with them"
        )
    runs = {key: _read_run(path, key, design) for key, path in files.items()}
    found: dict[str, tuple[int, Case]] = {}
    wrong: list[str] = []
    for (arm, fold, seed), run in sorted(runs.items()):
        path = files[arm, fold, seed]
        expected = runs[design.arms[0], fold, design.seeds[0]].cases
        if run.cases.keys() != expected.keys():
            other = sorted(run.cases.keys() ^ expected.keys())
            wrong.append(
                f"{path}: its cases are not those of {files[design.arms[0], fold, design.seeds[0]]}:"
                f" {some(other)}"
            )
            continue
        for name, case in run.cases.items():
            held_out, known = found.setdefault(name, (fold, case))
            if held_out != fold:
                wrong.append(f"{path}: {name} is held out in fold {held_out} too")
            elif case.about() != known.about():
                wrong.append(
                    f"{path}: {name} has not the subject, metadata or labels of other runs"
                )
            strange = sorted(case.metrics.keys() - {*design.labels})
            if strange:
                wrong.append(f"{path}: {name}: {strange[0]!r} is no label of the design")
    if wrong:
        raise Problems(f"{out}: the runs do not go together", wrong)
    if not any(case.metrics for _, case in found.values()):
        raise UserError(f"{out}: the runs have no case with a label")
    names = sorted(found)
    fold_of = [found[n][0] for n in names]
    return Scores(design, runs, names, fold_of, [found[n][1] for n in names])


def _read_run(path: Path, key: tuple[str, int, int], design: Design) -> Run:
    run = read_record(path, Run, "the scores of a run of fastfilm trial")
    if (run.arm, run.fold, run.seed) != key:
        raise UserError(
            f"{path}: holds {run.arm}, fold {run.fold}, seed {run.seed};"
            f" expected {key[0]}, fold {key[1]}, seed {key[2]}"
        )
    if run.design != design.sha256:
        raise UserError(
            f"{path}: is of another design ({run.design:.12}) than {path.parents[4] / 'design.json'}"
            f" ({design.sha256:.12}); give another folder, or delete the runs"
        )
    return run


def _nan(value: float | None) -> float:
    return np.nan if value is None else value
