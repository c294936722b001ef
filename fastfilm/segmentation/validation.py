"""Dice of whole cases while training: windows over the preprocessed arrays, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor

from .cache import CachedCase
from .distributed import Processes
from .model_folder import LoadedModel

WINDOWS_2D, WINDOWS_3D = 16, 2
"""Windows that go through the network at once."""


@dataclass(frozen=True)
class Validated:
    """Mean Dice over labels, and of each label (over the cases in which it is known)."""

    mean: float
    labels: dict[str, float]


@torch.no_grad()
def validate(
    model: LoadedModel,
    cases: Sequence[CachedCase],
    labels: Sequence[str],
    processes: Processes,
    autocast: torch.dtype,
) -> Validated:
    """Dice of each known label of each case; cases are dealt out over the processes.

    A label that is empty in the reference and in the prediction has no Dice and does not count; one that is empty
    in the reference only has 0.

    Args:
        labels: names of the cases' masks, in their order.
        autocast: type of the network's computations.
    """
    mine = []
    for i in range(processes.rank, len(cases), processes.world):
        with torch.autocast(processes.device.type, autocast, enabled=autocast is not torch.float32):
            mine += [(i, k, d) for k, d in case_dice(model, cases[i], labels)]
    found = sorted(entry for part in processes.gather(mine) for entry in part)
    means = {}
    for k, name in enumerate(labels):
        values = [d for _, which, d in found if which == k]
        if values:
            means[name] = float(np.mean(values))
    return Validated(float(np.mean(list(means.values()))) if means else 0.0, means)


def case_dice(
    model: LoadedModel, case: CachedCase, labels: Sequence[str]
) -> list[tuple[int, float]]:
    """(label, Dice) of the known labels of one case."""
    info = model.info
    image = torch.from_numpy(np.array(case.image())).to(model.device)
    masks = case.masks()
    names = set(model.encoder.names())
    values = {k: v for k, v in case.case.metadata.items() if k in names}
    known = [k for k, on in enumerate(case.known) if on]
    found: dict[int, NDArray[np.bool_]] = {}
    if info.output == "task":
        for k in known:
            row = model.encode(values, labels[k])
            found[k] = (windowed(model, image, row)[0] >= 0.5).cpu().numpy()
    else:
        p = windowed(model, image, model.encode(values))
        if info.output == "classes":
            background = 1 - p.sum(0, keepdim=True)
            chosen = torch.cat([background, p]).argmax(0)
            found = {k: (chosen == k + 1).cpu().numpy() for k in known}
        else:
            found = {k: (p[k] >= 0.5).cpu().numpy() for k in known}
    result = []
    for k, prediction in found.items():
        reference = masks[k] != 0
        total = int(prediction.sum()) + int(reference.sum())
        if total:
            result.append((k, 2 * int((prediction & reference).sum()) / total))
    return result


@torch.no_grad()
def windowed(model: LoadedModel, image: Tensor, row: NDArray[np.float32]) -> Tensor:
    """Probabilities [K, D, H, W] of ``image`` [C, D, H, W] under one metadata row, from overlapping windows."""
    flat = model.info.spatial_dims == 2
    rows = torch.from_numpy(row).to(image.device)
    out = sliding_window_inference(
        image.transpose(0, 1) if flat else image[None],
        model.info.patch_size,
        WINDOWS_2D if flat else WINDOWS_3D,
        lambda x: model.probabilities(x, rows),
        overlap=0.25,
        mode="gaussian",
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1) if flat else out[0]
