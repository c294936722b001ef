"""Scores of one network on its fold's held-out cases: metrics, Dice under other metadata, reliability."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.sections import MetadataKey
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..evaluation.metrics import case_metrics
from ..images.labels import mask_of, whole_labels
from ..images.nifti import read_volume, same_grid
from ..images.preprocessing import bounding_box
from ..metadata.encoder import (
    KeyEncoder,
    as_category,
    is_missing,
)
from ..models.folder import LoadedModel
from ..prediction.inputs import InputCase
from ..prediction.many_cases import load_case, resolved
from ..prediction.one_case import (
    Options,
    Predicted,
    predict,
)
from ..prediction.postprocessing import Mask
from ..prediction.swap import shown
from ..support.errors import Problems, UserError

METRICS = ("Dice", "HD95", "NSD", "volume_error")
"""Of ``metrics.METRICS``, those that a trial keeps."""

MOST_VALUES = 8
"""Values of a key that held-out cases are fed; the most frequent ones of the training cases."""

QUANTILES = (0.1, 0.5, 0.9)
"""Of the training values: what a continuous key is fed."""

BINS = 10
"""Of the reliability diagram, of equal width."""

AROUND = 5
"""Voxels around truth and prediction in which reliability is counted: the background far away is no question."""

Fed = dict[str, dict[str, Any]]
"""Key -> name of a value -> the value; None stands for a missing one."""


def score_cases(
    model: LoadedModel,
    plan: PlanFolder,
    cases: Sequence[Case],
    fed: Fed,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """What scores.json holds under ``cases``.

    Metrics are those of ``predict`` and ``evaluate`` with their defaults.

    Args:
        fed: values under which each case is predicted as well, key by key.
        between: called before each case.

    Raises:
        Problems: cases that cannot be read any more.
    """
    found, wrong = {}, []
    for case in cases:
        between()
        try:
            found[case.id] = _case(model, plan, case, fed)
        except UserError as error:
            wrong.append(f"{case.id}: {error}")
    if wrong:
        raise Problems("held-out cases that cannot be scored", wrong)
    return found


def fed_values(model: LoadedModel, keys: Mapping[str, MetadataKey], cases: Sequence[Case]) -> Fed:
    """The values of each key that held-out cases are fed; "unknown" where the model knows it.

    Args:
        cases: those of the training.
    """
    result: Fed = {}
    for name in keys:
        encoder = model.encoder[name]
        present = [v for c in cases if not is_missing(v := c.metadata.get(name), encoder)]
        values: dict[str, Any] = {}
        if encoder.kind == "continuous":
            numbers = np.array([encoder.number(v) for v in present])
            for q in np.quantile(numbers, QUANTILES, method="nearest"):
                value = float(np.exp(q)) if encoder.log else float(q)
                values.setdefault(f"{value:.6g}", value)
        elif encoder.values:
            values = {v: v for v in _frequent(encoder, present)}
        if encoder.unknown:
            values[shown(None, list(values))] = None
        result[name] = values
    return result


def _frequent(encoder: KeyEncoder, present: Sequence[Any]) -> list[str]:
    """The encoder's values in its own order, at most ``MOST_VALUES``, those that most cases have."""
    counts = dict.fromkeys(encoder.values, 0)
    for value in present:
        names = encoder.several(value) if encoder.kind == "multilabel" else [as_category(value)]
        for name in names:
            if name in counts:
                counts[name] += 1
    kept = sorted(encoder.values, key=lambda v: -counts[v])[:MOST_VALUES]
    return [v for v in encoder.values if v in kept]


def _case(model: LoadedModel, plan: PlanFolder, case: Case, fed: Fed) -> dict[str, Any]:
    volumes = load_case(InputCase(case.id, case.subject, case.images, dict(case.metadata)))
    first = next(v for v in volumes if v is not None)
    ready = model.preprocess([None if v is None else v.array for v in volumes], first.affine)
    del volumes
    true, grid = truths(plan, case)
    own = resolved(model, case.metadata)
    base = predict(model, ready, own, Options(), probabilities=True)
    metrics, reliability = {}, {}
    assert base.probabilities is not None
    for i, label in enumerate(model.info.labels):
        if label.name in true:
            truth = true[label.name]
            mask = _mask(model, base, i)
            every = case_metrics(mask, truth, grid)
            metrics[label.name] = {m: every[m] for m in METRICS}
            reliability[label.name] = reliability_bins(base.probabilities[i], mask, truth)
    swaps: dict[str, dict[str, dict[str, float | None]]] = {}
    dice = {name: m["Dice"] for name, m in metrics.items()}
    for key, values in fed.items():
        row = model.encoder[key].encode(own.get(key)).tolist()
        swaps[key] = {}
        for name, value in values.items():
            if model.encoder[key].encode(value).tolist() == row:
                swaps[key][name] = dict(dice)
                continue
            other = predict(model, ready, {**own, key: value}, Options())
            swaps[key][name] = {
                label.name: _dice(_mask(model, other, i), true[label.name])
                for i, label in enumerate(model.info.labels)
                if label.name in true
            }
    return {
        "subject": case.subject,
        "cluster": cluster_of(plan, case),
        "metadata": dict(case.metadata),
        "metrics": metrics,
        "swaps": swaps,
        "reliability": reliability,
    }


def cluster_of(plan: PlanFolder, case: Case) -> str | None:
    """The cluster's name (None: there are no clusters); a subject whose value is missing is one of its own."""
    key = plan.config.trial.cluster
    if key is None:
        return None
    value = case.metadata.get(key)
    return case.subject if is_missing(value, plan.config.metadata[key]) else as_category(value)


def _mask(model: LoadedModel, found: Predicted, i: int) -> Mask:
    """The i-th label as ``predict`` writes it."""
    return found.masks[i] if model.info.separate else found.strongest == i + 1


def truths(plan: PlanFolder, case: Case) -> tuple[dict[str, Mask], NDArray[np.float64]]:
    """The masks of the labels that were annotated, and the grid's matrix."""
    found: dict[str, Mask] = {}
    read: dict[Path, NDArray[np.integer]] = {}
    image = read_volume(next(p for p in case.images if p is not None))
    for name, path in case.labels.items():
        if path not in read:
            volume = read_volume(path)
            if (difference := same_grid(image, volume)) is not None:
                raise UserError(f"{path}: not on the grid of the image: {difference}")
            read[path] = whole_labels(path, volume.array)[0]
        found[name] = mask_of(path, read[path], plan.config.data.labels[name].values)
    return found, np.asarray(image.affine[:3, :3], np.float64)


def _dice(mask: Mask, truth: Mask) -> float | None:
    total = int(mask.sum()) + int(truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else None


def reliability_bins(p: NDArray[np.float32], mask: Mask, truth: Mask) -> list[list[float]]:
    """Voxels, sum of their probabilities, and how many are the label, for each of ``BINS`` bins of probability.

    Counted in the box around prediction and truth and ``AROUND`` voxels more; zeros where both are empty.
    """
    if not (mask.any() or truth.any()):
        return [[0, 0.0, 0] for _ in range(BINS)]
    box = tuple(
        slice(max(0, low - AROUND), high + AROUND) for low, high in bounding_box(mask | truth)
    )
    inside, true = p[box].ravel().astype(np.float64), truth[box].ravel()
    which = np.minimum((inside * BINS).astype(int), BINS - 1)
    counts = np.bincount(which, minlength=BINS)
    sums = np.bincount(which, inside, BINS)
    hits = np.bincount(which, true, BINS)
    return [
        [int(n), round(float(s), 6), int(h)] for n, s, h in zip(counts, sums, hits, strict=True)
    ]
