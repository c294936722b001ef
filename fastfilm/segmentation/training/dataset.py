"""Training samples: a patch or slice of a case, augmented, with its masks, known labels and metadata row."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..data.cache import CachedCase
from ..metadata.encoder import MetadataEncoder
from .augment import Augment
from .sampling import Draws, place


@dataclass
class Batch:
    """What the loop gets.

    Attributes:
        image: [N, C, *S] float32.
        masks: [N, K, *S] uint8, K = 1 in task mode.
        known: [N, K] bool: the label was annotated.
        rows: [N, M] float32.
        cases: ids.
    """

    image: Tensor
    masks: Tensor
    known: Tensor
    rows: Tensor
    cases: list[str]

    def pin_memory(self) -> Batch:
        """For asynchronous copies to a GPU."""
        return self._with(lambda t: t.pin_memory(), self.cases)

    def to(self, device: torch.device) -> Batch:
        """On ``device``, but for ``known``, which decides what is computed."""
        moved = self._with(lambda t: t.to(device, non_blocking=True), self.cases)
        return replace(moved, known=self.known)

    def part(self, i: int, count: int) -> Batch:
        """The i-th of ``count`` parts."""
        size = -(-len(self.cases) // count)
        return self._with(lambda t: t.chunk(count)[i], self.cases[i * size : (i + 1) * size])

    def _with(self, change: Callable[[Tensor], Tensor], cases: list[str]) -> Batch:
        return Batch(
            change(self.image), change(self.masks), change(self.known), change(self.rows), cases
        )


def collate(samples: list[Batch]) -> Batch:
    """Samples (batches of one) -> a batch."""
    return Batch(
        torch.cat([s.image for s in samples]),
        torch.cat([s.masks for s in samples]),
        torch.cat([s.known for s in samples]),
        torch.cat([s.rows for s in samples]),
        [c for s in samples for c in s.cases],
    )


class Samples(Dataset[Batch]):
    """Sample number -> a batch of one; the same for the same number, in whatever process.

    Args:
        cases: preprocessed.
        draws: what sample n is of.
        encoder: of the metadata; in task mode ``task_key`` is one of its keys.
        patch_size: [H, W] or [D, H, W].
        foreground: share of samples with a label in them.
        augment: None leaves samples as they are.
        labels: names, in the order of the masks.
        fed: case -> metadata in place of its own; None: its own.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        draws: Draws,
        encoder: MetadataEncoder,
        *,
        labels: Sequence[str],
        patch_size: Sequence[int],
        foreground: float,
        augment: Augment | None,
        task_key: str | None = None,
        fed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.cases, self.draws, self.encoder = list(cases), draws, encoder
        self.labels, self.patch_size, self.foreground = list(labels), tuple(patch_size), foreground
        self.augment, self.task_key, self.fed = augment, task_key, fed or {}

    def __getitem__(self, n: int) -> Batch:
        draw = self.draws(n)
        case = self.cases[draw.case]
        flat = len(self.patch_size) == 2
        size = (1, *self.patch_size) if flat else self.patch_size
        corner = place(draw, case, size, self.foreground)
        image = cut(case.image(), corner, size)
        masks = case.masks()
        if draw.task is not None:
            masks = masks[draw.task : draw.task + 1]
        masks = cut(masks, corner, size)
        x, y = torch.from_numpy(image), torch.from_numpy(masks)
        if flat:
            x, y = x[:, 0], y[:, 0]
        seed = int(draw.rng.integers(2**32))
        hidden = self.encoder.draw_hidden(draw.rng)
        if self.augment is not None:
            x, y = self.augment(x, y, seed)
        given = self.fed.get(case.case.id, case.case.metadata)
        values = {k: v for k, v in given.items() if k in self.encoder.names()}
        known = torch.tensor(case.known)
        if draw.task is not None and self.task_key is not None:
            values[self.task_key] = self.labels[draw.task]
            known = torch.ones(1, dtype=torch.bool)
        row = torch.from_numpy(self.encoder.encode(values, hidden))
        return Batch(x[None], y[None], known[None], row[None], [case.case.id])


def quiet_worker(_: int) -> None:
    """In a loading process: Ctrl-C is the main process's affair, and so is that it has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # the thread that hands over file descriptors, when nobody takes them any more
        if not issubclass(kind, ConnectionError | EOFError):
            shown(kind, error, trace)

    sys.excepthook = hook


def cut(array: NDArray, corner: Sequence[int], size: Sequence[int]) -> NDArray:
    """A copy of the window of ``size`` at ``corner`` of [C, D, H, W]; zeros outside of the array."""
    out = np.zeros((len(array), *size), array.dtype)
    inside, outside = [slice(None)], [slice(None)]
    for c, s, n in zip(corner, size, array.shape[1:], strict=True):
        low, high = max(c, 0), min(c + s, n)
        inside.append(slice(low, high))
        outside.append(slice(low - c, high - c))
    out[tuple(outside)] = array[tuple(inside)]
    return out
