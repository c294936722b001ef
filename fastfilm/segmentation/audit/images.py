"""Simple numbers of a case's images as the network sees them: a histogram's shape, nothing about where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..data.sources import Case
from ..images.nifti import read_volume
from ..images.preprocessing import Preprocessing
from ..support.errors import UserError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99)

BINS = 32
"""Of the histogram whose entropy is taken, between the outer percentiles."""


def intensity_features(
    cases: Sequence[Case],
    preprocessing: Preprocessing,
    done: Callable[[], object] = lambda: None,
    threads: int = 4,
) -> NDArray[np.float64]:
    """[n, C * 13]: of each channel after the plan's preprocessing: percentiles, mean, standard deviation, share of
    zeros, skewness, kurtosis, entropy of the histogram.

    Args:
        done: called after each case.

    Raises:
        UserError: a file that cannot be read any more.
    """

    def look(case: Case) -> NDArray[np.float64]:
        try:
            images = [None if p is None else read_volume(p) for p in case.images]
            first = next(i for i in images if i is not None)
            arrays = [None if i is None else i.array for i in images]
            found = np.concatenate(
                [of_channel(c) for c in preprocessing(arrays, first.affine).image]
            )
        except UserError as error:
            raise UserError(f"{case.id}: {error}") from error
        done()
        return found

    pool = ThreadPoolExecutor(threads)
    try:
        return np.stack(list(pool.map(look, cases)))
    finally:
        pool.shutdown(cancel_futures=True)


def of_channel(image: NDArray[np.floating]) -> NDArray[np.float64]:
    """[13] of one channel; without contrast (a channel that is not there) no shape of a histogram."""
    x = np.asarray(image, np.float64).ravel()
    levels = np.percentile(x, PERCENTILES)
    shape = np.zeros(3)
    if x.std() > 1e-9:
        counts = np.histogram(np.clip(x, levels[0], levels[-1]), BINS)[0]
        shape[:] = stats.skew(x), stats.kurtosis(x), stats.entropy(counts)
    return np.array([*levels, x.mean(), x.std(), (x == 0).mean(), *shape])
