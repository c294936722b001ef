"""Bootstrap and paired comparison, against all resamples and all pairs counted one by one."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("scipy", reason="needs the extra [segmentation]")

from scipy import stats

from fastfilm.segmentation.evaluation.statistics import (
    bootstrap_means,
    compare,
    holm,
    mean_of,
)

VALUES = [0.1, 0.5, 0.9, 0.2, 0.4, 0.8]
SUBJECTS = ["a", "b", "b", "b", "c", "c"]


def test_resamples_are_of_subjects_each_with_all_its_cases() -> None:
    """Every mean is one of the 27 draws of three subjects, and each draw is equally likely."""
    of = {s: [v for v, t in zip(VALUES, SUBJECTS, strict=True) if t == s] for s in "abc"}
    expected = Counter(
        round(float(np.mean([v for s in drawn for v in of[s]])), 9)
        for drawn in itertools.product("abc", repeat=3)
    )
    means = bootstrap_means(np.array(VALUES), SUBJECTS, seed=0, resamples=27_000)
    found = Counter(np.round(means, 9).tolist())
    assert found.keys() == expected.keys()
    for mean, count in expected.items():
        assert found[mean] == pytest.approx(1000 * count, rel=0.15)


def test_the_interval_holds_95_percent_of_the_resamples_and_needs_two_subjects() -> None:
    found = mean_of([*VALUES, None], [*SUBJECTS, "d"], seed=3)
    means = bootstrap_means(np.array(VALUES), SUBJECTS, seed=3)
    assert found.low is not None and found.high is not None
    assert (means < found.low).mean() < 0.025 < (means <= found.low).mean()
    assert (means > found.high).mean() < 0.025 < (means >= found.high).mean()
    assert (found.n, found.subjects) == (6, 3) and found.mean == pytest.approx(np.mean(VALUES))
    alone = mean_of(VALUES, ["a"] * 6)
    assert (alone.low, alone.high, alone.n, alone.subjects) == (None, None, 6, 1)
    b = [0.2] * 6
    assert compare(VALUES, b, ["a"] * 6).low is None  # type: ignore[union-attr]


def test_a_comparison_resamples_the_differences_by_subject() -> None:
    b = [0.2, 0.4, 0.7, 0.3, 0.1, 0.3]
    found = compare(VALUES, b, SUBJECTS, seed=5)
    assert found is not None and (found.n, found.subjects) == (6, 3)
    means = bootstrap_means(np.array(VALUES) - np.array(b), SUBJECTS, seed=5)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, (2.5, 97.5))))


@pytest.mark.parametrize("seed", range(3))
def test_the_effect_is_the_share_of_ranks_for_a_minus_that_for_b(seed: int) -> None:
    """Ranks by counting: how many differences are smaller, ties half. Equal pairs have none."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 8, (2, 12)) / 8
    d = [float(x) for x in a - b if x != 0]
    ranks = [sum((abs(y) < abs(x)) + (abs(y) == abs(x)) / 2 for y in d) + 0.5 for x in d]
    total = sum(ranks)
    expected = sum(r if x > 0 else -r for r, x in zip(ranks, d, strict=True)) / total
    found = compare(a.tolist(), b.tolist(), [str(i) for i in range(12)])
    assert found is not None and found.effect == pytest.approx(expected)
    assert found.n == 12 and found.difference == pytest.approx((a - b).mean())


def test_sides_are_named_for_the_first_run_and_pairs_need_both_values() -> None:
    a, b = [0.9, 0.8, None, 0.7, 0.6, 0.8], [0.5, 0.6, 0.1, None, 0.5, 0.3]
    found = compare(a, b, list("uvwxyz"))
    assert found is not None and found.n == 4
    assert found.p_greater == pytest.approx(1 / 16) and found.p_less == pytest.approx(1)
    assert found.p_two_sided == pytest.approx(1 / 8)
    assert found.p_greater == stats.wilcoxon([0.4, 0.2, 0.1, 0.5], alternative="greater").pvalue
    assert compare(b, a, list("uvwxyz")).p_less == found.p_greater  # type: ignore[union-attr]
    single = compare([0.9], [0.5], ["u"])
    assert single is not None and single.p_greater is None and single.effect == 1


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    # 0.005 * 4, 0.01 * 3, 0.03 * 2; the last is not below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([None]) == [None]
