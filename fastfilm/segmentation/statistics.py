"""Means with bootstrap intervals, and the comparison of two runs on the same cases."""

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
    """Mean, standard deviation over cases, 95 % interval of the mean, number of values; None without values."""

    mean: float | None
    std: float | None
    low: float | None
    high: float | None
    n: int

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
    """The mean over what is defined, with its percentile bootstrap interval."""
    pairs = [(v, s) for v, s in zip(values, subjects, strict=True) if v is not None]
    if not pairs:
        return Mean(None, None, None, None, 0)
    x = np.array([v for v, _ in pairs], float)
    means = bootstrap_means(x, [s for _, s in pairs], seed)
    low, high = np.percentile(means, (2.5, 97.5))
    return Mean(float(x.mean()), float(x.std()), float(low), float(high), len(x))


@dataclass(frozen=True)
class Comparison:
    """Run A against run B on the cases that both have.

    Attributes:
        n: pairs.
        mean_a, mean_b: means.
        difference, low, high: mean of A - B, its 95 % paired bootstrap interval.
        p_greater, p_less, p_two_sided: Wilcoxon's signed-rank test of A > B, A < B, A != B.
        effect: matched-pairs rank-biserial correlation: 1 if every case is higher in A, -1 if in B.
    """

    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_greater: float
    p_less: float
    p_two_sided: float
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
    d = x - y
    means = bootstrap_means(d, [r[2] for r in rows], seed)
    low, high = np.percentile(means, (2.5, 97.5))
    moved = d[d != 0]
    effect, p = 0.0, {"greater": 1.0, "less": 1.0, "two-sided": 1.0}
    if moved.size:
        ranks = stats.rankdata(np.abs(moved))
        effect = float((ranks[moved > 0].sum() - ranks[moved < 0].sum()) / ranks.sum())
        p = {k: float(stats.wilcoxon(moved, alternative=k).pvalue) for k in p}
    return Comparison(
        n=len(rows),
        mean_a=float(x.mean()),
        mean_b=float(y.mean()),
        difference=float(d.mean()),
        low=float(low),
        high=float(high),
        p_greater=p["greater"],
        p_less=p["less"],
        p_two_sided=p["two-sided"],
        effect=effect,
    )
