"""Dice of whole cases while training: what ``predict`` does, over the preprocessed arrays, without files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..data.cache import CachedCase
from ..models.folder import LoadedModel
from ..prediction.one_case import (
    CaseNetwork,
    Options,
    decide,
    windows,
)
from ..support.distributed import Processes


@dataclass(frozen=True)
class Validated:
    """Mean Dice over labels, and of each label (over the cases in which it is known)."""

    mean: float
    labels: dict[str, float]


def validate(
    model: LoadedModel,
    cases: Sequence[CachedCase],
    labels: Sequence[str],
    processes: Processes,
    overlap: float = 0.5,
    between: Callable[[], None] = lambda: None,
) -> Validated:
    """Dice of each known label of each case; cases are dealt out over the processes.

    The windows, the decision and the Dice are those of ``predict`` and ``evaluate`` at the same overlap, on the
    network's grid: where images are not resampled the numbers are the same to rounding. A label that is empty in
    the reference and in the prediction has no Dice and does not count; one that is empty in one of them has 0.

    Args:
        labels: names of the cases' masks, in their order.
        overlap: of the windows, as a share of their size.
        between: called before each case; what it raises ends the validation.
    """
    mine = []
    for i in range(processes.rank, len(cases), processes.world):
        between()
        mine += [(i, k, d) for k, d in case_dice(model, cases[i], labels, overlap)]
    found = sorted(entry for part in processes.gather(mine) for entry in part)
    means = {}
    for k, name in enumerate(labels):
        values = [d for _, which, d in found if which == k]
        if values:
            means[name] = float(np.mean(values))
    return Validated(float(np.mean(list(means.values()))) if means else 0.0, means)


@torch.no_grad()
def case_dice(
    model: LoadedModel, case: CachedCase, labels: Sequence[str], overlap: float = 0.5
) -> list[tuple[int, float]]:
    """(label, Dice) of the known labels of one case."""
    options = Options(overlap=overlap)
    names = set(model.encoder.names())
    values = {k: v for k, v in case.case.metadata.items() if k in names}
    image = torch.from_numpy(np.array(case.image())).to(model.device)
    masks = case.masks()
    channels = [label.name for label in model.info.labels]
    known = [(k, channels.index(labels[k])) for k, on in enumerate(case.known) if on]
    common, total = np.zeros(len(labels), np.int64), np.zeros(len(labels), np.int64)
    exclusive = model.info.output == "classes"
    for first, p in windows(model, image, CaseNetwork(model, values, options), options):
        on, strongest = decide(p.cpu().numpy(), exclusive)
        for k, channel in known:
            prediction = on[channel] if model.info.separate else strongest == channel + 1
            reference = masks[k, first : first + p.shape[1]] != 0
            common[k] += int((prediction & reference).sum())
            total[k] += int(prediction.sum()) + int(reference.sum())
    return [(k, 2 * float(common[k]) / float(total[k])) for k, _ in known if total[k]]
