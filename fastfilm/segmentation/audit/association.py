"""Measures of association between two variables, with an interval and a p-value.

category and category    Cramer's V, corrected for bias (Bergsma 2013, "A bias-correction for Cramér's V and
                         Tschuprow's T", J. Korean Stat. Soc. 42, equation 4): 0 without association, 1 where one
                         determines the other
category and number      correlation ratio eta: root of the share of the variance that is between the categories
number and number        Spearman's rank correlation
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .prediction import PERMUTATIONS, RESAMPLES, permutation_p

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Associated:
    """An association between two variables.

    Attributes:
        measure: Cramer's V, eta or Spearman.
        value: value of the measure.
        low, high: its 95 % bootstrap interval over subjects.
        chance: its expected value without association.
        p: p-value by permutation of subjects.
        n: number of subjects.
    """

    measure: str
    value: float
    low: float
    high: float
    chance: float
    p: float
    n: int


def associate(
    x: Array,
    y: Array,
    categorical: tuple[bool, bool],
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> Associated:
    """The association of ``x`` and ``y`` [n].

    Args:
        x, y: values without NaN; categories are numbers 0, 1, ….
        categorical: whether ``x`` and ``y`` are categories.
        seed: seed of bootstrap and permutations.
        permutations: number of permutations at most.

    Raises:
        ValueError: one of them is constant.
    """
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        raise ValueError("x and y must have two values or more")
    if categorical == (False, True):
        x, y = y, x
    measure: Callable[[Array, Array], Array]
    chance = 0.0
    if all(categorical):
        name, measure = "Cramer's V", cramers_v
    elif any(categorical):
        name, measure = "eta", eta
        # by chance (F = 1), (k - 1) / (n - 1) of the variance is between k categories
        chance = float(np.sqrt((len(np.unique(x)) - 1) / (len(x) - 1)))
    else:
        name, measure = "Spearman", spearman
    value = float(measure(x[:, None], y[:, None])[0])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(x), size=(len(x), RESAMPLES))
    low, high = np.nanpercentile(measure(x[drawn], y[drawn]), (2.5, 97.5))
    # permutations keep the margins, for which V is a function of chi-square, but cut off at 0
    tested = chi_square if all(categorical) else measure

    def statistic(shuffled: Array) -> Array:
        return np.abs(tested(np.broadcast_to(x[:, None], shuffled.shape), shuffled))

    p = permutation_p(float(statistic(y[:, None])[0]), y, statistic, rng, permutations)
    return Associated(name, value, float(low), float(high), chance, p, len(x))


def _tables(x: Array, y: Array) -> Array:
    """Contingency tables [B, r, c] of the columns of [n, B]."""
    rows, columns = np.unique(x), np.unique(y)
    size = len(rows) * len(columns)
    cell = np.searchsorted(rows, x) * len(columns) + np.searchsorted(columns, y)
    cell = cell + np.arange(x.shape[1]) * size
    counts = np.bincount(cell.ravel(), minlength=x.shape[1] * size)
    return counts.reshape(-1, len(rows), len(columns)).astype(float)


def chi_square(x: Array, y: Array) -> Array:
    """Pearson's chi-square statistic divided by n, for each column of [n, B]: [B]."""
    table = _tables(x, y)
    expected = table.sum(2, keepdims=True) * table.sum(1, keepdims=True) / len(x)
    parts = np.divide((table - expected) ** 2, expected, where=expected > 0, out=0 * table)
    return np.asarray(parts.sum((1, 2)) / len(x))


def cramers_v(x: Array, y: Array) -> Array:
    """Bias-corrected Cramér's V of each column of [n, B]: [B], NaN for constant columns."""
    n, table = len(x), _tables(x, y)
    # values that occur in a resample
    r, c = (table.sum(2) > 0).sum(1), (table.sum(1) > 0).sum(1)
    phi = np.maximum(0, chi_square(x, y) - (r - 1) * (c - 1) / (n - 1))
    least = np.minimum(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(least > 0, np.sqrt(phi / least), np.nan))


def eta(x: Array, y: Array) -> Array:
    """Correlation ratio of the numbers ``y`` by the categories ``x``, for each column of [n, B]: [B]."""
    centred = y - y.mean(0)
    between = np.zeros(y.shape[1])
    for v in np.unique(x):
        of = x == v
        between += (centred * of).sum(0) ** 2 / np.maximum(of.sum(0), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.sqrt(between / (centred**2).sum(0)))


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation of each column of [n, B]: [B]."""
    a, b = (stats.rankdata(v, axis=0) for v in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((a * b).sum(0) / np.sqrt((a**2).sum(0) * (b**2).sum(0)))
