"""A trial in one paragraph that can be pasted into a paper, with all its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import fastfilm

from ..reports.layout import number
from .scores import CONDITIONED, SHUFFLED, UNCONDITIONED
from .verdict import ends, p_text, signed

MEANING = {
    CONDITIONED: "with metadata, as configured",
    UNCONDITIONED: "the same network without metadata",
    SHUFFLED: "trained with the metadata of other cases",
    "channels": "metadata as constant image channels",
    "encoder": "FiLM in the encoder alone",
    "nnunet": "nnU-Net's own plan and trainer",
    "nnunet_conditioned": "nnU-Net with FiLM on the metadata",
}
"""What each arm is."""


def methods(results: Mapping[str, Any]) -> str:
    """Design, statistics and main numbers of ``results`` (of ``results.collect``)."""
    sentences = [*_design(results), *_statistics(results), *_numbers(results)]
    return " ".join([*sentences, f"Computed with fastfilm {fastfilm.__version__}."])


def _design(results: Mapping[str, Any]) -> list[str]:
    design, counts = results["design"], results["counts"]
    arms = ", ".join(f"{arm} ({MEANING[arm]})" if arm in MEANING else arm for arm in design["arms"])
    folds, seeds = counted(design["folds"], "fold"), counted(len(design["seeds"]), "random seed")
    left_out = counts["cases"] - counts["compared"]
    without = f" ({left_out} of them without a label that counts)" if left_out else ""
    return [
        f"Whether metadata ({', '.join(design['keys'])}) improve the segmentation of"
        f" {', '.join(design['labels'])} was tested on {counted(counts['cases'], 'case')}{without} of"
        f" {counted(counts['subjects'], 'subject')}.",
        f"With {folds} and {seeds}, one network was trained for each fold, each seed and each of the arms"
        f" {arms}: {counts['networks']} networks of {steps(counts['steps'])} steps.",
        f"Design and endpoint were fixed before training (SHA-256 {design['sha256'][:16]}). The primary"
        f" comparison is conditioned minus unconditioned; the endpoint: {design['endpoint']}. The smallest"
        f" difference worth having was set to {design['margin']:g}.",
    ]


def _statistics(results: Mapping[str, Any]) -> list[str]:
    design, p = results["design"], results["primary"]
    clustered = p["clusters"] is not None
    unit = f"cluster ({design['cluster']}, n = {p['clusters']})" if clustered else "subject"
    text = f"The standard error of the mean difference is clustered by {unit}"
    if p["training_known"]:
        text += " and by training run (Cameron, Gelbach and Miller 2011)"
    if p["degrees"]:
        text += f"; the 95 % confidence interval is Student's t with {p['degrees']:.1f} degrees of freedom"
        text += " (Satterthwaite 1946)"
    return [
        f"{text}.",
        "p is two-sided: the largest of this t test and of two sign-flip permutation tests, of whole training"
        f" runs and of whole {'clusters' if clustered else 'subjects'}.",
    ]


def _numbers(results: Mapping[str, Any]) -> list[str]:
    p, arms = results["primary"], results["arms"]
    with_, without = (number(arms[arm]["mean"], 3) for arm in (CONDITIONED, UNCONDITIONED))
    bootstrap = ends({"low": p["bootstrap_low"], "high": p["bootstrap_high"]})
    sentences = [
        f"Mean Dice was {with_} with and {without} without metadata: difference {signed(p['mean'])}, 95 % CI"
        f" {ends(p)}, p {p_text(p['p'])} (hierarchical bootstrap {bootstrap}; standard deviation between subjects"
        f" {number(p['spread_subjects'], 3)}, between training runs {number(p['spread_runs'], 3)}).",
    ]
    for arm, row in results["against"].items():
        sentences.append(
            f"Against {arm} (mean {number(arms[arm]['mean'], 3)}) the difference was {signed(row['mean'])}, 95"
            f" % CI {ends(row)}, p {p_text(row['p_holm'])} (Holm)."
        )
    for name, row in results["pairs"].items():
        sentences.append(
            f"The difference {name} was {signed(row['mean'])}, 95 % CI {ends(row)}, p {p_text(row['p_holm'])}"
            " (Holm)."
        )
    if not p["training_known"]:
        sentences.append("With one seed the intervals hold for these networks alone.")
    return sentences


def steps(found: Sequence[int]) -> str:
    """Of training, from the lowest to the highest number."""
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def counted(n: int, what: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
