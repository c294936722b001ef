"""Bins of a continuous value between the minima of a kernel density."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

BANDWIDTHS = 50
POINTS = 1000
FOLDS = 5
SMALLEST = 0.02
"""Share of the values that a bin has at least; in the tails a density has minima around single values."""
AT_MOST = 1000
"""Values looked at; more are thinned out evenly along their order."""


def density_edges(values: NDArray[np.floating]) -> list[float]:
    """Inner edges of the bins: where a Gaussian kernel density of ``values`` [n] has its minima.

    As the FiLM paper's code bins acquisition parameters (Lemay et al., MIDL 2021): the bandwidth is the one of
    50 (spaced evenly in the logarithm) with the best likelihood in 5-fold cross-validation, the minima are those
    of the log density at 1000 points. Bandwidths here are relative to the values' standard deviation, so that
    no unit is preferred, and a bin with less than 2 % of the values joins a neighbour.

    Returns:
        ascending edges, in the unit of ``values``; none where the density has one peak or all values are equal.
    """
    x = np.sort(np.asarray(values, np.float64))
    if len(x) > AT_MOST:
        x = x[np.linspace(0, len(x) - 1, AT_MOST).astype(int)]
    mean, std = x.mean(), x.std()
    if std == 0 or len(x) < FOLDS:
        return []
    z = (x - mean) / std
    widths = np.logspace(-3, 0.5, BANDWIDTHS)
    # by chance, not in turn: neighbours in every fold would favour bandwidths that are too small
    fold = np.random.default_rng(0).permutation(len(z)) % FOLDS
    score = [
        sum(log_density(z[fold == k], z[fold != k], w).sum() for k in range(FOLDS)) for w in widths
    ]
    grid = np.linspace(z[0], z[-1], POINTS)
    d = log_density(grid, z, float(widths[int(np.argmax(score))]))
    inner = (d[1:-1] < d[:-2]) & (d[1:-1] <= d[2:])
    edges, depth = grid[1:-1][inner], d[1:-1][inner]
    while len(edges):
        counts = np.histogram(z, [-np.inf, *edges, np.inf])[0]
        small = int(np.argmin(counts))
        if counts[small] >= SMALLEST * len(z):
            break
        # joined with the neighbour that it is less clearly parted from
        sides = [i for i in (small - 1, small) if 0 <= i < len(edges)]
        drop = max(sides, key=lambda i: depth[i])
        edges, depth = np.delete(edges, drop), np.delete(depth, drop)
    return [float(e) for e in edges * std + mean]


def log_density(
    at: NDArray[np.float64], data: NDArray[np.float64], width: float
) -> NDArray[np.float64]:
    """Log of the Gaussian kernel density of ``data`` [n] at the points ``at`` [m]."""
    d = (at[:, None] - data[None, :]) / width
    constant = np.log(len(data) * width * np.sqrt(2 * np.pi))
    return np.asarray(logsumexp(-0.5 * d * d, axis=1) - constant)
