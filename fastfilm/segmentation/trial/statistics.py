"""The difference between two arms of a trial: how large, how sure, and how much more it would take to be sure.

D[c, s] is the Dice of held-out case c in one arm minus that in the other, with the networks of seed s of the
fold that holds c out. A fold and a seed make one pair of networks. The estimand is the expected difference for a
new case when the networks are trained anew: new subjects and new training runs, so both kinds of noise count.

**Model.** D[c, s] = effect + subject + run[fold, s] + rest[c, s]. All cases of a fold share the noise of its
training runs, and all cases of a subject share the subject's. A unit is a subject, or a cluster of subjects
such as a site where clusters are given. Of the mean over cases and seeds the variance has three estimates:

- V_units: from the units' sums of residuals (cluster-robust; Liang and Zeger 1986);
- V_runs: from the variance of a fold's mean between its seeds, pooled over folds;
- V_both: from the sums of a unit in one run: what the first two both contain.

The standard error is sqrt(V_units + V_runs - V_both), as for errors that are clustered in two ways (Cameron,
Gelbach and Miller 2011), and not below the larger of the first two.

**Interval and first test.** Student's t with that standard error and Satterthwaite's (1946) degrees of freedom.

**Permutation tests.** If metadata change nothing, the two arms of a pair of networks are exchangeable given the
data, so that the sign of all differences of one training run may be flipped: exact for "the two recipes give
the same distribution of networks", with any distribution of noise, but a statement on these cases alone. For a
subject drawn at random, "as likely better as worse by any amount" lets the sign of all differences of that
subject (or cluster) be flipped: exact for these networks, a statement on new subjects. Where both kinds of
noise are there, the run test takes what the cases at hand have in common for an effect, and the subject test
does so with what the networks at hand have; the larger of their two p-values rejects a true null hypothesis too
often as well (benchmarks/paper/trial_statistics.py: in up to 9 of 100 trials at the 5 % level). The p-value is
therefore the largest of three: t, runs, subjects. Being the largest it is valid where any of them is, and the
flips protect against a t distribution that does not hold. Flips of n units reach 2 / 2^n at the lowest: 0.004
for 9 pairs of networks, 0.00006 for 15; below 6 pairs, or 6 units, no result is significant at 5 %
(``MINIMUM``).

**Bootstrap.** Beside it stands the percentile interval of the hierarchical bootstrap: units are drawn with
replacement, each whole (Davison and Hinkley 1997, section 3.8: drawing again inside would count the inner
variance twice), and in each fold its seeds. Drawing n of n understates a variance by (n - 1) / n, a third for
three seeds; n - 1 are drawn and weighted n / (n - 1) instead (Rao and Wu 1988). In the simulation it covers
less than t with few networks and more with noise of case and run together, which it counts twice (Owen 2007).

Not in any of them: networks of other training subjects, as no method tells that from one set of folds (Bengio and
Grandvalet 2004).
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats

RESAMPLES = 2000
"""Of the bootstrap."""

EXACT = 16
"""Units up to which all flips of signs are counted."""

FLIPS = 9999
"""Flips that are drawn where there are more units."""

MINIMUM = 6
"""Units that a flip test needs to reach 5 %: 2 / 2^6 = 0.03, 2 / 2^5 = 0.06."""

POWER = 0.8

MOST = 10**6
"""Units, and seeds, up to which ``needed`` looks."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """One arm minus another on the same cases.

    Attributes:
        mean: over cases and seeds.
        low, high: 95 % interval by Student's t; None for fewer than two units.
        bootstrap_low, bootstrap_high: 95 % percentile interval of the hierarchical bootstrap, likewise.
        p: two-sided, the largest of ``p_t``, ``p_runs`` and ``p_units``; None without ``p_t``.
        p_t, p_runs, p_units: by t, by flips of training runs, by flips of subjects or clusters.
        p_smallest: that the flip tests allow.
        cases, subjects, folds, seeds, networks: numbers; a network is a pair, one of each arm.
        clusters: number of clusters; None where subjects are the units.
        spread_subjects: standard deviation of the subjects' means; None for one subject.
        spread_runs: standard deviation of a fold's mean from one training run to the next; None for one seed.
        standard_error: of the mean; None for fewer than two units.
        error_units, error_runs, error_both: square roots of V_units, V_runs and V_both.
        degrees, degrees_units, degrees_runs: of freedom, of the whole and of its parts.
        training_known: False for one seed: the interval holds for these networks alone.
        higher, lower: shares of the cases whose mean difference is above and below 0.
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

    def not_inferior(self, margin: float) -> bool:
        """Whether the interval lies above ``-margin``."""
        return self.low is not None and self.low > -margin

    def excludes(self, margin: float) -> bool:
        """Whether the interval lies below ``margin``, the smallest difference worth having."""
        return self.high is not None and self.high < margin

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; ``Difference(**value)`` is the inverse."""
        return asdict(self)


def difference(
    values: Array,
    folds: Sequence[int],
    subjects: Sequence[str],
    clusters: Sequence[str | None] | None = None,
    seed: int = 0,
) -> Difference:
    """The mean of paired differences, its interval and its p-value; the module says how.

    Args:
        values: D, [cases, seeds], finite.
        folds: the fold that holds each case out, [cases].
        subjects: of each case, [cases].
        clusters: of each case, such as its site, [cases]; None: a cluster of its own for each subject, as is an
            entry that is None. Clusters that share a subject count as one.
        seed: of bootstrap and drawn flips.

    Raises:
        ValueError: no cases or seeds, values that are not finite, lengths that differ.
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
    # sums of a unit, of a run, and of a unit in a run, each a share of the mean
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
    # residuals of rounding alone are none
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
    """How much more would make the interval decide with 80 % power, if the true effect is the one that was found.

    Attributes:
        target: "zero": the interval shall lie above 0 (the mean is at least the margin); "margin": below the
        margin. subjects: more of them, with as many seeds (in as many more clusters, where there are clusters);
        None: no
            number does.
        seeds: more of them for each fold, with the same subjects; None: no number does.
    """

    target: Literal["zero", "margin"]
    subjects: int | None
    seeds: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; ``Needed(**value)`` is the inverse."""
        return asdict(self)


def needed(found: Difference, margin: float) -> Needed:
    """Subjects more, or seeds more, from the two parts of the variance.

    More subjects shrink V_units, and with it what units and runs have in common; more seeds shrink V_runs
    likewise. The distance to the target must be (t_0.975 + t_0.8) standard errors (t as in the interval that
    would be computed then).

    Args:
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

    # a flip test that cannot reach 5 % decides nothing
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
    """The smallest number from ``least`` on that is enough; None where ``MOST`` is not."""
    numbers = range(least, MOST + 1)
    at = bisect_left(numbers, True, key=enough)
    return None if at == len(numbers) else numbers[at]


def _index(names: Sequence[Any]) -> NDArray[np.intp]:
    """Numbers from 0 on, in the order of the sorted names, so that the order of cases does not matter."""
    return np.unique(np.asarray(names), return_inverse=True)[1].reshape(-1)


def _units(subject: NDArray[np.intp], clusters: Sequence[str | None]) -> NDArray[np.intp]:
    """Numbers of the clusters; those that share a subject are one, and a subject without one is its own."""
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

    The divisor makes it unbiased where cases of a unit go together fully, whatever the units' sizes (n - 1 of n
    for equal ones); the degrees of freedom are those of as many equal units as weigh the same, 1 / Σ share²
    (Carter, Schnepel and Steigerwald 2017).
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
        weight: share of the cases that a fold holds out, [folds].
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
    """95 % interval and two-sided p."""
    if variance is None:
        return None, None, None
    if df is None:
        # every case and run the same: nothing is left to chance
        return mean, mean, float(mean == 0)
    error = math.sqrt(variance)
    reach = float(stats.t.ppf(0.975, df)) * error
    return mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, df))


def _smallest(n: int) -> float:
    return 2.0 ** (1 - n) if n <= EXACT else 1 / (FLIPS + 1)


@functools.lru_cache(maxsize=4)
def _signs(n: int) -> Array:
    """All signs of ``n`` units with the first one +1 (the others are their mirror): [2^(n - 1), n]."""
    rows = [(1, *rest) for rest in itertools.product((1, -1), repeat=n - 1)]
    return np.array(rows, np.float64)


def _flips(shares: Array, rng: np.random.Generator) -> float:
    """Share of the flips of signs with a sum as far from 0 as the one that was found, itself among them.

    Args:
        shares: of the mean, [units].
    """
    n = len(shares)
    # sums that are equal but for rounding are equal
    found = abs(shares.sum()) * (1 - 1e-9) - 1e-15
    if n <= EXACT:
        return float((np.abs(_signs(n) @ shares) >= found).mean())
    signs = rng.integers(0, 2, (FLIPS, n), dtype=np.int8) * 2.0 - 1
    return (int((np.abs(signs @ shares) >= found).sum()) + 1) / (FLIPS + 1)


def _drawn(n: int, size: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Weights [*size, n] by Rao and Wu: n - 1 of n are drawn, each counts n / (n - 1); one stays as it is."""
    if n == 1:
        return np.ones((*size, 1))
    drawn = rng.multinomial(n - 1, np.full(n, 1 / n), size)
    return drawn * np.float64(n / (n - 1))


def _bootstrap(shares: Array, share: Array, rng: np.random.Generator) -> tuple[float, float]:
    """95 % percentile interval of the mean.

    Args:
        shares: of the mean, by unit and run, [units, folds, seeds].
        share: of the cases, [units].
    """
    units, folds, seeds = shares.shape
    drawn_units = _drawn(units, (RESAMPLES,), rng)
    drawn_seeds = _drawn(seeds, (RESAMPLES, folds), rng)
    by_run = (drawn_units @ shares.reshape(units, -1)).reshape(RESAMPLES, folds, seeds)
    # units differ in their number of cases: a mean is a ratio
    means = (by_run * drawn_seeds).sum((1, 2)) / (drawn_units @ share)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
