"""Two evaluated runs on the same cases, metric by metric and in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..support.errors import UserError
from ..support.hints import some
from .folder import metric_of
from .metrics import METRICS
from .statistics import compare


def compare_summaries(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str, seed: int = 0
) -> dict[str, Any]:
    """What comparison.json holds.

    Args:
        ours, theirs: runs A and B, as of ``evaluation.read_summary``.
        name: of run B.
        seed: of the bootstrap.

    Returns:
        ``labels``: label -> metric -> paired comparison; ``notes``: what is in one of the runs only. NSD is left
        out where the tolerances differ.

    Raises:
        UserError: they have no case and label in common.
    """
    a, b = metric_of(ours), metric_of(theirs)
    both = [key for key in a if key in b]
    if not both:
        raise UserError(f"{name}: no case and label in common")
    notes = []
    tolerances = ours["tolerance_mm"], theirs["tolerance_mm"]
    if tolerances[0] != tolerances[1]:
        notes.append(
            f"NSD is not compared: its tolerance is {tolerances[0]:g} mm here, {tolerances[1]:g} mm in {name}"
        )
    labels = list(dict.fromkeys(label for _, label in both))
    for which, run, other in (("this run", a, b), (name, b, a)):
        strange = sorted({label for _, label in run} - {label for _, label in other})
        if strange:
            notes.append(f"labels in {which} only: {', '.join(strange)}")
        only = {case for case, label in run if label in labels and (case, label) not in other}
        if only:
            notes.append(f"{len(only)} cases in {which} only: {some(sorted(only))}")
    result: dict[str, Any] = {"other": name, "notes": notes, "labels": {k: {} for k in labels}}
    for metric in METRICS:
        if metric == "NSD" and tolerances[0] != tolerances[1]:
            continue
        x, y = metric_of(ours, metric), metric_of(theirs, metric)
        for label in labels:
            keys = [k for k in both if k[1] == label]
            found = compare([x[k][0] for k in keys], [y[k][0] for k in keys],
                            [x[k][1] for k in keys], seed)  # fmt: skip
            if found is not None:
                result["labels"][label][metric] = found.to_json()
    return result
