"""A folder of predictions against the truth: metrics per case, label and metadata group.

EVALUATED/summary.json    the shape of nnU-Net's, and more: labels, groups, intervals, conventions
EVALUATED/cases.csv       one row a case and label
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..images.labels import (
    listed,
    mask_of,
    whole_labels,
)
from ..images.nifti import (
    NiftiVolume,
    Remarks,
    read_volume,
    same_grid,
)
from ..metadata.encoder import as_category
from ..metadata.groups import groupings
from ..prediction.postprocessing import Mask
from ..support.errors import UserError
from ..support.files import write_json, write_text
from ..support.hints import some
from ..support.records import (
    Measured,
    Plain,
    Record,
    read_record,
)
from .metrics import (
    METRICS,
    Values,
    case_metrics,
    is_sheared,
)
from .pairs import Pair, Pairs
from .statistics import mean_of


@dataclass
class Evaluated:
    """A pair and its metrics."""

    pair: Pair
    values: Values


class Seen:
    """What was remarkable in the files of an evaluation."""

    def __init__(self) -> None:
        self.remarks = Remarks()
        self.soft: list[Path] = []
        self.sheared: list[Path] = []
        self.strange: dict[str, dict[Path, list[int]]] = {"truth": {}, "predictions": {}}

    def update(self, other: Seen) -> None:
        """Takes in what another evaluation saw."""
        for kind, files in other.remarks.files.items():
            self.remarks.files.setdefault(kind, {}).update(files)
        self.soft += other.soft
        self.sheared += other.sheared
        for what, found in other.strange.items():
            self.strange[what].update(found)

    def lines(self) -> list[str]:
        """One line a kind."""
        lines = []
        for what, files in self.strange.items():
            if files:
                values = sorted({v for found in files.values() for v in found})
                lines.append(
                    f"{what}: values that are no label ({listed(values)}) in {_files(list(files))}"
                )
        if self.soft:
            lines.append(
                f"soft masks (values between 0 and 1), cut at 1/2: {_files(list(dict.fromkeys(self.soft)))}"
            )
        if self.sheared:
            lines.append(
                "sheared grids: HD95 is measured along the affine, NSD is not defined there:"
                f" {_files(list(dict.fromkeys(self.sheared)))}"
            )
        # said above with what it means here
        self.remarks.files.pop("sheared", None)
        return lines + list(self.remarks.lines())


@dataclass
class Evaluation:
    """What became of all pairs.

    Attributes:
        found: the metrics, case by case.
        failed: a line for each case that could not be evaluated.
        unpaired: a line on each label that has no truth in some cases.
        seen: what was remarkable in the files.
        kinds: metadata key -> kind, where it is known.
    """

    found: list[Evaluated]
    failed: list[str]
    unpaired: list[str] = field(default_factory=list)
    seen: Seen = field(default_factory=Seen)
    kinds: dict[str, str] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """All that is worth knowing, a line each."""
        return [*self.unpaired, *self.seen.lines()]


def evaluate_pairs(
    pairs: Pairs,
    tolerance: float = 1.0,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
    threads: int = 2,
) -> Evaluation:
    """Metrics of every pair; a case that cannot be evaluated does not stop the others.

    Args:
        tolerance: of the normalised surface distance, mm.
        progress: gets the number of cases; what it returns is called after each.
    """
    by_case: dict[str, list[Pair]] = {}
    for pair in pairs.pairs:
        by_case.setdefault(pair.case, []).append(pair)
    done = progress(len(by_case))
    seen = Seen()

    def one(group: list[Pair]) -> list[Evaluated] | str:
        try:
            return _case(group, tolerance, seen, pairs.foreign)
        except UserError as error:
            return f"{group[0].case}: {error}"
        except MemoryError:
            return f"{group[0].case}: not enough memory for it"
        finally:
            done()

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(one, by_case.values()))
    return Evaluation(
        found=[e for r in results if not isinstance(r, str) for e in r],
        failed=[r for r in results if isinstance(r, str)],
        unpaired=pairs.notes,
        seen=seen,
        kinds=pairs.kinds,
    )


def summarise(evaluation: Evaluation, tolerance: float, seed: int = 0) -> dict[str, Any]:
    """What summary.json holds.

    ``mean`` and ``metric_per_case`` are keyed by label value as nnU-Net's; ``foreground_mean`` is the mean over
    labels. ``labels`` has each label's name, means with intervals, and ``groups``: key -> group -> the same;
    ``binned`` are the keys whose groups are ranges.

    Args:
        tolerance: that the metrics were computed with, mm.
        seed: of the bootstrap.
    """
    found = evaluation.found
    labels = {str(e.pair.label.value): e.pair.label.name for e in found}
    groups = groupings({e.pair.case: e.pair.metadata for e in found}, evaluation.kinds)
    detail: dict[str, Any] = {}
    for value, name in labels.items():
        rows = {e.pair.case: e for e in found if e.pair.label.name == name}
        detail[value] = {"name": name, "metrics": _means(rows.values(), seed), "groups": {}}
        for key, grouping in groups.items():
            members = {g: [rows[c] for c in m if c in rows] for g, m in grouping.members.items()}
            detail[value]["groups"][key] = {g: _means(m, seed) for g, m in members.items() if m}
    mean = {v: {m: x["mean"] for m, x in d["metrics"].items()} for v, d in detail.items()}
    cases: dict[str, dict[str, Any]] = {}
    for e in found:
        pair = e.pair
        entry = cases.setdefault(
            pair.case,
            {
                "case": pair.case,
                "subject": pair.subject,
                # hundreds of numbers tell a reader nothing; predictions.json has them
                "metadata": {
                    k: v for k, v in pair.metadata.items() if evaluation.kinds.get(k) != "vector"
                },
                "image_file": None if pair.image is None else str(pair.image),
                "prediction_file": str(pair.prediction),
                "reference_file": str(pair.truth),
                "files": {},
                "metrics": {},
            },
        )
        entry["metrics"][str(pair.label.value)] = e.values
        entry["files"][str(pair.label.value)] = {
            "prediction": str(pair.prediction),
            "prediction_values": pair.written,
            "reference": str(pair.truth),
            "reference_values": pair.label.values,
        }
    return {
        "foreground_mean": {m: _mean([v[m] for v in mean.values()]) for m in METRICS},
        "mean": mean,
        "metric_per_case": list(cases.values()),
        "labels": detail,
        "binned": [key for key, grouping in groups.items() if grouping.binned],
        "tolerance_mm": tolerance,
        "units": METRICS,
        "bootstrap": {"seed": seed, "interval": 0.95, "unit": "subject"},
        "conventions": "null: not defined, and in no mean (label empty in truth and prediction);"
        " empty in one of them: Dice, IoU, NSD 0, HD95 the image's diagonal",
        "notes": evaluation.notes(),
        "failed": evaluation.failed,
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
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # quotes around all text: a carriage return in it must not end the row
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(c)) for c in columns] for row in rows)
    write_text(folder / "cases.csv", text.getvalue())
    write_json(folder / "summary.json", summary)


def _cell(value: Any) -> Any:
    """A cell that a spreadsheet takes for text or a number, never for a formula."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    text = ";".join(map(as_category, value)) if isinstance(value, list) else str(value)
    number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not number else text


class _Files(Record):
    prediction: str
    prediction_values: list[int]
    reference: str
    reference_values: list[int]


class _Case(Record):
    case: str
    subject: str
    metrics: dict[str, dict[str, Measured | None]]
    metadata: dict[str, Plain] = Field(default_factory=dict)
    image_file: str | None = None
    files: dict[str, _Files] = Field(default_factory=dict)


class _Mean(Record):
    mean: Measured | None
    low: Measured | None
    high: Measured | None
    n: int
    subjects: int


class _Label(Record):
    name: str
    metrics: dict[str, _Mean]
    groups: dict[str, dict[str, dict[str, _Mean]]]


class _Bootstrap(Record):
    seed: int = Field(ge=0, lt=2**32)


class _Summary(Record):
    """What is read of summary.json."""

    metric_per_case: list[_Case]
    labels: dict[str, _Label]
    foreground_mean: dict[str, Measured | None]
    tolerance_mm: Measured
    conventions: str
    bootstrap: _Bootstrap
    binned: list[str]
    notes: list[str]
    failed: list[str]

    @model_validator(mode="after")
    def _complete(self) -> _Summary:
        for what, names in (
            ("metric_per_case: the case", [c.case for c in self.metric_per_case]),
            ("labels: the name", [d.name for d in self.labels.values()]),
        ):
            twice = next((n for n, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"{what} {twice!r} is there twice")
        means = [m for d in self.labels.values() for m in (d.metrics, *self._groups(d))]
        if not all(METRICS.keys() <= m.keys() for m in means):
            raise ValueError("labels: a metric is missing")
        for case in self.metric_per_case:
            if not case.metrics.keys() <= self.labels.keys():
                raise ValueError(f"metric_per_case: {case.case} has a label that is not in labels")
            if not all(METRICS.keys() <= m.keys() for m in case.metrics.values()):
                raise ValueError(f"metric_per_case: {case.case}: a metric is missing")
        if not (means and self.metric_per_case and METRICS.keys() <= self.foreground_mean.keys()):
            raise ValueError("no case, no label, or no mean")
        return self

    @staticmethod
    def _groups(label: _Label) -> list[dict[str, _Mean]]:
        return [metrics for groups in label.groups.values() for metrics in groups.values()]


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of an evaluated folder.

    Raises:
        UserError: it is not there, damaged, or of another program.
    """
    path = folder / "summary.json" if folder.is_dir() else folder
    if not path.is_file():
        raise UserError(f"{path}: no such file; fastfilm evaluate makes summary.json")
    return read_record(path, _Summary, "a summary of fastfilm evaluate").model_dump()


def metric_of(summary: Mapping[str, Any], metric: str = "Dice") -> dict[tuple[str, str], Any]:
    """(case, label's name) -> (value, subject)."""
    names = {v: d["name"] for v, d in summary["labels"].items()}
    return {
        (c["case"], names[v]): (m[metric], c["subject"])
        for c in summary["metric_per_case"]
        for v, m in c["metrics"].items()
    }


def load_mask(path: Path, values: Sequence[int] | None) -> tuple[NiftiVolume, Mask]:
    """A label file, and where it has one of ``values`` (None or empty: anything above 0).

    Raises:
        UserError: a file that cannot be read, or whose values are no labels.
    """
    volume = read_volume(path)
    return volume, mask_of(path, whole_labels(path, volume.array)[0], values)


def _files(paths: Sequence[Path]) -> str:
    return f"{len(paths)} file{'s' if len(paths) > 1 else ''}: {some(sorted(paths))}"


def _case(group: Sequence[Pair], tolerance: float, seen: Seen, foreign: bool) -> list[Evaluated]:
    """One case: each file is read once."""
    read: dict[Path, tuple[NiftiVolume, NDArray[np.integer]]] = {}
    for path in dict.fromkeys(p for pair in group for p in (pair.truth, pair.prediction)):
        volume = read_volume(path)
        labels, soft = whole_labels(path, volume.array)
        read[path] = volume, labels
        seen.remarks.add(path, volume)
        if soft:
            seen.soft.append(path)
    result = []
    for pair in group:
        (prediction, predicted), (reference, true) = read[pair.prediction], read[pair.truth]
        if (difference := same_grid(prediction, reference)) is not None:
            # evaluate has no option for it
            difference = difference.removesuffix(" (data.grid_tolerance)")
            raise UserError(f"{pair.truth}: not on the grid of {pair.prediction}: {difference}")
        mask = mask_of(pair.prediction, predicted, pair.written)
        truth = mask_of(pair.truth, true, pair.label.values)
        grid = reference.affine[:3, :3]
        result.append(Evaluated(pair, case_metrics(mask, truth, grid, tolerance)))
    first = group[0]
    if is_sheared(read[first.truth][0].affine[:3, :3]):
        seen.sheared.append(first.truth)
    # values of no label of the case, in files that hold several
    known = [0, *(v for pair in group for v in pair.label.values)]
    for path in {pair.truth for pair in group if pair.label.values}:
        _strange(seen.strange["truth"], path, read[path][1], known)
    if foreign:
        _strange(seen.strange["predictions"], first.prediction, read[first.prediction][1], known)
    return result


def _strange(
    found: dict[Path, list[int]], path: Path, labels: NDArray[np.integer], known: Sequence[int]
) -> None:
    values = np.unique(labels[~np.isin(labels, known)])
    if values.size:
        found[path] = values.tolist()


def _means(rows: Iterable[Evaluated], seed: int) -> dict[str, Any]:
    listed = list(rows)
    subjects = [e.pair.subject for e in listed]
    return {m: mean_of([e.values[m] for e in listed], subjects, seed).to_json() for m in METRICS}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return float(np.mean(there)) if there else None
