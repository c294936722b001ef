"""A folder of predictions against the truth: metrics per case, label and metadata group.

EVALUATED/summary.json    the shape of nnU-Net's, and more: labels, groups, intervals, conventions
EVALUATED/cases.csv       one row a case and label
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from .errors import Problems, UserError
from .files import read_json, write_json, write_text
from .metadata import as_category, is_missing
from .metrics import METRICS, Values, case_metrics
from .model_folder import LabelInfo
from .postprocessing import Mask
from .prediction import MANIFEST
from .sources import SUFFIXES, stem
from .statistics import mean_of
from .volumes import NiftiVolume, read_volume, same_grid

GROUPS_AT_MOST = 12
"""Values of a metadata key up to which it makes groups."""


@dataclass
class Pair:
    """Prediction and truth of one label of one case."""

    case: str
    subject: str
    label: LabelInfo
    prediction: Path
    truth: Path
    own_file: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    image: Path | None = None


@dataclass
class Evaluated:
    """A pair and its metrics."""

    pair: Pair
    values: Values


def find_pairs(
    folder: Path, truth: Path | None, labels: Mapping[str, Sequence[int]] | None = None
) -> list[Pair]:
    """Which files belong together.

    Args:
        folder: predictions; predictions.json, if there, says what they are.
        truth: folder with the truth (searched with all folders in it; a case's file is called like the case,
            perhaps with more behind it); None: what the predictions came with (those of a plan's cases).
        labels: name -> values in the files; None: the model's, or all values that the truth has.

    Raises:
        Problems: cases without truth, or with several files that could be it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    entries, known = _entries(folder)
    own = bool(known and known["separate"])
    names = [LabelInfo(**v) for v in known["labels"]] if known else []
    if labels is not None:
        names = [LabelInfo(name=k, values=list(v), value=v[0]) for k, v in labels.items()]
    files = None if truth is None else _truth_files(truth)
    pairs, wrong = [], []
    for case, entry in entries.items():
        found: dict[str, Path] = {k: Path(p) for k, p in entry["truth"].items()}
        if files is not None:
            for name in [label.name for label in names] or [""]:
                matches = _matches(case, name if own else "", files)
                if len(matches) == 1:
                    found[name] = matches[0]
                elif matches:
                    listed = ", ".join(str(m) for m in matches)
                    wrong.append(f"{case}: several files could be its truth: {listed}")
        if not found:
            wrong.append(f"{case}: no truth" + (f" in {truth}" if truth else "; give --truth"))
            continue
        if not names:
            names = _labels_in(files or [])
        for label in names:
            path = found.get(label.name, found.get(""))
            if path is None:
                continue
            output = entry["outputs"].get(label.name if own else "labels")
            pairs.append(
                Pair(
                    case,
                    entry["subject"],
                    label,
                    folder / output,
                    path,
                    own,
                    entry["metadata"],
                    next((Path(p) for p in entry["images"] if p), None),
                )
            )
    if wrong:
        raise Problems(f"{folder}: problems in the evaluation", wrong)
    if not pairs:
        raise UserError(f"{folder}: no predictions to evaluate")
    return pairs


def evaluate_pairs(
    pairs: Sequence[Pair],
    tolerance: float = 1.0,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
    threads: int = 2,
) -> tuple[list[Evaluated], list[str]]:
    """Metrics of every pair, and one line for each case that could not be evaluated.

    Args:
        tolerance: of the normalised surface distance, mm.
        progress: gets the number of cases; what it returns is called after each.
    """
    by_case: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_case.setdefault(pair.case, []).append(pair)
    done = progress(len(by_case))

    def one(group: list[Pair]) -> list[Evaluated] | str:
        try:
            return _case(group, tolerance)
        except UserError as error:
            return f"{group[0].case}: {error}"
        finally:
            done()

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(one, by_case.values()))
    found = [e for r in results if not isinstance(r, str) for e in r]
    return found, [r for r in results if isinstance(r, str)]


def summarise(found: Sequence[Evaluated], tolerance: float, seed: int = 0) -> dict[str, Any]:
    """What summary.json holds.

    ``mean`` and ``metric_per_case`` are keyed by label value as nnU-Net's; ``foreground_mean`` is the mean over
    labels. ``labels`` has each label's name, means with intervals, and ``groups``: key -> value -> the same.
    """
    labels = {str(e.pair.label.value): e.pair.label.name for e in found}
    detail: dict[str, Any] = {}
    for value, name in labels.items():
        rows = [e for e in found if e.pair.label.name == name]
        detail[value] = {"name": name, "metrics": _means(rows, seed), "groups": {}}
        for key, members in _groups(rows).items():
            detail[value]["groups"][key] = {v: _means(m, seed) for v, m in members.items()}
    mean = {v: {m: x["mean"] for m, x in d["metrics"].items()} for v, d in detail.items()}
    cases: dict[str, dict[str, Any]] = {}
    for e in found:
        entry = cases.setdefault(
            e.pair.case,
            {
                "case": e.pair.case,
                "subject": e.pair.subject,
                "metadata": e.pair.metadata,
                "image_file": None if e.pair.image is None else str(e.pair.image),
                "prediction_file": str(e.pair.prediction),
                "reference_file": str(e.pair.truth),
                "own_files": e.pair.own_file,
                "files": {},
                "metrics": {},
            },
        )
        entry["metrics"][str(e.pair.label.value)] = e.values
        entry["files"][str(e.pair.label.value)] = [
            str(e.pair.prediction),
            str(e.pair.truth),
            e.pair.label.values,
        ]
    return {
        "foreground_mean": {
            m: _mean([v[m] for v in mean.values()]) for m in next(iter(mean.values()))
        },
        "mean": mean,
        "metric_per_case": list(cases.values()),
        "labels": detail,
        "tolerance_mm": tolerance,
        "units": METRICS,
        "bootstrap": {"seed": seed, "interval": 0.95, "unit": "subject"},
        "conventions": "null: not defined, and in no mean (label empty in truth and prediction);"
        " empty in one of them: Dice, IoU, NSD 0, HD95 the image's diagonal",
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """summary.json and cases.csv."""
    rows = []
    for case in summary["metric_per_case"]:
        for value, metrics in case["metrics"].items():
            name = summary["labels"][value]["name"]
            head = {"case": case["case"], "subject": case["subject"], "label": name}
            rows.append(head | metrics | {f"meta_{k}": v for k, v in case["metadata"].items()})
    text = io.StringIO()
    pd.DataFrame(rows).to_csv(text, index=False, lineterminator="\n")
    write_text(folder / "cases.csv", text.getvalue())
    write_json(folder / "summary.json", summary)


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of an evaluated folder."""
    path = folder / "summary.json" if folder.is_dir() else folder
    value = read_json(path)
    if not isinstance(value, dict) or "metric_per_case" not in value or "labels" not in value:
        raise UserError(f"{path}: not a summary of fastfilm evaluate")
    return value


def metric_of(summary: Mapping[str, Any], metric: str = "Dice") -> dict[tuple[str, str], Any]:
    """(case, label's name) -> (value, subject)."""
    names = {v: d["name"] for v, d in summary["labels"].items()}
    return {
        (c["case"], names[v]): (m[metric], c["subject"])
        for c in summary["metric_per_case"]
        for v, m in c["metrics"].items()
    }


def load_mask(path: Path, values: Sequence[int] | None) -> tuple[NiftiVolume, Mask]:
    """A file and where it has one of ``values`` (None or empty: anything but 0)."""
    volume = read_volume(path)
    if not values:
        return volume, np.asarray(volume.array != 0)
    return volume, np.asarray(np.isin(np.rint(volume.array), list(values)))


def _case(group: Sequence[Pair], tolerance: float) -> list[Evaluated]:
    result = []
    for pair in group:
        label = pair.label
        prediction, mask = load_mask(pair.prediction, None if pair.own_file else [label.value])
        reference, truth = load_mask(pair.truth, label.values)
        if (difference := same_grid(prediction, reference)) is not None:
            raise UserError(f"{pair.truth}: not on the grid of {pair.prediction}: {difference}")
        spacing = [float(s) for s in nib.affines.voxel_sizes(reference.affine)]
        result.append(Evaluated(pair, case_metrics(mask, truth, spacing, tolerance)))
    return result


def _means(rows: Sequence[Evaluated], seed: int) -> dict[str, Any]:
    subjects = [e.pair.subject for e in rows]
    return {
        m: mean_of([e.values[m] for e in rows], subjects, seed).to_json()
        for m in rows[0].values
        if m in METRICS
    }


def _groups(rows: Sequence[Evaluated]) -> dict[str, dict[str, list[Evaluated]]]:
    """Key -> value -> cases, of the keys that have few values."""
    groups: dict[str, dict[str, list[Evaluated]]] = {}
    for key in sorted({k for e in rows for k in e.pair.metadata}):
        members: dict[str, list[Evaluated]] = {}
        for e in rows:
            v = e.pair.metadata.get(key)
            members.setdefault("unknown" if is_missing(v) else as_category(v), []).append(e)
        if len(members) <= GROUPS_AT_MOST:
            groups[key] = dict(sorted(members.items()))
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None


def _entries(folder: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Case -> entry as predictions.json has it, and that file's contents if it is there."""
    if (folder / MANIFEST).is_file():
        known = read_json(folder / MANIFEST)
        return known["cases"], known
    files = [p for p in sorted(folder.iterdir()) if p.name.endswith(SUFFIXES)]
    return {
        stem(p): {
            "subject": stem(p),
            "images": [],
            "metadata": {},
            "truth": {},
            "outputs": {"labels": p.name},
        }
        for p in files
        if not p.name.startswith(".")
    }, None


def _truth_files(truth: Path) -> list[Path]:
    if not truth.is_dir():
        raise UserError(f"{truth}: no such folder")
    return [p for p in sorted(truth.rglob("*")) if p.name.endswith(SUFFIXES)]


def _matches(case: str, label: str, files: Sequence[Path]) -> list[Path]:
    exact = [p for p in files if stem(p) == (f"{case}_{label}" if label else case)]
    if exact:
        return exact
    longer = [p for p in files if stem(p).startswith(f"{case}_")]
    return [p for p in longer if not label or stem(p).endswith(f"_{label}")]


def _labels_in(files: Sequence[Path]) -> list[LabelInfo]:
    values: set[int] = set()
    for path in files:
        array = read_volume(path).array
        values |= {int(v) for v in np.unique(np.rint(array)) if v > 0}
    return [LabelInfo(name=str(v), values=[v], value=v) for v in sorted(values)]
