"""Which case, task and place the n-th training sample is of: a pure function of the seed and n.

So training can stop after any step and go on as if it had not: the loader's position is the number of steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ..data.cache import CachedCase
from ..metadata.encoder import as_category, is_missing

ORDER, DETAIL = 0, 1
"""Streams of random numbers: the order of the cases, and everything inside a sample."""


@dataclass(frozen=True)
class Draw:
    """One training sample: the case's position, the label it is for (None: all), its random numbers."""

    case: int
    task: int | None
    rng: np.random.Generator


class Draws:
    """The endless sequence of training samples.

    Without ``groups`` the cases come in random order, all once before any comes again. With them (positions of the
    cases that share a value) the groups take turns in random order, and so do the cases within each, so that every
    value is drawn equally often. In task mode a case's annotated labels take turns.

    Args:
        known: per case, which labels were annotated.
        groups: lists of positions.
        tasks: a sample is for one label.
        together: with ``tasks``: all labels of a case follow one another.
        seed: of everything.
    """

    def __init__(
        self,
        known: Sequence[Sequence[bool]],
        *,
        groups: Sequence[Sequence[int]] | None = None,
        tasks: bool = False,
        together: bool = False,
        seed: int = 0,
    ) -> None:
        self.known = [[k for k, on in enumerate(row) if on] for row in known]
        self.groups = [list(g) for g in groups] if groups else [list(range(len(known)))]
        self.tasks, self.together, self.seed = tasks, together, seed
        self.orders: dict[tuple[int, ...], np.ndarray[Any, Any]] = {}

    def __call__(self, n: int) -> Draw:
        """Sample number ``n`` >= 0."""
        rng = np.random.default_rng([self.seed, DETAIL, n])
        if self.tasks and self.together:
            most = max(len(k) for k in self.known)
            case, visit = self._case(n // most)
            return Draw(case, self.known[case][n % most % len(self.known[case])], rng)
        case, visit = self._case(n)
        if not self.tasks:
            return Draw(case, None, rng)
        labels = self.known[case]
        return Draw(case, labels[(visit + case) % len(labels)], rng)

    def _case(self, n: int) -> tuple[int, int]:
        """Position of the n-th case, and how often it came before."""
        count = len(self.groups)
        turn, i = divmod(n, count)
        g = int(self._order(count, (count, turn))[i])
        visit, j = divmod(turn, len(self.groups[g]))
        return self.groups[g][int(self._order(len(self.groups[g]), (-1, g, visit))[j])], visit

    def _order(self, count: int, key: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """A permutation of ``count`` for ``key``; the last few are kept."""
        if key not in self.orders:
            if len(self.orders) > 4 * len(self.groups) + 16:
                self.orders.clear()
            stream = [self.seed, ORDER, len(key), *(k + 1 for k in key)]
            self.orders[key] = np.random.default_rng(stream).permutation(count)
        return self.orders[key]


def groups_by(cases: Sequence[CachedCase], key: str) -> list[list[int]]:
    """Positions of the cases with each value of a metadata key (missing: a group of its own)."""
    found: dict[str, list[int]] = {}
    for i, c in enumerate(cases):
        value = c.case.metadata.get(key)
        found.setdefault("" if is_missing(value) else as_category(value), []).append(i)
    return [found[v] for v in sorted(found)]


def place(draw: Draw, case: CachedCase, size: Sequence[int], foreground: float) -> tuple[int, ...]:
    """Corner (in D, H, W) of a patch of ``size``; negative where the case is smaller than the patch.

    With probability ``foreground`` a voxel of the sample's label (of any annotated one in turn of chance) lies in
    the patch, at a random place of it; else the patch is anywhere.
    """
    rng = draw.rng
    # drawn in any case, so that the share of foreground does not change the places
    wants, pick, spot = rng.random() < foreground, rng.random(), rng.random(len(size))
    where = case.where
    if draw.task is not None:
        where = where[where[:, 0] == draw.task]
    elif len(where):
        labels = np.unique(where[:, 0])
        where = where[where[:, 0] == labels[int(rng.integers(len(labels)))]]
    corner = []
    centre = where[int(pick * len(where))][1:] if wants and len(where) else None
    for axis, (n, s) in enumerate(zip(case.shape, size, strict=True)):
        if n <= s:
            corner.append((n - s) // 2)
        elif centre is None:
            corner.append(int(spot[axis] * (n - s + 1)))
        else:
            low, high = max(0, int(centre[axis]) - s + 1), min(int(centre[axis]), n - s)
            corner.append(low + int(spot[axis] * (high - low + 1)))
    return tuple(corner)


class Steps(Sampler[list[int]]):
    """Sample numbers of each step's batch, this process's share of it, from step ``start`` up to ``stop``."""

    def __init__(self, start: int, stop: int, batch: int, rank: int = 0, world: int = 1) -> None:
        self.start, self.stop, self.batch, self.rank, self.world = start, stop, batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.islice(itertools.count(self.start), self.stop - self.start):
            first = step * self.batch
            yield list(range(first + self.rank, first + self.batch, self.world))

    def __len__(self) -> int:
        return self.stop - self.start
