"""``fastfilm evaluate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastfilm.segmentation.console import bar, out, say
from fastfilm.segmentation.counterfactual import sensitivity, swap_table
from fastfilm.segmentation.errors import UserError
from fastfilm.segmentation.evaluation import (
    Evaluated,
    evaluate_pairs,
    find_pairs,
    metric_of,
    read_summary,
    summarise,
    write_summary,
)
from fastfilm.segmentation.files import write_json
from fastfilm.segmentation.metrics import METRICS
from fastfilm.segmentation.statistics import compare
from fastfilm.segmentation.swap import SWAP, read_swap

SHOWN = ("Dice", "IoU", "HD95", "NSD", "volume_error", "lesion_F1")


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
    compare_with: Annotated[
        Path | None,
        typer.Option("--compare", help="evaluated folder of another run on the same cases"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the bootstrap")] = 0,
) -> int:
    """Scores predictions against the truth: summary.json, cases.csv and tables.

    Under predict --swap it prints Dice by true and by fed value.
    """
    if not tolerance > 0:
        raise UserError(f"--tolerance must be above 0 mm, got {tolerance}")
    labels = None if label is None else dict(_label(t) for t in label)
    to = to or predictions
    if (predictions / SWAP).is_file():
        return _swapped(predictions, truth, to, labels, tolerance, seed)
    found, failed = _evaluate(predictions, truth, labels, tolerance)
    if found:
        summary = summarise(found, tolerance, seed)
        other = None if compare_with is None else read_summary(compare_with)
        compared = None if other is None else _compared(summary, other, str(compare_with), seed)
        write_summary(to, summary)
        _show(summary)
        if compared is not None:
            write_json(to / "comparison.json", compared)
            _show_comparison(compared)
        say(f"written to {to}: summary.json, cases.csv")
    return _failures(failed)


def _label(text: str) -> tuple[str, list[int]]:
    name, sign, values = text.partition("=")
    try:
        if not sign:
            raise ValueError
        return name, [int(v) for v in values.split(",")]
    except ValueError:
        raise UserError(f"--label takes NAME=VALUE with whole numbers, got {text!r}") from None


def _evaluate(
    folder: Path, truth: Path | None, labels: Any, tolerance: float
) -> tuple[list[Evaluated], list[str]]:
    pairs = find_pairs(folder, truth, labels)
    with bar(f"evaluating {folder.name}") as progress:
        return evaluate_pairs(pairs, tolerance, progress)


def _failures(failed: list[str]) -> int:
    if not failed:
        return 0
    lines = "\n".join(f"  - {line}" for line in failed)
    print(f"fastfilm evaluate: {len(failed)} failed:\n{lines}", file=sys.stderr)
    return 1


def _number(mean: dict[str, Any], digits: int = 3) -> str:
    if mean["mean"] is None:
        return "-"
    return f"{mean['mean']:.{digits}f} [{mean['low']:.{digits}f}, {mean['high']:.{digits}f}]"


def _show(summary: dict[str, Any]) -> None:
    table = Table(title="mean [95 % interval]", title_justify="left")
    for column in ("label", "group", "cases"):
        table.add_column(column)
    for metric in SHOWN:
        unit = METRICS[metric] or (f"{summary['tolerance_mm']:g} mm" if metric == "NSD" else "")
        name = metric.replace("_", " ")
        table.add_column(f"{name} ({unit})" if unit else name, justify="right", no_wrap=True)
    for detail in summary["labels"].values():
        rows = [("all", detail["metrics"])]
        for key, values in detail["groups"].items():
            if len(values) > 1:
                rows += [(f"{key} = {v}", m) for v, m in values.items()]
        for group, metrics in rows:
            cells = [_number(metrics[m], 2 if METRICS[m] else 3) for m in SHOWN]
            table.add_row(detail["name"], group, str(metrics["volume_error"]["n"]), *cells)
    _print(table)
    mean = summary["foreground_mean"]["Dice"]
    say("mean Dice over labels: " + ("not defined" if mean is None else f"{mean:.4f}"))


def _print(table: Table) -> None:
    # a table that is cut off says nothing: in a log, and on a narrow terminal, it is as wide as it needs to be
    Console(file=out.file, width=max(out.width, 200), highlight=False).print(table)


def _compared(a: dict[str, Any], b: dict[str, Any], name: str, seed: int) -> dict[str, Any]:
    result: dict[str, Any] = {"other": name, "labels": {}}
    for metric in SHOWN:
        ours, theirs = metric_of(a, metric), metric_of(b, metric)
        for label in dict.fromkeys(key[1] for key in ours):
            both = [k for k in ours if k in theirs and k[1] == label]
            x, y = [ours[k][0] for k in both], [theirs[k][0] for k in both]
            found = compare(x, y, [ours[k][1] for k in both], seed)
            if found is not None:
                result["labels"].setdefault(label, {})[metric] = found.to_json()
    if not result["labels"]:
        raise UserError(f"{name}: no case and label in common")
    return result


def _show_comparison(compared: dict[str, Any]) -> None:
    table = Table(title=f"this run (A) and {compared['other']} (B), paired", title_justify="left")
    for column in ("label", "metric", "n", "A", "B", "A - B [95 %]", "p (A > B)", "p (A < B)",
                   "p (A ≠ B)", "rank-biserial"):  # fmt: skip
        table.add_column(column, no_wrap=True)
    for label, metrics in compared["labels"].items():
        for metric, c in metrics.items():
            table.add_row(
                label,
                metric,
                str(c["n"]),
                f"{c['mean_a']:.3f}",
                f"{c['mean_b']:.3f}",
                f"{c['difference']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]",
                *(f"{c[k]:.2g}" for k in ("p_greater", "p_less", "p_two_sided")),
                f"{c['effect']:+.2f}",
            )
    _print(table)


def _swapped(
    predictions: Path, truth: Path | None, to: Path, labels: Any, tolerance: float, seed: int
) -> int:
    swap = read_swap(predictions)
    runs: dict[str, list[Evaluated]] = {}
    failed: list[str] = []
    for fed in swap["fed"]:
        folder = predictions / fed["folder"]
        found, wrong = _evaluate(folder, truth, labels, tolerance)
        failed += [f"{fed['folder']}: {w}" for w in wrong]
        for e in found:
            # groups are by what is true of the case, not by what was fed
            e.pair.metadata = {**e.pair.metadata, swap["key"]: swap["true"].get(e.pair.case)}
        if found:
            runs[fed["value"]] = found
            write_summary(to / fed["folder"], summarise(found, tolerance, seed))
    if runs:
        result = {"key": swap["key"], **swap_table(runs, swap["true"], seed)}
        result["sensitivity"] = sensitivity(
            {
                fed: {
                    f"{e.pair.case}/{e.pair.label.name}": (
                        e.pair.prediction,
                        None if e.pair.own_file else e.pair.label.value,
                    )
                    for e in run
                }
                for fed, run in runs.items()
            }
        )
        write_json(to / "swap_table.json", result)
        _show_swap(result, list(runs))
        say(f"written to {to}: swap_table.json, and summary.json of each value")
    return _failures(failed)


def _show_swap(result: dict[str, Any], fed: list[str]) -> None:
    key = result["key"]
    table = Table(title=f"Dice by true (rows) and fed {key} (columns), mean [95 % interval]",
                  title_justify="left")  # fmt: skip
    table.add_column(f"true {key}")
    for value in fed:
        table.add_column(value, justify="right", no_wrap=True)
    for true, row in result["rows"].items():
        table.add_row(true, *(_number(row[v]) for v in fed))
    _print(table)
    for true, row in result["differences"].items():
        for value, c in row.items():
            if c is not None:
                interval = f"[{c['low']:+.3f}, {c['high']:+.3f}]"
                say(
                    f"{true}: fed {true} - fed {value}: {c['difference']:+.3f} {interval},"
                    f" p = {c['p_greater']:.2g} (one-sided), {c['p_two_sided']:.2g} (two-sided), {c['n']} pairs"
                )
    values = sorted(result["sensitivity"].items(), key=lambda x: -x[1])
    if values:
        mean = sum(v for _, v in values) / len(values)
        most = ", ".join(f"{name} {v:.2f}" for name, v in values[:5])
        say(f"sensitivity to {key} (1 - Dice between fed values): mean {mean:.3f}; highest: {most}")
