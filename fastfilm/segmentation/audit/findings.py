"""The findings of an audit, and the thresholds that decide their levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..evaluation.statistics import holm

Level = Literal["fine", "look", "warning"]

ALPHA = 0.05
"""Corrected p-value below which an association counts as real."""

LEAK = {"AUC": 0.95, "R2": 0.7}
"""Values from which metadata are said to code a label. R2: the tertile of a normal variable explains 0.79 of its
variance; in the phantoms of ``fastfilm demo``, where the target depends on the tumour type alone, the type
explains 0.6 of its volume. AUC: 0.95 is that of two normal distributions 2.3 deviations apart."""

LEAK_P = 0.01
"""Uncorrected p-value below which metadata code a label. Values as in ``LEAK`` are so far from chance that a
correction would only hide them in small data sets with many keys."""

INSEPARABLE = 0.8
"""Association of two keys from which their effects cannot be told apart: 1 - 0.8^2 = 0.36 of the variance is not
shared."""

FEWEST = 10
"""Subjects needed to look for associations: with fewer, a held-out fifth would be a single subject."""

CLASS = 5
"""Subjects that a class or a value needs: one for each part of the cross-validation."""


@dataclass(frozen=True)
class Finding:
    """A result of the audit.

    Attributes:
        kind: label, intensity, geometry, confounding, annotation, fold, missing, rare, one site, constant or
            identifier.
        about: the variables, such as "tumor_type -> volume of lesion".
        measure: AUC, R2, balanced accuracy, Cramer's V, eta, Spearman, subjects or values.
        value: value of the measure.
        low, high: its 95 % bootstrap interval over subjects; None without one.
        chance: its expected value without any association.
        n: number of subjects.
        p: p-value by permutation of subjects; None without a test.
        p_corrected: the p-value after Holm's correction over all tests of the audit.
        level: fine, look or warning.
        text: a sentence with the numbers.
        advice: a sentence on what to do.
    """

    kind: str
    about: str
    measure: str
    value: float
    low: float | None
    high: float | None
    chance: float
    n: int
    p: float | None = None
    p_corrected: float | None = None
    level: Level = "fine"
    text: str = ""
    advice: str = ""


def corrected(findings: Sequence[Finding]) -> list[Finding]:
    """The findings with ``p_corrected``, for those with a p-value."""
    every = holm([f.p for f in findings])
    return [replace(f, p_corrected=p) for f, p in zip(findings, every, strict=True)]


def is_leak(finding: Finding) -> bool:
    """Whether the metadata code the label, by ``LEAK`` and ``LEAK_P``."""
    high = finding.value >= LEAK[finding.measure]
    return high and finding.p is not None and finding.p < LEAK_P


def is_real(finding: Finding) -> bool:
    """Whether the association is more than chance, by ``ALPHA``."""
    return finding.p_corrected is not None and finding.p_corrected < ALPHA


def is_inseparable(finding: Finding) -> bool:
    """Whether the effects of two keys cannot be told apart, by ``INSEPARABLE``."""
    return is_real(finding) and abs(finding.value) >= INSEPARABLE


ORDER: dict[str, int] = {"warning": 0, "look": 1, "fine": 2}
"""The worst first."""


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """The findings sorted by level, then by p-value, then by distance from chance."""
    return sorted(
        findings,
        key=lambda f: (ORDER[f.level], 1.0 if f.p is None else f.p, -abs(f.value - f.chance)),
    )
