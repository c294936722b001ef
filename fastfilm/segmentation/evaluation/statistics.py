"""Means with bootstrap intervals, the comparison of two runs on the same cases, and corrected p-values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000


@dataclass(frozen=True)
class Mean:
    """A mean and how sure it is.

    Attributes:
        mean, std: over the values; None without values.
        low, high: 95 % interval of the mean over subjects; None for fewer than two subjects.
        n, subjects: number of values, and of the subjects that they come from.
    """

    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    n: int
    subjects: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def bootstrap_means(
    values: NDArray[np.float64], subjects: Sequence[str], seed: int = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Means [resamples] over subjects drawn with replacement, each with all its cases."""
    names = {s: i for i, s in enumerate(dict.fromkeys(subjects))}
    index = np.array([names[s] for s in subjects])
    sums = np.bincount(index, values, len(names))
    counts = np.bincount(index, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    return np.asarray(sums[drawn].sum(1) / counts[drawn].sum(1))


def mean_of(values: Sequence[float | None], subjects: Sequence[str], seed: int = 0) -> Mean:
    """The mean over what is defined, with its percentile bootstrap interval over subjects."""
    pairs = [(v, s) for v, s in zip(values, subjects, strict=True) if v is not None]
    if not pairs:
        return Mean(None, None, None, None, 0, 0)
    x, whose = np.array([v for v, _ in pairs], float), [s for _, s in pairs]
    low, high = _interval(x, whose, seed)
    return Mean(float(x.mean()), float(x.std()), low, high, len(x), len(set(whose)))


def _interval(
    values: NDArray[np.float64], subjects: Sequence[str], seed: int
) -> tuple[float | None, float | None]:
    """95 % interval of the mean; (None, None) for one subject, whose resamples are all the same."""
    if len(set(subjects)) < 2:
        return None, None
    low, high = np.percentile(bootstrap_means(values, subjects, seed), (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Run A against run B on the cases that both have.

    Attributes:
        n, subjects: number of pairs, and of the subjects that they come from.
        mean_a, mean_b: means.
        difference: mean of A - B.
        low, high: its 95 % paired bootstrap interval over subjects; None for fewer than two subjects.
        p_greater, p_less, p_two_sided: Wilcoxon's signed-rank test over pairs of A > B, A < B, A != B; None for
            fewer than two pairs.
        effect: matched-pairs rank-biserial correlation: 1 if every case is higher in A, -1 if in B.
    """

    n: int
    subjects: int
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    p_greater: float | None
    p_less: float | None
    p_two_sided: float | None
    effect: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def compare(
    a: Sequence[float | None], b: Sequence[float | None], subjects: Sequence[str], seed: int = 0
) -> Comparison | None:
    """Paired comparison; pairs in which a value is not defined are left out. None without pairs.

    The rank-biserial correlation is that of Kerby (2014), "The simple difference formula": the share of the rank
    sum of |a - b| that speaks for A minus the share that speaks for B; pairs without a difference are left out, as
    they are by Wilcoxon's test.
    """
    rows = [
        (x, y, s) for x, y, s in zip(a, b, subjects, strict=True) if x is not None and y is not None
    ]
    if not rows:
        return None
    x, y = (np.array([r[i] for r in rows], float) for i in (0, 1))
    d, whose = x - y, [r[2] for r in rows]
    low, high = _interval(d, whose, seed)
    moved = d[d != 0]
    effect, sides = 0.0, ("greater", "less", "two-sided")
    p: dict[str, float | None] = dict.fromkeys(sides, 1.0)
    if moved.size:
        ranks = stats.rankdata(np.abs(moved))
        effect = float((ranks[moved > 0].sum() - ranks[moved < 0].sum()) / ranks.sum())
        p = {k: float(stats.wilcoxon(moved, alternative=k).pvalue) for k in sides}
    if len(rows) < 2:
        p = dict.fromkeys(sides)
    return Comparison(
        n=len(rows),
        subjects=len(set(whose)),
        mean_a=float(x.mean()),
        mean_b=float(y.mean()),
        difference=float(d.mean()),
        low=low,
        high=high,
        p_greater=p["greater"],
        p_less=p["less"],
        p_two_sided=p["two-sided"],
        effect=effect,
    )


def holm(p: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number, in the same order; None stays None and does not count.

    Holm (1979), "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6.
    """
    given = sorted((v, i) for i, v in enumerate(p) if v is not None)
    corrected: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(given):
        largest = max(largest, min(1.0, (len(given) - rank) * value))
        corrected[i] = largest
    return corrected
