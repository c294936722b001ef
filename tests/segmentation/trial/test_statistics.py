"""The statistics of a trial against sums by hand, complete enumeration and simulated trials."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra [segmentation]")

from scipy import stats

from benchmarks.paper.trial_statistics import settings, summary
from fastfilm.segmentation.trial.statistics import (
    FLIPS,
    RESAMPLES,
    Difference,
    difference,
    needed,
)

FOLDS = [0, 0, 0, 1, 1, 1]
SUBJECTS = list("aabccd")
VALUES = np.array([[3, 1], [5, 4], [0, 2], [1, 1], [-1, 2], [6, 3]]) / 100


def drawn(
    rng: np.random.Generator, n: int = 40, folds: int = 5, seeds: int = 3, mean: float = 0.0,
    subject: float = 0.03, run: float = 0.01, rest: float = 0.02,
) -> Difference:  # fmt: skip
    """One trial of a variance-components model, one case a subject."""
    fold = np.arange(n) % folds
    values = mean + subject * rng.standard_normal((n, 1)) + rest * rng.standard_normal((n, seeds))
    values = values + (run * rng.standard_normal((folds, seeds)))[fold]
    return difference(values, fold.tolist(), [f"{i:03}" for i in range(n)])


def parts(values: np.ndarray, fold: list[int], unit: list[str]) -> tuple[float, float, float]:
    """V_units (of equal units), V_runs and V_both, each by its definition in loops."""
    n, seeds = values.shape
    mean = values.mean()
    names = sorted(set(unit))
    at = {u: [i for i in range(n) if unit[i] == u] for u in names}
    share = {u: len(at[u]) / n for u in names}
    squares = sum(h**2 for h in share.values())
    divisor = 1 - 2 * sum(h**3 for h in share.values()) / squares + squares
    v_units = sum(sum(values[i].mean() - mean for i in at[u]) ** 2 for u in names) / n**2 / divisor
    pooled, weights = [], 0.0
    for k in set(fold):
        inside = [i for i in range(n) if fold[i] == k]
        pooled.append(np.var([values[inside, s].mean() for s in range(seeds)], ddof=1))
        weights += (len(inside) / n) ** 2
    v_runs = float(np.mean(pooled)) * weights / seeds
    v_both = 0.0
    for u, k, s in itertools.product(names, set(fold), range(seeds)):
        total = sum(values[i, s] - values[i].mean() for i in at[u] if fold[i] == k)
        v_both += total**2 / (n * seeds) ** 2
    return v_units, v_runs, v_both * seeds / (seeds - 1)


def test_the_standard_error_adds_both_kinds_of_noise_and_takes_off_what_they_share() -> None:
    values = VALUES + np.array([[0.03, 0], [0, 0.02]])[FOLDS]
    found = difference(values, FOLDS, SUBJECTS)
    v_units, v_runs, v_both = parts(values, FOLDS, SUBJECTS)
    assert found.mean == pytest.approx(values.mean())
    expected = [math.sqrt(v) for v in (v_units, v_runs, v_both)]
    assert [found.error_units, found.error_runs, found.error_both] == pytest.approx(expected)
    variance = v_units + v_runs - v_both
    assert variance > max(v_units, v_runs)
    assert found.standard_error == pytest.approx(math.sqrt(variance))
    # units weigh 2, 1, 2 and 1 of 6 cases: 3.6 equal ones
    df = variance**2 / (v_units**2 / 2.6 + v_runs**2 / 2)
    assert found.degrees == pytest.approx(df)
    reach = stats.t.ppf(0.975, df) * math.sqrt(variance)
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach))
    t = values.mean() / math.sqrt(variance)
    assert found.p_t == pytest.approx(2 * (1 - stats.t.cdf(t, df)))
    assert (found.cases, found.subjects, found.clusters, found.networks) == (6, 4, None, 4)
    # what they share is more than one of them: the larger one
    v_units, v_runs, v_both = parts(VALUES, FOLDS, SUBJECTS)
    assert v_both > v_runs
    least = difference(VALUES, FOLDS, SUBJECTS).standard_error
    assert least == pytest.approx(math.sqrt(v_units))


def test_without_training_noise_the_interval_is_that_of_one_t_test_over_subjects() -> None:
    x = np.random.default_rng(0).normal(0.01, 0.03, 12)
    found = difference(np.repeat(x[:, None], 3, 1), [0, 1, 2] * 4, [str(i) for i in range(12)])
    test = stats.ttest_1samp(x, 0)
    interval = test.confidence_interval()
    assert found.p_t == pytest.approx(test.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.spread_subjects == pytest.approx(x.std(ddof=1)) and found.spread_runs == 0


def test_the_variance_is_that_of_the_mean_over_many_trials() -> None:
    """0.03² / 40 + 0.01² / 15 + 0.02² / 120."""
    rng = np.random.default_rng(1)
    found = [drawn(rng) for _ in range(25)]
    expected = 0.03**2 / 40 + 0.01**2 / 15 + 0.02**2 / 120
    estimated = np.mean([f.standard_error**2 for f in found])  # type: ignore[operator]
    assert estimated == pytest.approx(expected, rel=0.15)


def test_flips_of_training_runs_and_of_subjects_are_all_counted() -> None:
    found = difference(VALUES, FOLDS, SUBJECTS)
    runs = [VALUES[[i for i in range(6) if FOLDS[i] == k], s].sum() for k in (0, 1) for s in (0, 1)]
    units = [VALUES[[i for i in range(6) if SUBJECTS[i] == u]].sum() for u in "abcd"]
    for p, sums in ((found.p_runs, runs), (found.p_units, units)):
        every = [abs(np.dot(f, sums)) for f in itertools.product((1, -1), repeat=4)]
        assert p == np.mean([e >= sum(sums) - 1e-12 for e in every])
    assert found.p == max(found.p_t, found.p_runs, found.p_units)  # type: ignore[type-var]
    assert found.p_smallest == 2 / 2**4


def test_more_than_sixteen_units_are_flipped_at_random_and_the_found_order_counts() -> None:
    rng = np.random.default_rng(0)
    strong = difference(rng.normal(1, 0.1, (30, 3)), [0] * 30, [str(i) for i in range(30)])
    assert strong.p_units == strong.p_smallest * (1 / (FLIPS + 1)) / (2 / 2**3) == 1 / (FLIPS + 1)
    x = rng.normal(0.3, 1, 18)
    found = difference(x[:, None], [0] * 18, [str(i) for i in range(18)])
    signs = np.array(list(itertools.product((1, -1), repeat=18)), np.int8)
    exact = (np.abs(signs @ x) >= abs(x.sum()) - 1e-9).mean()
    assert found.p_units == pytest.approx(exact, abs=4 * math.sqrt(exact / FLIPS))


def test_clusters_are_drawn_and_flipped_as_a_whole_and_share_no_subject() -> None:
    clusters = ["x", "x", None, "y", "z", "z"]
    # c is of y and z: one cluster; b has none and is its own
    found = difference(VALUES, FOLDS, SUBJECTS, clusters)
    assert (found.subjects, found.clusters, found.units) == (4, 3, 3)
    same = difference(VALUES, FOLDS, ["a", "a", "b", "c", "c", "c"])
    assert (found.error_units, found.p_units) == pytest.approx((same.error_units, same.p_units))
    alone = difference(VALUES, FOLDS, SUBJECTS, ["x"] * 6)
    assert (alone.low, alone.p, alone.bootstrap_low, alone.standard_error) == (None,) * 4
    assert alone.p_units == 1 and not alone.superior and not alone.excludes(1)


def test_a_fold_that_is_a_cluster_counts_its_training_noise_once() -> None:
    rng = np.random.default_rng(0)
    values = 0.02 * rng.standard_normal((4, 3))[np.repeat(range(4), 5)]
    fold = np.repeat(range(4), 5).tolist()
    names = [str(i) for i in range(20)]
    found = difference(values, fold, names, [f"site {k}" for k in fold])
    assert found.error_both == pytest.approx(found.error_runs)
    assert found.standard_error == pytest.approx(max(found.error_units, found.error_runs))  # type: ignore[type-var]


def test_one_seed_says_nothing_about_training_and_equal_differences_leave_nothing_to_chance() -> (
    None
):
    found = difference(VALUES[:, :1], FOLDS, SUBJECTS)
    assert not found.training_known and found.spread_runs is None and found.error_runs is None
    assert found.standard_error == found.error_units
    assert needed(found, 0.01).to_json() == {"target": "zero", "subjects": None, "seeds": None}
    same = difference(np.full((8, 3), 0.1), [0, 1] * 4, list("abcdefgh"))
    assert (same.low, same.high, same.p_t) == pytest.approx((0.1, 0.1, 0))
    assert same.standard_error == 0 and same.p == 2 / 2**6
    none = difference(np.zeros((8, 3)), [0, 1] * 4, list("abcdefgh"))
    assert (none.low, none.high, none.p) == (0, 0, 1) and none.excludes(0.01)


def test_the_bootstrap_has_the_variance_of_both_kinds_of_noise() -> None:
    """n - 1 of n are drawn: with three seeds, drawing three would lose a third of the training's variance."""
    rng = np.random.default_rng(3)
    runs = rng.standard_normal((3, 3))
    only_runs = runs[np.arange(30) % 3]
    names = [f"{i:02}" for i in range(30)]
    found = difference(only_runs, (np.arange(30) % 3).tolist(), names)
    width = found.bootstrap_high - found.bootstrap_low  # type: ignore[operator]
    # all draws of two of three seeds in each fold
    every = [
        np.mean([runs[k, list(d)].mean() for k, d in enumerate(draws)])
        for draws in itertools.product(itertools.product(range(3), repeat=2), repeat=3)
    ]
    assert np.var(every) == pytest.approx(np.mean(runs.var(1, ddof=1)) / 3 / 3)
    low, high = np.percentile(every, (2.5, 97.5))
    assert width == pytest.approx(high - low, rel=0.1)
    one = rng.standard_normal(30)
    only_units = difference(np.repeat(one[:, None], 3, 1), [0, 1, 2] * 10, names)
    width = only_units.bootstrap_high - only_units.bootstrap_low  # type: ignore[operator]
    assert width == pytest.approx(2 * 1.96 * one.std(ddof=1) / math.sqrt(30), rel=0.1)


def test_units_of_several_cases_are_drawn_with_all_of_them() -> None:
    """A unit of three cases and three of one, one run: all draws of three of the four units."""
    x = np.array([0.9, 0.8, 1.0, 0.1, 0.3, 0.2])
    found = difference(x[:, None], [0] * 6, list("aaabcd"))
    of = {"a": [0.9, 0.8, 1.0], "b": [0.1], "c": [0.3], "d": [0.2]}
    every = [np.mean([v for u in d for v in of[u]]) for d in itertools.product("abcd", repeat=3)]
    low, high = np.percentile(every, (2.5, 97.5))
    assert (found.bootstrap_low, found.bootstrap_high) == pytest.approx((low, high), abs=0.03)
    assert RESAMPLES == 2000


def test_the_order_of_cases_does_not_matter_and_a_seed_gives_the_same_numbers() -> None:
    rng = np.random.default_rng(0)
    values, fold = rng.normal(0.01, 0.02, (30, 3)), (np.arange(30) % 3).tolist()
    names = [f"s{i % 20:02}" for i in range(30)]
    clusters = [f"c{i % 10}" for i in range(30)]
    found = difference(values, fold, names, clusters, seed=4)
    assert found == difference(values, fold, names, clusters, seed=4)
    order = rng.permutation(30)
    other = difference(
        values[order], *([x[i] for i in order] for x in (fold, names, clusters)), seed=4
    )
    for name, value in found.to_json().items():
        assert other.to_json()[name] == pytest.approx(value), name
    assert difference(values, fold, names, seed=5).bootstrap_low != found.bootstrap_low
    assert Difference(**found.to_json()) == found


def test_intervals_cover_and_tests_reject_as_often_as_they_say() -> None:
    """20 subjects in 3 folds of 3 seeds, no effect; the flips of runs alone reject more often."""
    rng = np.random.default_rng(7)
    found = [drawn(rng, n=20, folds=3, run=0.015, rest=0.0) for _ in range(50)]
    missed = np.mean([not f.low <= 0 <= f.high for f in found])  # type: ignore[operator]
    rejected = np.mean([f.p < 0.05 for f in found])  # type: ignore[operator]
    assert missed <= 0.12 and rejected <= 0.12
    assert np.mean([f.p_runs < 0.05 for f in found]) > rejected
    effect = [drawn(rng, n=20, folds=3, mean=0.06) for _ in range(10)]
    assert np.mean([f.p < 0.05 for f in effect]) > 0.9  # type: ignore[operator]


def test_superiority_inferiority_and_exclusion_are_read_off_the_interval() -> None:
    base = difference(VALUES, FOLDS, SUBJECTS)
    for low, high, expected in (
        (0.001, 0.03, (True, True, False)),
        (-0.005, 0.008, (False, True, True)),
        (-0.02, 0.02, (False, False, False)),
        (-0.03, -0.01, (False, False, True)),
    ):
        found = replace(base, low=low, high=high)
        assert (found.superior, found.not_inferior(0.01), found.excludes(0.01)) == expected


def test_what_is_needed_shrinks_the_part_of_the_variance_that_it_can() -> None:
    base = drawn(np.random.default_rng(0))
    # subjects' noise alone decides: more seeds are of no use
    noisy = replace(base, mean=0.012, error_units=0.01, error_runs=0.001, error_both=0.0)
    found = needed(noisy, 0.01)
    assert found.target == "zero" and found.seeds is None and found.subjects is not None
    n = 40 + found.subjects

    def reach(n: int) -> float:
        units, runs = 0.01**2 * 40 / n, 0.001**2
        df = (units + runs) ** 2 / (units**2 / (n - 1) + runs**2 / 10)
        return float((stats.t.ppf(0.975, df) + stats.t.ppf(0.8, df)) * math.sqrt(units + runs))

    assert reach(n) <= 0.012 < reach(n - 1)
    # training noise alone decides: more subjects are of no use
    shaky = needed(replace(noisy, error_units=0.001, error_runs=0.01), 0.01)
    assert shaky.subjects is None and shaky.seeds is not None and shaky.seeds > 3
    # a mean of the margin less nothing: no number of either
    close = needed(replace(noisy, mean=0.01 - 1e-7), 0.01)
    assert (close.target, close.subjects, close.seeds) == ("margin", None, None)
    sure = replace(noisy, mean=0.1)
    assert (needed(sure, 0.01).subjects, needed(sure, 0.01).seeds) == (0, 0)
    harm = needed(replace(noisy, mean=-0.2), 0.01)
    assert (harm.target, harm.subjects, harm.seeds) == ("margin", 0, 0)


def test_a_flip_test_that_cannot_reach_five_percent_asks_for_more_units() -> None:
    few = replace(
        drawn(np.random.default_rng(0)), mean=0.1, subjects=4, degrees_units=3.0, networks=15
    )
    assert needed(few, 0.01).subjects == 2 and needed(few, 0.01).seeds is None
    networks = replace(few, subjects=40, degrees_units=39.0, folds=2, seeds=2, networks=4)
    assert needed(networks, 0.01).seeds == 1 and needed(networks, 0.01).subjects is None


@pytest.mark.parametrize(
    ("values", "folds", "message"),
    [
        (np.zeros((0, 3)), [], "finite, .cases, seeds., got shape .0, 3."),
        (np.zeros(3), [0] * 3, "got shape .3,."),
        (np.full((2, 1), np.nan), [0, 0], "must be finite"),
        (np.zeros((2, 1)), [0], "folds must have 2 entries, one a case, got 1"),
    ],
)
def test_values_that_make_no_difference_are_refused(
    values: np.ndarray, folds: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        difference(values, folds, ["a"] * 2 if len(values) == 2 else ["a"] * len(values))


def test_the_table_of_simulations_is_that_of_the_settings_and_its_rows_are_of_such_trials() -> None:
    file = Path(__file__).parents[3] / "docs/results/trial-statistics.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    known = [asdict(s) for s in settings()]
    assert [{k: row[k] for k in known[0]} for row in rows] == known
    one = summary(replace(settings()[0], subjects=6), trials=3)
    assert one.keys() == rows[0].keys() and one["smallest_p"] == 0.031
    # what the page says: t covers 94 to 96 % where its assumptions hold
    covered = [r["covered"]["t"] for r in rows if r["seeds"] > 1 and not r["fold"]]
    assert min(covered) > 93.5 and max(covered) < 96.5
