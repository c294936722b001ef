"""Statistics of the difference between two arms: its size, its uncertainty, and the data needed for an answer.

D[c, s] is the Dice of held-out case c in one arm minus that in the other, with the networks of seed s of the
fold that holds c out. A fold and a seed make one pair of networks. The estimand is the expected difference for a
new case when the networks are trained again: with new subjects and new training runs, both kinds of noise count.

**Model.** D[c, s] = effect + subject + run[fold, s] + rest[c, s]. All cases of a fold share the noise of its
training runs, and all cases of a subject share the subject's. A unit is a subject, or, if clusters are given, a
cluster of subjects such as a site. The variance of the mean over cases and seeds has three estimates:

- V_units: from the units' sums of residuals (cluster-robust; Liang and Zeger 1986);
- V_runs: from the variance of a fold's mean between its seeds, pooled over folds;
- V_both: from the sums of a unit in one run, the part that the first two have in common.

The standard error is sqrt(V_units + V_runs - V_both), as for errors that are clustered in two ways (Cameron,
Gelbach and Miller 2011), and not below the larger of the first two.

**Interval and first test.** Student's t with that standard error and Satterthwaite's (1946) degrees of freedom.

**Permutation tests.** If metadata change nothing, the two arms of a pair of networks are exchangeable given the
data, so that the sign of all differences of one training run may be flipped: exact for "the two recipes give
the same distribution of networks", with any distribution of noise, but a statement on these cases alone. For a
subject drawn at random, "as likely better as worse by any amount" lets the sign of all differences of that
subject (or cluster) be flipped: exact for these networks, a statement on new subjects. If both kinds of noise
are present, the run test mistakes a common property of these cases for an effect, and the subject test a common
property of these networks; the larger of their two p-values still rejects a true null hypothesis too often
(benchmarks/paper/trial_statistics.py: in up to 9 of 100 trials at the 5 % level). The p-value is therefore the
largest of three: t, runs, subjects. It is valid if any of them is, and the flips protect against differences
that do not follow a t distribution. Flips of n units reach 2 / 2^n at the lowest: 0.004 for 9 pairs of networks,
0.00006 for 15; below 6 pairs, or 6 units, no result is significant at 5 % (``MINIMUM``).

**Bootstrap.** A second interval is the percentile interval of the hierarchical bootstrap: whole units are drawn
with replacement (Davison and Hinkley 1997, section 3.8: drawing again inside would count the inner variance
twice), and the seeds of each fold. Drawing n of n understates a variance by 1 / n, a third for three seeds; n - 1
are drawn and weighted n / (n - 1) instead (Rao and Wu 1988). In the simulation this interval covers less than t
with few networks, and more if noise depends on case and run together, which it counts twice (Owen 2007).

None of these includes the variation between sets of training subjects, which no method can estimate from one set
of folds (Bengio and Grandvalet 2004).
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

RESAMPLES = 2000
"""Resamples of the bootstrap."""

EXACT = 16
"""Number of units up to which all flips of signs are enumerated."""

FLIPS = 9999
"""Random flips for more units."""

MINIMUM = 6
"""Units that a flip test needs to reach 5 %: 2 / 2^6 = 0.03, 2 / 2^5 = 0.06."""

POWER = 0.8

MOST = 10**6
"""Units and seeds that ``needed`` considers at most."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """The difference between two arms on the same cases.

    Attributes:
        mean: mean over cases and seeds.
        low, high: 95 % interval by Student's t; None for fewer than two units.
        bootstrap_low, bootstrap_high: 95 % percentile interval of the hierarchical bootstrap; None likewise.
        p: two-sided p-value, the largest of ``p_t``, ``p_runs`` and ``p_units``; None without ``p_t``.
        p_t, p_runs, p_units: p-values by t, by flips of training runs, by flips of subjects or clusters.
        p_smallest: smallest p-value that the flip tests can reach.
        cases, subjects, folds, seeds, networks: their numbers; a network is a pair, one of each arm.
        clusters: number of clusters; None if subjects are the units.
        spread_subjects: standard deviation of the subjects' means; None for one subject.
        spread_runs: standard deviation of a fold's mean between training runs; None for one seed.
        standard_error: standard error of the mean; None for fewer than two units.
        error_units, error_runs, error_both: square roots of V_units, V_runs and V_both.
        degrees, degrees_units, degrees_runs: degrees of freedom of the variance, of V_units and of V_runs.
        training_known: whether there are several seeds; with one, the interval holds for these networks only.
        higher, lower: shares of the cases with a mean difference above and below 0.
    """

    mean: float
    low: float | None
    high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None
    p: float | None
    p_t: float | None
    p_runs: float
    p_units: float
    p_smallest: float
    cases: int
    subjects: int
    clusters: int | None
    folds: int
    seeds: int
    networks: int
    spread_subjects: float | None
    spread_runs: float | None
    standard_error: float | None
    error_units: float | None
    error_runs: float | None
    error_both: float | None
    degrees: float | None
    degrees_units: float
    degrees_runs: float
    training_known: bool
    higher: float
    lower: float

    @property
    def units(self) -> int:
        """Number of clusters, or of subjects without clusters."""
        return self.subjects if self.clusters is None else self.clusters

    @property
    def superior(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low is not None and self.low > 0

    def excludes(self, margin: float) -> bool:
        """Whether the interval lies below ``margin``, the smallest difference worth having."""
        return self.high is not None and self.high < margin


def difference(
    values: Array,
    folds: Sequence[int],
    subjects: Sequence[str],
    clusters: Sequence[str | None] | None = None,
    seed: int = 0,
) -> Difference:
    """The mean of paired differences with its interval and p-value, by the methods in this module's docstring.

    Args:
        values: D, [cases, seeds], finite.
        folds: fold that holds each case out, [cases].
        subjects: subject of each case, [cases].
        clusters: cluster of each case, such as its site, [cases]; None, or an entry None: the subject is a cluster
            of its own. Clusters with a common subject count as one.
        seed: seed of bootstrap and random flips.

    Raises:
        ValueError: there are no cases or seeds, values are not finite, or lengths differ.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values must be finite, [cases, seeds], got shape {values.shape}")
    n, seeds = values.shape
    for name, given in (("folds", folds), ("subjects", subjects), ("clusters", clusters)):
        if given is not None and len(given) != n:
            raise ValueError(f"{name} must have {n} entries, one a case, got {len(given)}")
    subject, fold = _index(subjects), _index(folds)
    unit = subject if clusters is None else _units(subject, clusters)
    every = values.mean(1)
    mean = float(every.mean())
    # sums over a unit in a run, as shares of the mean
    shares = np.zeros((unit.max() + 1, fold.max() + 1, seeds))
    np.add.at(shares, (unit, fold), values / values.size)
    within = np.zeros_like(shares)
    np.add.at(within, (unit, fold), (values - every[:, None]) / values.size)
    of_units, of_runs = shares.sum((1, 2)), shares.sum(0)
    share = np.bincount(unit) / n
    weight = np.bincount(fold) / n
    v_units, df_units = _units_variance(of_units - share * mean, share)
    v_runs, spread_runs, df_runs = _runs_variance(of_runs, weight)
    v_both = None if seeds == 1 else float((within**2).sum() * seeds / (seeds - 1))
    # variances within rounding errors count as 0
    least = (1e-12 * float(np.abs(values).max())) ** 2
    v_units, v_runs, v_both = (
        v if v is None or v > least else 0.0 for v in (v_units, v_runs, v_both)
    )
    variance, df = _combined(v_units, v_runs or 0.0, v_both or 0.0, df_units, df_runs)
    low, high, p_t = _student(mean, variance, df)
    rng = np.random.default_rng(seed)
    p_runs, p_units = (_flips(x, rng) for x in (of_runs.ravel(), of_units))
    bootstrap = _bootstrap(shares, share, rng) if len(share) > 1 else (None, None)
    means = np.bincount(subject, every) / np.bincount(subject)
    return Difference(
        mean=mean,
        low=low,
        high=high,
        bootstrap_low=bootstrap[0],
        bootstrap_high=bootstrap[1],
        p=None if p_t is None else max(p_t, p_runs, p_units),
        p_t=p_t,
        p_runs=p_runs,
        p_units=p_units,
        p_smallest=max(_smallest(of_runs.size), _smallest(len(share))),
        cases=n,
        subjects=len(means),
        clusters=None if clusters is None else len(share),
        folds=len(weight),
        seeds=seeds,
        networks=of_runs.size,
        spread_subjects=float(means.std(ddof=1)) if len(means) > 1 else None,
        spread_runs=spread_runs,
        standard_error=None if variance is None else math.sqrt(variance),
        error_units=None if v_units is None else math.sqrt(v_units),
        error_runs=None if v_runs is None else math.sqrt(v_runs),
        error_both=None if v_both is None else math.sqrt(v_both),
        degrees=df,
        degrees_units=df_units,
        degrees_runs=df_runs,
        training_known=seeds > 1,
        higher=float((every > 0).mean()),
        lower=float((every < 0).mean()),
    )


@dataclass(frozen=True)
class Needed:
    """The further data with which the interval would give an answer with 80 % power, if the effect found is true.

    Attributes:
        target: "zero": the interval would lie above 0 (the mean is at least the margin); "margin": below the
            margin.
        subjects: number of further subjects with the same seeds (in proportionally more clusters); None: no number
            suffices.
        seeds: number of further seeds for each fold with the same subjects; None: no number suffices.
    """

    target: Literal["zero", "margin"]
    subjects: int | None
    seeds: int | None


def needed(found: Difference, margin: float) -> Needed:
    """The further subjects, or seeds, that would give an answer.

    More subjects reduce V_units and V_both, and more seeds V_runs and V_both. The distance to the target must be
    (t_0.975 + t_0.8) standard errors, with the degrees of freedom of the larger trial.

    Args:
        found: the difference in the present trial.
        margin: smallest difference worth having.
    """
    target: Literal["zero", "margin"] = "zero" if found.mean >= margin else "margin"
    distance = found.mean if target == "zero" else margin - found.mean
    if found.error_units is None or found.error_runs is None or found.error_both is None:
        return Needed(target, None, None)
    v_units, v_runs, v_both = (
        e**2 for e in (found.error_units, found.error_runs, found.error_both)
    )
    units, seeds = found.units, found.seeds
    per_unit = found.subjects / units

    def with_units(n: int) -> bool:
        k = n / units
        df_units = (found.degrees_units + 1) * k - 1
        return _decides(distance, v_units / k, v_runs, v_both / k, df_units, found.degrees_runs)

    def with_seeds(n: int) -> bool:
        k = n / seeds
        df_runs = found.folds * (n - 1)
        return _decides(distance, v_units, v_runs / k, v_both / k, found.degrees_units, df_runs)

    # with too few units the flip tests cannot reach 5 %
    enough_networks = target == "margin" or found.networks >= MINIMUM
    enough_units = target == "margin" or units >= MINIMUM
    least_units = units if target == "margin" else max(units, MINIMUM)
    least_seeds = seeds if target == "margin" else max(seeds, -(-MINIMUM // found.folds))
    more_units = _first(with_units, least_units) if enough_networks else None
    all_seeds = _first(with_seeds, least_seeds) if enough_units else None
    return Needed(
        target,
        None if more_units is None else math.ceil((more_units - units) * per_unit),
        None if all_seeds is None else all_seeds - seeds,
    )


def _decides(
    distance: float, v_units: float, v_runs: float, v_both: float, df_units: float, df_runs: float
) -> bool:
    variance, df = _combined(v_units, v_runs, v_both, df_units, df_runs)
    if not variance or df is None:
        return True
    reach = stats.t.ppf(0.975, df) + stats.t.ppf(POWER, df)
    return bool(distance >= reach * math.sqrt(variance))


def _first(enough: Callable[[int], bool], least: int) -> int | None:
    """The smallest sufficient number from ``least`` on; None if ``MOST`` does not suffice."""
    numbers = range(least, MOST + 1)
    at = bisect_left(numbers, True, key=enough)
    return None if at == len(numbers) else numbers[at]


def _index(names: Sequence[Any]) -> NDArray[np.intp]:
    """A number for each name: its position among the sorted names, whatever the order of the cases."""
    return np.unique(np.asarray(names), return_inverse=True)[1].reshape(-1)


def _units(subject: NDArray[np.intp], clusters: Sequence[str | None]) -> NDArray[np.intp]:
    """A number for each case's cluster; those with a common subject are one, a subject without one is its own."""
    given = {name: i for i, name in enumerate(sorted({c for c in clusters if c is not None}))}
    n = int(subject.max()) + 1
    edges = [(s, n + given[c]) for s, c in zip(subject, clusters, strict=True) if c is not None]
    rows, columns = zip(*edges, strict=True) if edges else ((), ())
    size = n + len(given)
    graph = sparse.coo_array((np.ones(len(edges)), (rows, columns)), shape=(size, size))
    found = sparse.csgraph.connected_components(graph, directed=False)[1]
    return _index(found[subject])


def _units_variance(residuals: Array, share: Array) -> tuple[float | None, float]:
    """V_units and its degrees of freedom; None for one unit.

    The divisor makes the estimate unbiased for perfectly correlated cases of a unit and units of any size; it is
    (n - 1) / n for equal ones. The degrees of freedom are those of the effective number of equal units, 1 / Σ
    share² (Carter, Schnepel and Steigerwald 2017).
    """
    if len(share) < 2:
        return None, 0.0
    squares = float((share**2).sum())
    divisor = 1 - 2 * float((share**3).sum()) / squares + squares
    return float((residuals**2).sum()) / divisor, 1 / squares - 1


def _runs_variance(of_runs: Array, weight: Array) -> tuple[float | None, float | None, float]:
    """V_runs, the standard deviation of a fold's mean between runs, degrees of freedom; None for one seed.

    Args:
        of_runs: shares of the mean, [folds, seeds].
        weight: share of the cases that each fold holds out, [folds].
    """
    folds, seeds = of_runs.shape
    if seeds < 2:
        return None, None, 0.0
    means = of_runs * seeds / weight[:, None]
    pooled = float(means.var(1, ddof=1).mean())
    return pooled * float((weight**2).sum()) / seeds, math.sqrt(pooled), folds * (seeds - 1.0)


def _combined(
    v_units: float | None, v_runs: float, v_both: float, df_units: float, df_runs: float
) -> tuple[float | None, float | None]:
    """Variance and Satterthwaite's degrees of freedom; None for one unit, and no degrees without variance."""
    if v_units is None:
        return None, None
    variance = max(v_units + v_runs - v_both, v_units, v_runs)
    parts = v_units**2 / df_units + (v_runs**2 / df_runs if v_runs else 0.0)
    return variance, variance**2 / parts if parts else None


def _student(
    mean: float, variance: float | None, df: float | None
) -> tuple[float | None, float | None, float | None]:
    """The 95 % interval and the two-sided p-value by Student's t; None without a variance."""
    if variance is None:
        return None, None, None
    if df is None:
        # all cases and runs have the same difference
        return mean, mean, float(mean == 0)
    error = math.sqrt(variance)
    reach = float(stats.t.ppf(0.975, df)) * error
    return mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, df))


def _smallest(n: int) -> float:
    return 2.0 ** (1 - n) if n <= EXACT else 1 / (FLIPS + 1)


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> Array:
    """All signs of ``n`` units with +1 for the first (the others are mirror images), [2^(n - 1), n]."""
    rows = [(1, *rest) for rest in itertools.product((1, -1), repeat=n - 1)]
    return np.array(rows, np.float64)


def _flips(shares: Array, rng: np.random.Generator) -> float:
    """The p-value by flips of signs: the share of flips with a sum as far from 0 as the one found, counting it.

    Args:
        shares: shares of the mean, [units].
    """
    n = len(shares)
    # sums within rounding errors count as equal
    found = abs(shares.sum()) * (1 - 1e-9) - 1e-15
    if n <= EXACT:
        return float((np.abs(_signs(n) @ shares) >= found).mean())
    signs = rng.integers(0, 2, (FLIPS, n), dtype=np.int8) * 2.0 - 1
    return (int((np.abs(signs @ shares) >= found).sum()) + 1) / (FLIPS + 1)


def _drawn(n: int, size: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Random weights [*size, n] by Rao and Wu: n - 1 of n are drawn and weighted n / (n - 1); 1 for n = 1."""
    if n == 1:
        return np.ones((*size, 1))
    drawn = rng.multinomial(n - 1, np.full(n, 1 / n), size)
    return drawn * np.float64(n / (n - 1))


def _bootstrap(shares: Array, share: Array, rng: np.random.Generator) -> tuple[float, float]:
    """The 95 % percentile interval of the mean by the hierarchical bootstrap.

    Args:
        shares: shares of the mean by unit and run, [units, folds, seeds].
        share: share of the cases in each unit, [units].
    """
    units, folds, seeds = shares.shape
    drawn_units = _drawn(units, (RESAMPLES,), rng)
    drawn_seeds = _drawn(seeds, (RESAMPLES, folds), rng)
    by_run = (drawn_units @ shares.reshape(units, -1)).reshape(RESAMPLES, folds, seeds)
    # a ratio, as units differ in their numbers of cases
    means = (by_run * drawn_seeds).sum((1, 2)) / (drawn_units @ share)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
