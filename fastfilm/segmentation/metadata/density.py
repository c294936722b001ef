"""Bins for a continuous value, separated at the minima of its kernel density."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

BANDWIDTHS = 50
"""Bandwidths that are tried."""
POINTS = 1000
"""Points at which the density is evaluated."""
FOLDS = 5
"""Folds of the cross-validation that chooses the bandwidth."""
SMALLEST = 0.02
"""Smallest share of the values in a bin; in the tails a density has minima around single values."""
AT_MOST = 1000
"""Number of values used at most; of more, evenly spaced ones in ascending order are taken."""


def density_edges(values: NDArray[np.floating]) -> list[float]:
    """Inner edges of the bins: where a Gaussian kernel density of ``values`` [n] has its minima.

    The method follows the code of the FiLM paper for acquisition parameters (Lemay et al., MIDL 2021): of 50
    bandwidths, spaced evenly in the logarithm, the one with the best likelihood in 5-fold cross-validation is
    used, and the minima are those of the log density at 1000 points. Unlike there, bandwidths are relative to the
    values' standard deviation, so that the unit does not matter, and a bin with less than 2 % of the values is
    merged with a neighbour.

    Returns:
        edges in ascending order and in the unit of ``values``; an empty list if the density has one peak, all
        values are equal, or there are fewer than 5.
    """
    x = np.sort(np.asarray(values, np.float64))
    if len(x) > AT_MOST:
        x = x[np.linspace(0, len(x) - 1, AT_MOST).astype(int)]
    mean, std = x.mean(), x.std()
    if std == 0 or len(x) < FOLDS:
        return []
    z = (x - mean) / std
    widths = np.logspace(-3, 0.5, BANDWIDTHS)
    # random folds: taken in turn, each value would have close neighbours, which favours too small bandwidths
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
        # merged across the edge at which the density is higher
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
