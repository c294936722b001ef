"""Cross-validated linear prediction of one variable from others, with an interval and a p-value.

The model is ridge regression; for classes, of their indicators (Hastie, Tibshirani, Friedman, "The Elements of
Statistical Learning", 4.2), divided by each class's frequency in training, so that classes have equal weights.
Its predictions are a matrix times the targets: those of thousands of permuted targets cost one product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FOLDS, REPEATS = 5, 3
"""Parts of the cross-validation, and its repetitions with new parts (the mean is taken)."""

RIDGE = 0.05
"""Weight of the squared coefficients of standardised columns, per training row."""

RESAMPLES = 1000
"""Resamples of the bootstrap."""

PERMUTATIONS = 5000
"""Permutations at most: with 200 tests, Holm's correction needs p-values below 0.05 / 200."""

BATCH, ENOUGH = 250, 10
"""Permutations at a time, and number of permutations as good as the truth that ends the test (Besag and Clifford
1991)."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Predicted:
    """A measure of prediction, its 95 % interval over ``n`` subjects, and its one-sided p-value by permutation."""

    value: float
    low: float
    high: float
    p: float
    n: int


class Folds:
    """Cross-validation of one table of features, ready for any target.

    Args:
        x: features [n, f]; constant columns are left out.
        seed: seed of the parts.
    """

    def __init__(self, x: Array, seed: int = 0) -> None:
        self.n = len(x)
        x = x[:, np.ptp(x, 0) > 0]
        rng = np.random.default_rng(seed)
        self.slopes: list[Array] = []  # [n, n]: target -> prediction above the training mean
        self.means: list[Array] = []  # [n, n]: target -> mean of the training
        for _ in range(REPEATS):
            slope, mean = np.zeros((self.n, self.n)), np.zeros((self.n, self.n))
            for held in np.array_split(rng.permutation(self.n), FOLDS):
                train = np.setdiff1d(np.arange(self.n), held)
                shift, scale = x[train].mean(0), x[train].std(0)
                scale[scale <= 1e-12] = np.inf
                a, b = (x[train] - shift) / scale, (x[held] - shift) / scale
                penalty = RIDGE * len(train) * np.eye(x.shape[1])
                slope[np.ix_(held, train)] = b @ np.linalg.solve(a.T @ a + penalty, a.T)
                mean[np.ix_(held, train)] = 1 / len(train)
            self.slopes.append(slope)
            self.means.append(mean)


def auc(
    x: Array, y: NDArray[np.bool_], seed: int = 0, permutations: int = PERMUTATIONS
) -> Predicted:
    """Area under the ROC curve for predicting the class ``y`` [n] from ``x`` [n, f]; 0.5 is chance."""

    def score(slope: Array, mean: Array, target: Array) -> Array:
        # without the training mean, which is lower for parts with more positives
        return slope @ target

    return _tested(Folds(x, seed), y.astype(float), score, _auc, seed, permutations)


def r2(x: Array, y: Array, seed: int = 0, permutations: int = PERMUTATIONS) -> Predicted:
    """Share of the variance of ``y`` [n] predicted from ``x`` [n, f]; 0 or less is chance."""

    def residuals(slope: Array, mean: Array, target: Array) -> Array:
        # [2, n, B]: residuals of the prediction and of the training mean
        around = target - mean @ target
        return np.stack([around - slope @ target, around])

    return _tested(Folds(x, seed), y, residuals, _explained, seed, permutations)


def balanced_accuracy(
    x: Array, y: NDArray[np.integer], seed: int = 0, permutations: int = PERMUTATIONS
) -> Predicted:
    """Mean recall over the C classes of ``y`` [n], 0..C-1, predicted from ``x`` [n, f]; 1 / C is chance."""
    classes = int(y.max()) + 1

    def chosen(slope: Array, mean: Array, target: Array) -> Array:
        best, winner = np.full(target.shape, -np.inf), np.zeros(target.shape)
        for c in range(classes):
            one = (target == c).astype(float)
            with np.errstate(divide="ignore", invalid="ignore"):
                above = np.where((prior := mean @ one) > 0, slope @ one / prior, -np.inf)
            winner = np.where(above > best, c, winner)
            best = np.maximum(best, above)
        return winner

    def measure(found: Array, target: Array) -> Array:
        recalls = [
            np.where(target == c, found == c, 0).sum(0) / np.maximum((target == c).sum(0), 1)
            for c in range(classes)
        ]
        there = sum((target == c).any(0).astype(float) for c in range(classes))
        return np.asarray(sum(recalls) / there)

    return _tested(Folds(x, seed), y.astype(float), chosen, measure, seed, permutations)


def _auc(score: Array, target: Array) -> Array:
    """Area under the ROC curve of each column of [n, B]: [B], NaN for a single class."""
    positive = target > 0.5
    n, ranks = positive.sum(0), stats.rankdata(score, axis=0)
    pairs = n * (len(target) - n)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(((ranks * positive).sum(0) - n * (n + 1) / 2) / pairs)


def _explained(residuals: Array, target: Array) -> Array:
    squares = (residuals**2).sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 - squares[0] / squares[1])


def _tested(
    folds: Folds,
    y: Array,
    predict: Callable[[Array, Array, Array], Array],
    measure: Callable[[Array, Array], Array],
    seed: int,
    permutations: int,
) -> Predicted:
    """Value, interval and p-value of ``measure`` on the predictions for ``y``.

    Args:
        predict: function of slope [n, n], mean [n, n] and targets [n, B] to predictions [..., n, B].
        measure: function of predictions and targets to values [B].
    """
    pairs = list(zip(folds.slopes, folds.means, strict=True))

    def values(target: Array) -> Array:
        return np.mean([measure(predict(s, m, target), target) for s, m in pairs], 0)

    value = float(values(y[:, None])[0])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(folds.n, size=(folds.n, RESAMPLES))
    resampled = [measure(predict(s, m, y[:, None])[..., 0][..., drawn], y[drawn]) for s, m in pairs]
    low, high = np.nanpercentile(np.mean(resampled, 0), (2.5, 97.5))
    p = permutation_p(value, y, values, rng, permutations)
    return Predicted(value, float(low), float(high), p, folds.n)


def permutation_p(
    value: float,
    y: Array,
    values: Callable[[Array], Array],
    rng: np.random.Generator,
    permutations: int = PERMUTATIONS,
) -> float:
    """The share of permutations of ``y`` [n] with a value as high as ``value``, counting ``y`` itself.

    Args:
        values: function of targets [n, B] to values [B].
    """
    done = as_high = 0
    while done < permutations and as_high < ENOUGH:
        size = min(BATCH, permutations - done)
        shuffled = rng.permuted(np.repeat(y[:, None], size, 1), axis=0)
        # sums in another order differ in their last digits
        as_high += int((values(shuffled) >= value - 1e-12).sum())
        done += size
    return (as_high + 1) / (done + 1)
