"""``fastfilm evaluate``."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastfilm.segmentation.evaluation.comparison import compare_summaries
from fastfilm.segmentation.evaluation.folder import (
    Evaluation,
    Seen,
    evaluate_pairs,
    read_summary,
    summarise,
    write_summary,
)
from fastfilm.segmentation.evaluation.metrics import METRICS
from fastfilm.segmentation.evaluation.pairs import find_pairs
from fastfilm.segmentation.evaluation.true_by_fed import (
    TABLE,
    own_folder,
    read_swap,
    sensitivity,
    swap_table,
)
from fastfilm.segmentation.prediction.swap import SWAP
from fastfilm.segmentation.reports import layout
from fastfilm.segmentation.reports.layout import Column
from fastfilm.segmentation.support.console import bar, say
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.files import write_json
from fastfilm.segmentation.support.hints import did_you_mean
from fastfilm.segmentation.support.lock import locked
from fastfilm.segmentation.support.records import check_writable

COMPARISON = "comparison.json"

SHOWN = ("Dice", "HD95", "NSD")

WITH_INTERVALS = 6
"""Fed values up to which the printed table has intervals."""

DIFFERENCES = 60
"""Paired differences up to which they are printed."""


def command(
    predictions: Annotated[Path, typer.Argument(help="folder that fastfilm predict wrote")],
    truth: Annotated[
        Path | None,
        typer.Option(help="folder of label files; none: those of the plan that was predicted"),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="where to write; none: into PREDICTIONS")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE[,VALUE…] in predictions and truth of other programs; repeat"),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="of the surface distance NSD, in mm")] = 1.0,
    metrics: Annotated[
        str, typer.Option(help="that are printed: a list (Dice,IoU), or all; the files have all")
    ] = ",".join(SHOWN),
    compare_with: Annotated[
        Path | None,
        typer.Option("--compare", help="evaluated folder of another run on the same cases"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the bootstrap", min=0, max=2**32 - 1)] = 0,
) -> int:
    """Scores predictions against the truth: summary.json, cases.csv and tables.

    Under predict --swap it prints Dice by true and by fed value.
    """
    if not (tolerance > 0 and math.isfinite(tolerance)):
        raise UserError(f"--tolerance must be a number above 0 mm, got {tolerance}")
    shown = _metrics(metrics)
    labels = None if label is None else _labels(label)
    to = to or predictions
    with locked(to, "fastfilm evaluate"):
        return _scored(predictions, truth, to, labels, tolerance, shown, compare_with, seed)


def _scored(
    predictions: Path,
    truth: Path | None,
    to: Path,
    labels: Any,
    tolerance: float,
    shown: Sequence[str],
    compare_with: Path | None,
    seed: int,
) -> int:
    if (predictions / SWAP).is_file():
        if compare_with is not None:
            raise UserError(
                f"--compare: {predictions} holds the predictions under several values;"
                " compare one of its folders"
            )
        return _swapped(predictions, truth, to, labels, tolerance, seed)
    other = None if compare_with is None else read_summary(compare_with)
    evaluation = _evaluate(predictions, truth, labels, tolerance, to)
    _notes(evaluation.notes())
    if evaluation.found:
        summary = summarise(evaluation, tolerance, seed)
        compared = other and compare_summaries(summary, other, str(compare_with), seed)
        _remove(to / COMPARISON, to / TABLE)
        write_summary(to, summary)
        _show(summary, shown)
        if compared:
            write_json(to / COMPARISON, compared)
            _show_comparison(compared, shown)
        say(f"written to {to}: summary.json, cases.csv{', comparison.json' if compared else ''}")
    return _failures(evaluation.failed)


def _remove(*paths: Path) -> None:
    """Results of an evaluation before this one, which would pass as this one's."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be removed: {error.strerror or error}") from error


def _labels(texts: Sequence[str]) -> dict[str, list[int]]:
    labels: dict[str, list[int]] = {}
    taken: dict[int, str] = {}
    for text in texts:
        name, sign, given = text.partition("=")
        try:
            values = [int(v) for v in given.split(",")]
        except ValueError:
            values = []
        if not (sign and name.strip() and values):
            raise UserError(f"--label takes NAME=VALUE with whole numbers, got {text!r}")
        if name in labels:
            raise UserError(f"--label {name} is there twice")
        for value in values:
            if value < 1:
                raise UserError(f"--label {text}: values must be above 0 (0 is the background)")
            if value in taken:
                raise UserError(
                    f"--label {text}: the value {value} is that of {taken[value]} already"
                )
            taken[value] = name
        labels[name] = values
    return labels


def _metrics(text: str) -> list[str]:
    if text == "all":
        return list(METRICS)
    by_lower = {m.lower(): m for m in METRICS}
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name.lower() not in by_lower:
            raise UserError(
                f"--metrics: no metric {name!r}; there are all, {', '.join(METRICS)}"
                + did_you_mean(name, ["all", *METRICS])
            )
    return list(dict.fromkeys(by_lower[name.lower()] for name in names))


def _evaluate(
    folder: Path, truth: Path | None, labels: Any, tolerance: float, to: Path
) -> Evaluation:
    pairs = find_pairs(folder, truth, labels)
    # before the work, not after it
    check_writable(to)
    with bar(f"evaluating {folder.name}") as progress:
        return evaluate_pairs(pairs, tolerance, progress)


def _notes(lines: Sequence[str]) -> None:
    for line in dict.fromkeys(lines):
        say(f"note: {layout.plain(line)}")


def _failures(failed: list[str]) -> int:
    if not failed:
        return 0
    lines = "\n".join(f"  - {line}" for line in failed)
    print(f"fastfilm evaluate: {len(failed)} failed:\n{lines}", file=sys.stderr)
    return 1


def _head(metric: str, tolerance: float) -> str:
    unit = METRICS[metric] or (f"{tolerance:g} mm" if metric == "NSD" else "")
    name = metric.replace("_", "\n")
    return f"{name}\n({unit})" if unit else name


def _show(summary: Mapping[str, Any], shown: Sequence[str]) -> None:
    names, rows = [], []
    for detail in summary["labels"].values():
        names.append(detail["name"])
        rows.append(detail["metrics"])
        for key, groups in detail["groups"].items():
            if len(groups) > 1:
                between = " " if key in summary["binned"] else " = "
                names += [f"  {key}{between}{value}" for value in groups]
                rows += groups.values()
    counts = [f"{r['volume_error']['n']} ({r['volume_error']['subjects']})" for r in rows]
    columns = [Column("cases\n(subjects)", counts)]
    for m in shown:
        head = _head(m, summary["tolerance_mm"])
        columns.append(layout.means(head, [r[m] for r in rows], layout.DIGITS[m]))
    layout.show(
        "mean, and below it the 95 % interval over subjects", "label, group", names, columns
    )
    say(f"mean Dice over labels: {layout.number(summary['foreground_mean']['Dice'], 4)}")


def _show_comparison(compared: Mapping[str, Any], shown: Sequence[str]) -> None:
    _notes(compared["notes"])
    names: list[str] = []
    rows: list[Mapping[str, Any] | None] = []
    for label, metrics in compared["labels"].items():
        there = [m for m in shown if m in metrics]
        names += [label, *(f"  {m}" for m in there)]
        rows += [None, *(metrics[m] for m in there)]

    def column(head: str, cell: Any) -> Column:
        return Column(head, ["" if r is None else cell(r) for r in rows])

    difference = column(
        "A - B\n[95 %]",
        lambda r: f"{layout.number(r['difference'], 3, True)}\n{layout.interval(r, 3, True)}",
    )
    columns = [
        column("pairs\n(subjects)", lambda r: f"{r['n']} ({r['subjects']})"),
        column("A", lambda r: layout.number(r["mean_a"], 3)),
        column("B", lambda r: layout.number(r["mean_b"], 3)),
        Column(difference.head, layout.aligned(difference.cells)),
        column("p\n(A > B)", lambda r: layout.p_value(r["p_greater"])),
        column("p\n(A < B)", lambda r: layout.p_value(r["p_less"])),
        column("p\n(A ≠ B)", lambda r: layout.p_value(r["p_two_sided"])),
        column("rank-biserial", lambda r: layout.number(r["effect"], 2, True)),
    ]
    say("")
    title = f"this run (A) and {compared['other']} (B), paired"
    layout.show(title, "label, metric", names, columns)


def _swapped(
    predictions: Path, truth: Path | None, to: Path, labels: Any, tolerance: float, seed: int
) -> int:
    swap = read_swap(predictions)
    folders = {fed.value: own_folder(to, fed.folder) for fed in swap.fed}
    runs: dict[str, Evaluation] = {}
    failed: list[str] = []
    for fed in swap.fed:
        run = _evaluate(predictions / fed.folder, truth, labels, tolerance, to)
        failed += [f"{fed.folder}: {w}" for w in run.failed]
        for e in run.found:
            # groups are by what is true of the case, not by what was fed
            e.pair.metadata = {**e.pair.metadata, swap.key: swap.true.get(e.pair.case)}
        if run.found:
            runs[fed.value] = run
    seen = Seen()
    for run in runs.values():
        seen.update(run.seen)
    _notes([*(line for run in runs.values() for line in run.unpaired), *seen.lines()])
    if runs:
        found = {value: run.found for value, run in runs.items()}
        kind = next(iter(runs.values())).kinds.get(swap.key)
        result = {"key": swap.key, **swap_table(found, swap.true, seed, kind)}
        result["sensitivity"] = sensitivity(found)
        _remove(to / COMPARISON)
        for value, run in runs.items():
            _remove(folders[value] / COMPARISON)
            write_summary(folders[value], summarise(run, tolerance, seed))
        write_json(to / TABLE, result)
        _show_swap(result, list(runs))
        say(f"written to {to}: {TABLE}, and summary.json of each value")
    return _failures(failed)


def _show_swap(result: Mapping[str, Any], fed: Sequence[str]) -> None:
    key = layout.plain(result["key"])
    names = list(result["rows"])
    rows = list(result["rows"].values())
    columns = []
    for value in fed:
        head = "\n".join(layout.fold(value, layout.NAMES))
        if len(fed) > WITH_INTERVALS:
            columns.append(Column(head, [layout.number(r[value]["mean"], 3) for r in rows]))
        else:
            columns.append(layout.means(head, [r[value] for r in rows], 3))
    title = f"mean Dice by true (rows) and fed {key} (columns)"
    title += "" if len(fed) > WITH_INTERVALS else ", below it the 95 % interval over subjects"
    layout.show(title, f"true {key}", names, columns)
    _show_differences(result["differences"])
    values = sorted(result["sensitivity"].items(), key=lambda x: -x[1])
    if values:
        mean = sum(v for _, v in values) / len(values)
        say(f"sensitivity to {key} (1 - Dice between fed values): mean {mean:.3f}; highest:")
        for name, v in values[:3]:
            say(f"  {v:.3f}  {layout.plain(name)}")


def _show_differences(differences: Mapping[str, Mapping[str, Any]]) -> None:
    pairs = [(true, value, c) for true, row in differences.items() for value, c in row.items() if c]
    if not pairs:
        return
    if len(pairs) > DIFFERENCES:
        say(f"{len(pairs)} paired differences between fed values are in {TABLE}")
        return
    cells = [f"{layout.number(c['difference'], 3, True)}\n{layout.interval(c, 3, True)}"
             for *_, c in pairs]  # fmt: skip
    columns = [
        Column("pairs\n(subjects)", [f"{c['n']} ({c['subjects']})" for *_, c in pairs]),
        Column("difference\n[95 %]", layout.aligned(cells)),
        Column("p\n(true > other)", [layout.p_value(c["p_greater"]) for *_, c in pairs]),
        Column("p\n(true ≠ other)", [layout.p_value(c["p_two_sided"]) for *_, c in pairs]),
    ]
    names = [f"{true} - {value}" for true, value, _ in pairs]
    layout.show(
        "Dice when fed the true value minus when fed another", "true - other", names, columns
    )
