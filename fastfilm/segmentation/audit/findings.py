"""A finding, its level, and the thresholds that decide it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..evaluation.statistics import holm

Level = Literal["fine", "look", "warning"]

ALPHA = 0.05
"""Corrected p below which an association is more than chance."""

LEAK = {"AUC": 0.95, "R2": 0.7}
"""From here on metadata code a label. R2: the tertile of a normal variable explains 0.79 of its variance; in the
phantoms of ``fastfilm demo``, where the tumour type alone decides which parts are the target, the type explains
0.6 of its volume. AUC: two normal distributions 2.3 deviations apart."""

LEAK_P = 0.01
"""Uncorrected p of a leak. Values as in ``LEAK`` are so far from chance that a correction would only hide them in
small data sets with many keys."""

INSEPARABLE = 0.8
"""Association of two keys from which on their effects cannot be told apart: 1 - 0.8^2 = 0.36 of a variance is left
to tell them by."""

FEWEST = 10
"""Subjects below which no association is looked for: a fifth that is held out would be one subject."""

CLASS = 5
"""Subjects that a class, or a value, needs: one for each part of the cross-validation."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        kind: label, intensity, geometry, confounding, annotation, fold, missing, rare, one site, constant,
            identifier.
        about: such as "tumor_type -> volume of lesion".
        measure: AUC, R2, balanced accuracy, Cramer's V, eta, Spearman, subjects, values.
        value: of the measure.
        low, high: its 95 % bootstrap interval over subjects; None where it has none.
        chance: the measure without any association.
        n: subjects.
        p: by permutation of subjects; None where nothing was tested.
        p_corrected: after Holm's correction over all tests of the audit.
        level: of attention.
        text: one sentence with the numbers.
        advice: one sentence.
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def corrected(findings: Sequence[Finding]) -> list[Finding]:
    """With ``p_corrected`` where there is a p."""
    every = holm([f.p for f in findings])
    return [replace(f, p_corrected=p) for f, p in zip(findings, every, strict=True)]


def is_leak(finding: Finding) -> bool:
    """Whether metadata code the label."""
    high = finding.value >= LEAK[finding.measure]
    return high and finding.p is not None and finding.p < LEAK_P


def is_real(finding: Finding) -> bool:
    """Whether the association is more than chance."""
    return finding.p_corrected is not None and finding.p_corrected < ALPHA


def is_inseparable(finding: Finding) -> bool:
    """Whether two keys say nearly the same."""
    return is_real(finding) and abs(finding.value) >= INSEPARABLE


ORDER: dict[str, int] = {"warning": 0, "look": 1, "fine": 2}
"""The worst first."""


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """By level, then by how far the value is from chance, p for p."""
    return sorted(
        findings,
        key=lambda f: (ORDER[f.level], 1.0 if f.p is None else f.p, -abs(f.value - f.chance)),
    )
