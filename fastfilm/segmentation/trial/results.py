"""What a trial found: OUT/results.json, from the scores of all its runs.

The file depends on the scores alone: not on the order in which runs were made, nor on time.

A label counts in a case where its metric is defined in every run; where it is not, the label is empty in the truth
(Dice is not defined where the prediction is empty too), and a network must not gain or lose by leaving the case's
mean. A case's Dice is the mean over the labels that count.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.statistics import holm
from ..metadata.encoder import as_category
from ..metadata.groups import (
    MISSING,
    UNKNOWN,
    groupings,
    is_absent,
)
from ..support.errors import UserError
from ..support.files import write_json
from ..support.hints import some
from .scores import CONDITIONED, SHUFFLED, UNCONDITIONED, Array, Scores, read_scores
from .statistics import MINIMUM, Difference, difference, needed

RESULTS = "results.json"

SECONDARY = {"HD95": "lower", "NSD": "higher"}
"""Further metrics, and which values are better."""

COMPARED = (CONDITIONED, UNCONDITIONED)

DIGITS = 10
"""Significant digits that are written: the last ones depend on how a machine adds up."""

RISE = 0.02
"""Of the validation Dice in the last quarter of the steps: more says that training had not levelled off."""

PAIRS = (("nnunet_conditioned", "nnunet"),)
"""Other arms that differ in the metadata alone, and are compared with each other."""

Mask = NDArray[np.bool_]


def collect(out: Path) -> dict[str, Any]:
    """Reads all scores of a trial and writes OUT/results.json.

    Returns:
        what the file holds: ``design``; ``counts``; ``arms``: arm -> means and spreads; ``primary``: conditioned -
        unconditioned; ``against``: other arm -> conditioned - that arm; ``pairs``: differences of other arms;
        ``labels``; ``secondary``; ``groups``: key -> group; ``extremes``; ``swaps``: key -> what a wrong value
        costs; ``calibration``; ``curves``; ``needed``; ``points``: each case's and each network's difference;
        ``notes``.

    Raises:
        UserError: runs that are missing, damaged, of another design, or without a case that can be compared.
    """
    results = summarise(read_scores(out))
    write_json(out / RESULTS, results)
    return results


def summarise(scores: Scores) -> dict[str, Any]:
    """As ``collect``, of scores that are read.

    Raises:
        UserError: no case can be compared.
    """
    design = scores.design
    compared = _Compared(scores, "Dice", swaps=True)
    if not compared.counts.any():
        raise UserError("no case has a label whose Dice is defined in every run of the trial")
    dice = {arm: compared.means(arm) for arm in design.arms}
    primary = compared.difference(dice[CONDITIONED] - dice[UNCONDITIONED])
    others = [arm for arm in design.arms if arm not in COMPARED]
    against = {arm: compared.difference(dice[CONDITIONED] - dice[arm]) for arm in others}
    pairs = {
        f"{a} - {b}": compared.difference(dice[a] - dice[b])
        for a, b in PAIRS
        if {a, b} <= {*design.arms}
    }
    further = _corrected({name: d.to_json() for name, d in {**against, **pairs}.items()})
    groups = _groups(compared, dice)
    results = {
        "format": 1,
        "design": design.shown(),
        "counts": {
            "cases": len(scores.names),
            "compared": int(compared.cases.sum()),
            "subjects": primary.subjects,
            "clusters": primary.clusters,
            "folds": design.folds,
            "seeds": len(design.seeds),
            "networks": len(scores.runs),
            "steps": sorted({run.steps for run in scores.runs.values()}),
        },
        "arms": {arm: _arm(compared, arm, dice[arm]) for arm in design.arms},
        "primary": primary.to_json(),
        "against": {arm: further[arm] for arm in against},
        "pairs": {name: further[name] for name in pairs},
        "labels": _labels(compared),
        "secondary": _secondary(scores),
        "groups": groups,
        "extremes": _extremes(groups),
        "swaps": {key: _swap(compared, key, fed) for key, fed in scores.fed().items()},
        "calibration": _calibration(compared),
        "curves": {arm: _curve(scores, arm) for arm in design.arms},
        "needed": {
            UNCONDITIONED: needed(primary, design.margin).to_json(),
            **{
                arm: needed(d, design.margin).to_json()
                for arm, d in against.items()
                if arm == SHUFFLED
            },
        },
        "points": _points(compared, dice),
        "notes": _notes(compared, primary),
    }
    rounded: dict[str, Any] = _rounded(results)
    return rounded


class _Compared:
    """The cases and labels of a metric that count in every arm.

    Attributes:
        values: arm -> [cases, seeds, labels].
        counts: [cases, labels].
        cases: which of them have a label that counts, [cases].
        left_out: annotated, but not defined in some run, [cases, labels].
    """

    def __init__(self, scores: Scores, metric: str, swaps: bool = False) -> None:
        self.scores = scores
        self.values = {arm: scores.metric(arm, metric) for arm in scores.design.arms}
        annotated = scores.annotated()
        defined = np.all([np.isfinite(v).all(1) for v in self.values.values()], axis=0)
        if swaps:
            # where a swapped value empties a prediction, the truth turns out to be empty
            defined &= ~_undefined_swaps(scores)
        self.counts: Mask = annotated & defined
        self.cases: Mask = np.asarray(self.counts.any(1))
        self.left_out: Mask = annotated & ~defined

    def mean_of(self, values: Array) -> Array:
        """Over the labels that count: [cases, seeds, labels] -> [cases, seeds]; NaN where none does or one is."""
        n = self.counts.sum(1)[:, None]
        total = np.where(self.counts[:, None], values, 0.0).sum(2)
        return np.where(n > 0, total / np.maximum(n, 1), np.nan)

    def means(self, arm: str) -> Array:
        """Of each case and seed over the labels that count, [cases, seeds]."""
        return self.mean_of(self.values[arm])

    def difference(
        self, values: Array, where: Mask | None = None, clustered: bool = True
    ) -> Difference:
        """Of the cases in ``where`` that are defined.

        Args:
            values: [cases, seeds].
            where: [cases]; None: all.
            clustered: clusters are the units where the design has some.
        """
        there = np.isfinite(values).all(1)
        at = np.flatnonzero(there if where is None else there & where)
        cases = [self.scores.cases[i] for i in at]
        clustered = clustered and self.scores.design.cluster is not None
        return difference(
            values[at],
            [self.scores.fold[i] for i in at],
            [c.subject for c in cases],
            [c.cluster for c in cases] if clustered else None,
        )

    def where(self, names: Iterable[str]) -> Mask:
        """Which cases are in ``names``, [cases]."""
        given = set(names)
        return np.array([n in given for n in self.scores.names])


def _undefined_swaps(scores: Scores) -> Mask:
    """Labels that are not defined under a value that was fed, [cases, labels]."""
    found = np.zeros((len(scores.names), len(scores.design.labels)), bool)
    for i, row in enumerate(scores.of(CONDITIONED)):
        fed = [dice for c in row for values in c.swaps.values() for dice in values.values()]
        for j, label in enumerate(scores.design.labels):
            found[i, j] = any(label in dice and dice[label] is None for dice in fed)
    return found


def _mean(values: Array) -> float | None:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else None


def _deviation(values: Array) -> float | None:
    there = values[np.isfinite(values)]
    return float(there.std(ddof=1)) if there.size > 1 else None


def _arm(compared: _Compared, arm: str, dice: Array) -> dict[str, Any]:
    """Means of an arm, over seeds and cases apart."""
    known = dice[np.isfinite(dice).all(1)]
    labels = compared.scores.design.labels
    values = compared.values[arm]
    return {
        "mean": _mean(known),
        "by_seed": known.mean(0).tolist(),
        "spread_seeds": _deviation(known.mean(0)),
        "spread_cases": _deviation(known.mean(1)),
        "labels": {x: _mean(values[compared.counts[:, j], :, j]) for j, x in enumerate(labels)},
    }


def _both(
    compared: _Compared, a: Array, b: Array, where: Mask | None = None, clustered: bool = True
) -> dict[str, Any]:
    """Means of both arms on the cases in ``where``, and their difference; values [cases, seeds]."""
    there: Mask = np.asarray(np.isfinite(a - b).all(1))
    there = there if where is None else there & where
    return {
        CONDITIONED: _mean(a[there]),
        UNCONDITIONED: _mean(b[there]),
        **compared.difference(a - b, there, clustered).to_json(),
    }


def _corrected(rows: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """With ``p_holm``, corrected for the number of rows."""
    corrected = holm([row["p"] for row in rows.values()])
    return {
        name: {**row, "p_holm": p} for (name, row), p in zip(rows.items(), corrected, strict=True)
    }


def _labels(compared: _Compared) -> dict[str, Any]:
    """Conditioned against unconditioned for each label that counts in any case."""
    rows = {}
    for j, label in enumerate(compared.scores.design.labels):
        there = compared.counts[:, j]
        if there.any():
            a, b = (compared.values[arm][:, :, j] for arm in COMPARED)
            rows[label] = _both(compared, a, b, there)
    return _corrected(rows)


def _secondary(scores: Scores) -> dict[str, Any]:
    """Further metrics of the case's mean over its labels; one that no case has is left out."""
    rows = {}
    for metric, better in SECONDARY.items():
        compared = _Compared(scores, metric)
        if compared.counts.any():
            a, b = (compared.means(arm) for arm in COMPARED)
            rows[metric] = {"better": better, **_both(compared, a, b)}
    return _corrected(rows)


def _groups(compared: _Compared, dice: Mapping[str, Array]) -> dict[str, Any]:
    """Key -> group -> conditioned against unconditioned, for keys that make two groups or more.

    A group of the key that makes the clusters is one cluster: what is said of it is said of its subjects.
    """
    scores = compared.scores
    metadata = {
        n: c.metadata
        for n, c, ok in zip(scores.names, scores.cases, compared.cases, strict=True)
        if ok
    }
    found: dict[str, Any] = {}
    every: list[dict[str, Any]] = []
    for key, grouping in groupings(metadata, scores.design.every_kind()).items():
        if len(grouping.members) < 2:
            continue
        found[key] = {"binned": grouping.binned, "input": key in scores.design.keys, "groups": {}}
        for name, members in grouping.members.items():
            a, b = (dice[arm] for arm in COMPARED)
            clustered = key != scores.design.cluster
            row = _both(compared, a, b, compared.where(members), clustered)
            found[key]["groups"][name] = row
            every.append(row)
    for row, p in zip(every, holm([row["p"] for row in every]), strict=True):
        row["p_holm"] = p
    return found


def _extremes(groups: Mapping[str, Any]) -> dict[str, list[str]] | None:
    """The groups with the largest and the smallest mean difference among those of two subjects or more."""
    rows = [
        (row["mean"], key, name)
        for key, found in groups.items()
        for name, row in found["groups"].items()
        if row["low"] is not None
    ]
    if not rows:
        return None
    best, worst = max(rows, key=lambda r: r[0]), min(rows, key=lambda r: r[0])
    return {"best": list(best[1:]), "worst": list(worst[1:])}


def _swap(compared: _Compared, key: str, fed: Sequence[str]) -> dict[str, Any]:
    """What the conditioned networks lose by a wrong value of a key, and by none.

    ``wrong`` and ``unknown`` are Dice with the true value minus Dice with a wrong one (the mean over those that
    were fed), and with the value hidden. ``used``: a wrong value costs (True), costs less than the margin
    (False), or that is not clear (None).
    """
    scores = compared.scores
    true = [_name(c.metadata.get(key)) for c in scores.cases]
    own = compared.means(CONDITIONED)
    under = {value: compared.mean_of(scores.swap(key, value)) for value in fed}
    hiding = MISSING if MISSING in fed else None if UNKNOWN in true else UNKNOWN
    wrong = np.full((len(fed), *own.shape), np.nan)
    for i, value in enumerate(fed):
        if value != hiding:
            is_wrong = np.array([t is not None and t != value for t in true])
            wrong[i] = np.where(is_wrong[:, None], under[value], np.nan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        cost = own - np.nanmean(wrong, axis=0)
    margin = scores.design.margin
    found = _difference_or_none(compared, cost)
    used = None
    if found is not None:
        used = True if found.superior else False if found.excludes(margin) else None
    metadata = {
        n: {key: c.metadata.get(key)}
        for n, c, ok in zip(scores.names, scores.cases, compared.cases, strict=True)
        if ok
    }
    grouping = groupings(metadata, scores.design.every_kind()).get(key)
    members = {"all": [*metadata]} if grouping is None else grouping.members
    rows = {}
    for group, names in members.items():
        at = compared.where(names)
        rows[group] = {
            "n": int((at & np.isfinite(own).all(1)).sum()),
            "true": _mean(own[at]),
            "fed": {value: _mean(values[at]) for value, values in under.items()},
        }
    hidden = None
    if hiding in under:
        told = np.array([t is not None for t in true])[:, None]
        hidden = _difference_or_none(compared, np.where(told, own - under[hiding], np.nan))
    return {
        "wrong": None if found is None else found.to_json(),
        "unknown": None if hidden is None else hidden.to_json(),
        "used": used,
        "rows": rows,
    }


def _difference_or_none(compared: _Compared, values: Array) -> Difference | None:
    return compared.difference(values) if np.isfinite(values).all(1).any() else None


def _name(value: Any) -> str | None:
    """A metadata value as swaps name it; None where it is missing."""
    if is_absent(value):
        return None
    return ";".join(map(as_category, value)) if isinstance(value, list) else as_category(value)


def _calibration(compared: _Compared) -> dict[str, Any]:
    """Reliability of the probabilities of both arms, by label and by group; empty without bins.

    The expected calibration error is the mean over bins of |mean probability - share of the label|, weighted
    with the bins' voxels, which are pooled over cases and seeds (Naeini, Cooper and Hauskrecht 2015).
    """
    scores = compared.scores
    names = scores.design.labels
    bins = {arm: _bins(scores, arm) for arm in COMPARED}
    if any(b is None for b in bins.values()):
        return {}
    pooled: dict[str, Array] = {arm: b for arm, b in bins.items() if b is not None}
    labels: dict[str, Any] = {arm: {} for arm in COMPARED}
    for arm, values in pooled.items():
        for j, label in enumerate(names):
            total = values[:, j].sum(0)
            error = _calibration_error(total)
            if error is not None:
                filled = total[total[:, 0] > 0]
                rows = [[n, p / n, t / n] for n, p, t in filled.tolist()]
                labels[arm][label] = {"error": error, "bins": rows}
    metadata = {n: c.metadata for n, c in zip(scores.names, scores.cases, strict=True)}
    groups: dict[str, Any] = {}
    for key, grouping in groupings(metadata, scores.design.every_kind()).items():
        if len(grouping.members) < 2:
            continue
        groups[key] = {
            group: {
                arm: _over_labels(values[compared.where(members)].sum(0))
                for arm, values in pooled.items()
            }
            for group, members in grouping.members.items()
        }
    whole = {arm: _over_labels(values.sum(0)) for arm, values in pooled.items()}
    return {"error": whole, "labels": labels, "groups": groups}


def _bins(scores: Scores, arm: str) -> Array | None:
    """Bins of each case and label over its seeds, [cases, labels, bins, 3]; None where there are none."""
    rows = scores.of(arm)
    sizes = {len(b) for row in rows for c in row for b in c.reliability.values()}
    if len(sizes) != 1:
        return None
    found = np.zeros((len(rows), len(scores.design.labels), sizes.pop(), 3))
    for i, row in enumerate(rows):
        for j, label in enumerate(scores.design.labels):
            for case in row:
                if label in case.reliability:
                    found[i, j] += case.reliability[label]
    return found


def _calibration_error(bins: Array) -> float | None:
    """Of bins [bins, 3]: voxels, sum of probabilities, voxels of the label; None without voxels."""
    count = float(bins[:, 0].sum())
    return float(np.abs(bins[:, 1] - bins[:, 2]).sum() / count) if count else None


def _over_labels(bins: Array) -> float | None:
    """Mean calibration error over the labels of bins [labels, bins, 3]."""
    errors = [e for b in bins if (e := _calibration_error(b)) is not None]
    return float(np.mean(errors)) if errors else None


def _curve(scores: Scores, arm: str) -> list[dict[str, Any]]:
    """Mean, lowest and highest validation Dice over the runs of an arm, by step."""
    found: dict[int, list[float]] = {}
    for (which, _, _), run in sorted(scores.runs.items()):
        for point in run.curve:
            if which == arm and point.dice_mean is not None:
                found.setdefault(point.step, []).append(point.dice_mean)
    return [
        {"step": s, "mean": float(np.mean(v)), "low": min(v), "high": max(v), "runs": len(v)}
        for s, v in sorted(found.items())
    ]


def _points(compared: _Compared, dice: Mapping[str, Array]) -> dict[str, Any]:
    """The difference of each case over its seeds, and of each network over its cases."""
    scores = compared.scores
    values = dice[CONDITIONED] - dice[UNCONDITIONED]
    at = np.flatnonzero(np.isfinite(values).all(1))
    folds = np.array(scores.fold)
    networks = []
    for fold in sorted({scores.fold[i] for i in at}):
        inside = at[folds[at] == fold]
        for s, seed in enumerate(scores.design.seeds):
            mean = float(values[inside, s].mean())
            networks.append({"fold": fold, "seed": seed, "cases": len(inside), "difference": mean})
    cases = [
        {
            "case": scores.names[i],
            "subject": scores.cases[i].subject,
            **{arm: float(dice[arm][i].mean()) for arm in COMPARED},
            "difference": float(values[i].mean()),
        }
        for i in at
    ]
    return {"cases": cases, "networks": networks}


def _rising(arm: str, curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note where an arm's mean validation Dice rose by more than ``RISE`` in the last quarter of the steps."""
    if not curve:
        return []
    last = curve[-1]
    before = [point["mean"] for point in curve if point["step"] <= 0.75 * last["step"]]
    if not before or last["mean"] - before[-1] <= RISE:
        return []
    return [
        f"{arm}: the validation Dice still rose by {last['mean'] - before[-1]:.3f} in the last quarter of the"
        " training: the answer holds for trainings of this length"
    ]


def _notes(compared: _Compared, primary: Difference) -> list[str]:
    """What a reader has to know about the numbers."""
    scores = compared.scores
    notes = []
    for j, label in enumerate(scores.design.labels):
        at = np.flatnonzero(compared.left_out[:, j])
        if at.size:
            shares = []
            for arm in scores.design.arms:
                # where the truth is empty, Dice is 0 if something was predicted and undefined if not
                false = np.isfinite(compared.values[arm][at, :, j]).mean()
                shares.append(f"{arm} in {false:.0%}")
            names = some([scores.names[i] for i in at])
            notes.append(
                f"{label}: the truth of {_counted(at.size)} is empty ({names}), left out of its Dice;"
                f" something was predicted there by {', '.join(shares)} of the runs"
            )
        if not compared.counts[:, j].any():
            notes.append(f"{label}: no case counts")
    without = np.flatnonzero(~compared.cases)
    if without.size:
        names = some([scores.names[i] for i in without])
        notes.append(f"{_counted(without.size)} without a label that counts: {names}")
    notes += [line for arm in COMPARED for line in _rising(arm, _curve(scores, arm))]
    if not primary.training_known:
        notes.append(
            "one seed: how much the result depends on the training run is not known; the intervals hold for these"
            " networks alone"
        )
    for count, what in (
        (primary.subjects, "subjects"),
        (primary.clusters, f"values of {scores.design.cluster}"),
        (primary.networks, "pairs of networks"),
    ):
        if count is not None and count < MINIMUM:
            notes.append(
                f"{count} {what}: a permutation test of fewer than {MINIMUM} cannot reach p < 0.05"
            )
    return notes


def _counted(cases: int) -> str:
    return f"{cases} case" if cases == 1 else f"{cases} cases"


def _rounded(value: Any) -> Any:
    """Floats to ``DIGITS`` significant digits, and to 12 behind the point."""
    if isinstance(value, float):
        return float(f"{round(value, 12):.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
