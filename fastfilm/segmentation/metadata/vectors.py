"""Metadata that are vectors (embeddings, radiomics): how they are read and encoded."""

from __future__ import annotations

import fnmatch
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..config.sections import Section

LONGEST = 2**16
"""Components of a vector."""

CONSTANT = 1e-9
"""Deviation, as a share of the mean, up to which a component is the same in all cases but for rounding."""

DIGITS = 7
"""Significant digits of what is fitted: float32 has no more, and the last bits of an SVD depend on the threads."""


class VectorEncoder(Section):
    """A fitted vector of L components: standardised, then projected if that was asked for.

    Attributes:
        mean: [L], over the training cases.
        std: [L], over the training cases; 0 for a component that is the same in all of them, which is encoded
            as 0 whatever its value.
        components: [N, L], rows that turn the standardised vector into N numbers of mean 0 and deviation 1 over
            the training cases: its principal components, each divided by its deviation. None: not projected.
    """

    mean: list[float] = Field(min_length=1, max_length=LONGEST)
    std: list[float] = Field(min_length=1, max_length=LONGEST)
    components: list[list[float]] | None = Field(None, min_length=1)

    @classmethod
    def fit(cls, rows: NDArray[np.float64], projection: int | None = None) -> VectorEncoder:
        """Fitted on the vectors of the training cases.

        The sign of a principal component is that which makes its largest loading (the first of equals) positive.

        Args:
            rows: [cases, L].
            projection: number of principal components.

        Raises:
            ValueError: values that overflow; more principal components than the vectors span.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = rows.mean(0), rows.std(0)
        if not (np.isfinite(mean).all() and np.isfinite(std).all()):
            raise ValueError(f"values of up to {np.abs(rows).max():.3g} are beyond all numbers")
        std[std <= CONSTANT * np.abs(mean)] = 0
        fitted = cls(mean=_rounded(mean), std=_rounded(std))
        if projection is None:
            return fitted
        z = np.stack([fitted.standardised(r) for r in rows])
        # the mean was rounded
        _, s, axes = np.linalg.svd(z - z.mean(0), full_matrices=False)
        rank = int((s > s[0] * max(z.shape) * np.finfo(float).eps).sum()) if s[0] > 0 else 0
        if projection > rank:
            raise ValueError(
                f"projection: {projection} principal components, and the vectors of {len(rows)} training cases"
                f" have {rank}"
            )
        axes = axes[:projection]
        largest = np.abs(axes).argmax(1)
        axes = axes * np.sign(axes[np.arange(projection), largest])[:, None]
        scaled = axes * (np.sqrt(len(rows)) / s[:projection])[:, None]
        return cls(mean=fitted.mean, std=fitted.std, components=[_rounded(r) for r in scaled])

    @property
    def length(self) -> int:
        """L, the components that a vector must have."""
        return len(self.mean)

    @property
    def width(self) -> int:
        """Numbers that the network gets."""
        return self.length if self.components is None else len(self.components)

    @functools.cached_property
    def arrays(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Mean [L], std [L] and components [N, L] (N = 0 without a projection), which every sample needs."""
        components = np.reshape(self.components or [], (-1, self.length))
        return np.array(self.mean), np.array(self.std), components

    @property
    def constant(self) -> int:
        """Components that are the same in all training cases."""
        return self.std.count(0.0)

    def standardised(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """[L] -> [L]."""
        mean, std, _ = self.arrays
        varies = std > 0
        return np.where(varies, (vector - mean) / np.where(varies, std, 1), 0)

    def encode(self, vector: NDArray[np.float64]) -> NDArray[np.float64]:
        """[L] -> [width].

        Raises:
            ValueError: another length.
        """
        if len(vector) != self.length:
            raise ValueError(f"has {len(vector)} components, expected {self.length}")
        with np.errstate(over="ignore", invalid="ignore"):
            z = self.standardised(vector)
            return z if self.components is None else self.arrays[2] @ z

    def along(self, i: int, amount: float) -> list[float]:
        """The vector that is encoded as ``amount`` in number ``i`` and as 0 in all others.

        Along a constant component it is the mean.
        """
        z = np.zeros(self.length)
        if self.components is None:
            z[i] = amount
        else:
            row = np.array(self.components[i])
            # the rows are orthogonal
            z = amount * row / (row @ row)
        return [float(x) for x in np.array(self.mean) + np.array(self.std) * z]

    def names(self, key: str, columns: Sequence[str]) -> list[str]:
        """A name for each of the numbers: ``key[0]`` or ``key[column]``, or ``key component 1``."""
        if self.components is not None:
            return [f"{key} component {i}" for i in range(1, self.width + 1)]
        return [f"{key}[{c}]" for c in columns or range(self.length)]

    def problem(self) -> str | None:
        """What is wrong with it, for one that was read from a file."""
        if len(self.std) != self.length:
            return f"vector.std needs {self.length} entries, got {len(self.std)}"
        if min(self.std) < 0:
            return f"vector.std must not be below 0, got {min(self.std)}"
        for i, row in enumerate(self.components or []):
            if len(row) != self.length:
                return f"vector.components[{i}] needs {self.length} entries, got {len(row)}"
            if not any(row):
                return f"vector.components[{i}] is 0 throughout"
        return None


def _rounded(x: NDArray[np.float64]) -> list[float]:
    return [float(f"{v:.{DIGITS}g}") for v in x]


def numbers(value: Any) -> NDArray[np.float64]:
    """The components in a list of numbers (or of their texts): [L].

    Raises:
        ValueError: something else; a component that is missing, no number or not finite (the first few are named).
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of numbers, got {value!r:.80}")
    if len(value) > LONGEST:
        raise ValueError(f"has {len(value)} components; at most {LONGEST} are taken")
    found, wrong = [], []
    for i, v in enumerate(value):
        # Python takes True and 1_000 for numbers
        plain = isinstance(v, str | int | float) and not isinstance(v, bool) and "_" not in str(v)
        try:
            x = float(v) if plain else np.nan
        except (ValueError, OverflowError):
            x = np.nan
        if not np.isfinite(x):
            wrong.append(f"[{i}] is {v!r:.40}")
        found.append(x)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"must be finite numbers; {', '.join(wrong[:3])}{more}")
    return np.array(found, np.float64)


def read_vector(value: Any, folder: Path) -> tuple[list[float], Path | None]:
    """The vector that a cell, a sidecar's entry or an option stands for, and the file that it was read from.

    Args:
        value: a list of numbers, the text of a JSON array, or the path of a .npy file (1-D, numbers).
        folder: that a path is relative to.

    Raises:
        ValueError: anything else, a file that cannot be read, numbers that are not finite.
    """
    text = value.strip() if isinstance(value, str) else ""
    if text.startswith("["):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"cannot be read as a JSON array: {error}, in {text!r:.80}") from error
    elif text.lower().endswith(".npy"):
        path = folder / text
        array = _array(path)
        try:
            return numbers(array).tolist(), path
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif not isinstance(value, list | tuple):
        raise ValueError(f"must be a list of numbers or the path of a .npy file, got {value!r:.80}")
    return numbers(value).tolist(), None


def _array(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        # no pickle, and nothing is read before its size is known
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "fiu":
        what = (
            f"shape {list(array.shape)}, {array.dtype}" if isinstance(array, np.ndarray) else ".npz"
        )
        raise ValueError(f"{path}: must hold one row of numbers (1-D), got {what}")
    if len(array) > LONGEST:
        raise ValueError(f"{path}: has {len(array)} components; at most {LONGEST} are taken")
    return np.array(array)


def expanded(patterns: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Names of columns; patterns (``*``, ``?``, ``[…]``) become the table's columns that fit, in its order.

    Raises:
        ValueError: a pattern that fits none; a column that is named twice.
    """
    found: list[str] = []
    for pattern in patterns:
        if pattern in columns or not any(c in pattern for c in "*?["):
            found.append(pattern)
            continue
        fits = [c for c in columns if fnmatch.fnmatchcase(c, pattern)]
        if not fits:
            raise ValueError(f"no column fits {pattern!r}")
        found += fits
    twice = sorted({c for c in found if found.count(c) > 1})
    if twice:
        raise ValueError(f"column {twice[0]!r} is named twice")
    return found
