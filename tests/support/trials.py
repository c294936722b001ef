"""Scores of a trial drawn from a model of variance components, as ``fastfilm trial`` writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SHA = "5eed" * 16


def write_trial(
    out: Path,
    gain: Mapping[str, float] | None = None,
    *,
    folds: int = 5,
    seeds: int = 3,
    subjects: int = 40,
    labels: Sequence[str] = ("lesion",),
    keys: Mapping[str, Sequence[Any]] | None = None,
    kinds: Mapping[str, str] | None = None,
    group_gain: Mapping[tuple[str, Any], float] | None = None,
    wrong: Mapping[str, float] | None = None,
    cluster: str | None = None,
    margin: float = 0.01,
    subject: float = 0.02,
    run: float = 0.004,
    rest: float = 0.01,
    seed: int = 0,
) -> Path:
    """Writes OUT/design.json and the scores of all runs.

    Args:
        gain: arm -> its mean Dice minus that of the arm unconditioned; None: {"conditioned": 0.03, "shuffled": 0}.
        keys: key -> values, dealt out to the subjects in turn; None: tumor_type with two.
        kinds: key -> kind, of those that are given to the network; None: all of ``keys``, categories.
        group_gain: (key, value) -> what its cases gain on top in the arm conditioned.
        wrong: key -> Dice that a wrong value of it costs; half of it where the value is hidden; None: no swaps.
        subject, run, rest: standard deviations of a subject's gain, of a run's mean, of a case in a run.
    """
    gain = {"conditioned": 0.03, "shuffled": 0.0} if gain is None else gain
    keys = {"tumor_type": ["astrocytoma", "ependymoma"]} if keys is None else keys
    kinds = dict.fromkeys(keys, "category") if kinds is None else kinds
    arms = ["conditioned", "unconditioned", *(a for a in gain if a != "conditioned")]
    rng = np.random.default_rng(seed)
    write_design(
        out, arms=arms, folds=folds, seeds=list(range(seeds)), margin=margin, cluster=cluster,
        labels=list(labels), keys=dict(kinds),
    )  # fmt: skip
    base = rng.uniform(0.6, 0.8, (subjects, len(labels)))
    own = {arm: subject * rng.standard_normal(subjects) for arm in gain}
    turn = [rng.permutation(subjects) for _ in keys]
    metadata = [
        {k: v[int(t[i]) % len(v)] for t, (k, v) in zip(turn, keys.items(), strict=True)}
        for i in range(subjects)
    ]
    for arm in arms:
        for fold in range(folds):
            for s in range(seeds):
                shift = run * rng.standard_normal()
                cases = {}
                for i in range(fold, subjects, folds):
                    more = 0.0
                    if arm in gain:
                        more = gain[arm] + own[arm][i]
                    if arm == "conditioned":
                        more += sum(
                            g for (k, v), g in (group_gain or {}).items() if metadata[i][k] == v
                        )
                    dice = base[i] + shift + more + rest * rng.standard_normal(len(labels))
                    cases[f"case-{i:03}"] = case(
                        f"sub-{i:03}", dict(zip(labels, dice.tolist(), strict=True)), metadata[i],
                        None if cluster is None else str(metadata[i][cluster]),
                        swaps(dice, labels, metadata[i], keys, wrong)
                        if wrong and arm == "conditioned" else {},
                        shift=0.03 if arm == "conditioned" else 0.08,
                    )  # fmt: skip
                curve = [{"step": 50 * (j + 1), "dice_mean": 0.7 - 0.4 / (j + 1) + shift}
                         for j in range(8)]  # fmt: skip
                write_run(out, arm, fold, s, cases, curve)
    return out


def write_design(out: Path, **entries: Any) -> None:
    """OUT/design.json with what is given and defaults."""
    design = {
        "format": 1,
        "arms": ["conditioned", "unconditioned"],
        "folds": 2,
        "seeds": [0, 1],
        "margin": 0.01,
        "alpha": 0.05,
        "cluster": None,
        "labels": ["lesion"],
        "keys": {},
        "endpoint": "mean over held-out cases of a case's Dice, the mean over its labels",
        "test": "largest p of a t test and two permutation tests",
        "config": {},
        "subjects": {},
        "sha256": SHA,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "design.json").write_text(json.dumps(design | entries), encoding="utf-8")


def write_run(
    out: Path,
    arm: str,
    fold: int,
    seed: int,
    cases: Mapping[str, Any],
    curve: Any = (),
    **more: Any,
) -> Path:
    """OUT/runs/ARM/fold-K/seed-S/scores.json."""
    path = out / "runs" / arm / f"fold-{fold}" / f"seed-{seed}" / "scores.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {"arm": arm, "fold": fold, "seed": seed, "design": SHA, "steps": 400, "seconds": 12.5,
             "cases": dict(cases), "curve": list(curve)}  # fmt: skip
    path.write_text(json.dumps(value | more), encoding="utf-8")
    return path


def case(
    subject: str,
    dice: Mapping[str, float | None],
    metadata: Mapping[str, Any] | None = None,
    cluster: str | None = None,
    swapped: Mapping[str, Any] | None = None,
    shift: float | None = None,
) -> dict[str, Any]:
    """An entry of scores.json; HD95 and NSD go along with Dice.

    Args:
        shift: probabilities are too high by so much; None: no bins.
    """
    metrics = {
        label: {
            "Dice": d,
            "HD95": None if d is None else 20 * (1 - d),
            "NSD": None if d is None else min(1.0, d + 0.1),
            "volume_error": 0.5,
        }
        for label, d in dice.items()
    }
    bins = [] if shift is None else [
        [100, 100 * (i + 0.5) / 10, 100 * max((i + 0.5) / 10 - shift, 0)] for i in range(10)
    ]  # fmt: skip
    return {
        "subject": subject,
        "cluster": cluster,
        "metadata": dict(metadata or {}),
        "metrics": metrics,
        "swaps": dict(swapped or {}),
        "reliability": {label: bins for label in dice if bins},
    }


def swaps(
    dice: Any,
    labels: Sequence[str],
    metadata: Mapping[str, Any],
    keys: Mapping[str, Sequence[Any]],
    wrong: Mapping[str, float],
) -> dict[str, Any]:
    """Dice under every value of the keys in ``wrong``, and under none."""
    found: dict[str, Any] = {}
    for key, cost in wrong.items():
        lost = {str(v): 0.0 if v == metadata[key] else cost for v in keys[key]} | {
            "unknown": cost / 2
        }
        found[key] = {
            v: {label: float(d - x) for label, d in zip(labels, dice, strict=True)}
            for v, x in lost.items()
        }
    return found
