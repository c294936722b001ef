"""One HTML file that needs nothing else: curves, tables, overlays, comparisons, swapped and inspected metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fastfilm

from ..evaluation.comparison import compare_summaries
from ..evaluation.folder import metric_of, read_summary
from ..evaluation.metrics import METRICS
from ..evaluation.true_by_fed import read_table
from ..models.folder import LoadedModel, load_model
from ..support.errors import UserError
from ..support.files import write_text
from ..support.names import file_name
from ..support.records import check_writable
from ..training.record import read_log
from . import figures
from .html_page import (
    STYLE,
    Page,
    table,
)
from .inspection import has_film, inspect
from .layout import (
    DIGITS,
    NONE,
    interval,
    number,
    p_value,
)

SHOWN = ("Dice", "IoU", "HD95", "NSD", "volume_error", "lesion_F1")


def write_report(
    out: Path,
    *,
    model: Path | None = None,
    evaluated: Path | None = None,
    compared: Path | None = None,
    swapped: Path | None = None,
) -> Path:
    """Writes OUT/report.html and its pictures as PNG files.

    Args:
        model: model folder: training curves, γ and β.
        evaluated: folder with summary.json: tables, overlays.
        compared: another such folder, on the same cases.
        swapped: folder with swap_table.json.

    Raises:
        UserError: nothing to report, a folder that is not what it should be, ``out`` cannot be written.
    """
    if compared is not None and evaluated is None:
        raise UserError("--compare needs --evaluated: the run that is compared")
    if model is None and evaluated is None and swapped is None:
        raise UserError("nothing to report: give --model, --evaluated or --swapped")
    check_writable(out)
    summary = None if evaluated is None else read_summary(evaluated)
    other = None if compared is None else read_summary(compared)
    table_of_swaps = None if swapped is None else read_table(swapped)
    loaded = None if model is None else load_model(model)
    page = Page()
    if loaded is not None:
        _model(page, loaded)
    if summary is not None:
        _evaluation(page, summary)
        if other is not None:
            names = (evaluated or out).resolve().name, (compared or out).resolve().name
            _comparison(page, summary, other, names)
    if table_of_swaps is not None:
        _swapped(page, table_of_swaps)
    if loaded is not None:
        _metadata(page, loaded)
    body = "\n".join(page.sections)
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastfilm report</title>'
        f"<style>{STYLE}</style></head><body><h1>fastfilm report</h1>"
        f'<p class="note">fastfilm {fastfilm.__version__}</p>{body}</body></html>\n'
    )
    for name, picture in page.pictures.items():
        figures.write_png(out / name, picture)
    write_text(out / "report.html", text)
    return out / "report.html"


def _model(page: Page, model: LoadedModel) -> None:
    info = model.info
    rows = [
        (
            "network",
            f"{info.network.name}, {info.spatial_dims}D, {info.network.base_filters} filters",
        ),
        ("image channels", ", ".join(info.contrasts)),
        ("labels", ", ".join(label.name for label in info.labels) + f" ({info.output})"),
        ("metadata", ", ".join(f"{k.name} ({k.kind})" for k in info.metadata.keys) or "none"),
        ("patch", " × ".join(map(str, info.patch_size)) + " voxels"),
    ]
    rows += [(k.replace("_", " "), f"{v:.4g}" if isinstance(v, float) else str(v))
             for k, v in info.training.items()]  # fmt: skip
    page.title("Model")
    page.sections.append(table(("", ""), rows, names=2))
    log = read_log(model.folder)
    if log:
        page.title("Training")
        about = "By epoch; the dotted line is the best."
        page.picture("training", figures.training_curves(log), about)


def _evaluation(page: Page, summary: Mapping[str, Any]) -> None:
    page.title("Evaluation")
    mean = summary["foreground_mean"]["Dice"]
    shown = "not defined" if mean is None else f"{mean:.3f}"
    page.sections.append(f"<p>Mean Dice over labels: <b>{shown}</b></p>")
    head = ["label", "group", "cases", "subjects"]
    for m in SHOWN:
        unit = METRICS[m] or (f"at {summary['tolerance_mm']:g} mm" if m == "NSD" else "")
        head.append(_title(m, unit))
    rows = []
    for detail in summary["labels"].values():
        groups = [("all", detail["metrics"])]
        for key, values in detail["groups"].items():
            if len(values) > 1:
                between = " " if key in summary["binned"] else " = "
                groups += [(f"{key}{between}{v}", m) for v, m in values.items()]
        for name, metrics in groups:
            counts = [metrics["volume_error"][n] for n in ("n", "subjects")]
            cells = [_with_interval(metrics[m], "mean", DIGITS[m]) for m in SHOWN]
            rows.append([detail["name"], name, *counts, *cells])
    page.sections.append(table(head, rows, names=2))
    page.note(
        "Mean, and below it the 95 % bootstrap interval over subjects (– for one subject). "
        + summary["conventions"].replace("null", NONE, 1)
        + "."
    )
    for line in summary["notes"]:
        page.note(f"Note: {line}")
    for line in summary["failed"]:
        page.note(f"Not evaluated: {line}")
    figure, said = figures.overlays(summary)
    if figure is not None:
        about = (
            "From the worst to the best case. Solid: truth, dashed: prediction; the slice with most"
            " of both."
        )
        page.picture("overlays", figure, about)
    if said:
        page.note(said)
    page.title("Cases")
    page.sections.append(_cases(summary))


def _title(metric: str, unit: str) -> str:
    name = metric.replace("_", " ")
    return f"{name} ({unit})" if unit else name


def _with_interval(value: Mapping[str, Any], key: str, digits: int, sign: bool = False) -> str:
    if value[key] is None:
        return NONE
    return f"{number(value[key], digits, sign)}\n{interval(value, digits, sign)}"


def _cases(summary: Mapping[str, Any]) -> str:
    rows: list[tuple[float, list[str]]] = []
    for case in summary["metric_per_case"]:
        for value, m in case["metrics"].items():
            cells = [number(m[k], DIGITS[k]) for k in SHOWN]
            name = summary["labels"][value]["name"]
            rows.append((2.0 if m["Dice"] is None else m["Dice"], [case["case"], name, *cells]))
    rows.sort(key=lambda r: r[0])
    head = [_title(m, METRICS[m]) for m in SHOWN]
    return (
        f"<details><summary>{len(rows)} rows, worst Dice first</summary>"
        + table(["case", "label", *head], [cells for _, cells in rows], names=2)
        + "</details>"
    )


def _comparison(
    page: Page, a: Mapping[str, Any], b: Mapping[str, Any], names: tuple[str, str]
) -> None:
    compared = compare_summaries(a, b, names[1], a["bootstrap"]["seed"])
    page.title("Comparison")
    head = ["label", "metric", "pairs", "subjects", "A", "B", "A - B", "p (A > B)", "p (A < B)",
            "p (A ≠ B)", "rank-biserial"]  # fmt: skip
    rows = []
    for label, metrics in compared["labels"].items():
        for m in SHOWN:
            if (c := metrics.get(m)) is None:
                continue
            means = [number(c[k], 3) for k in ("mean_a", "mean_b")]
            means.append(_with_interval(c, "difference", 3, True))
            ps = [p_value(c[k]) for k in ("p_greater", "p_less", "p_two_sided")]
            effect = number(c["effect"], 2, True)
            rows.append([label, _title(m, METRICS[m]), c["n"], c["subjects"], *means, *ps, effect])
    page.sections.append(table(head, rows, names=2))
    page.note(
        f"A: {names[0]}, B: {names[1]}. Pairs of the same case; intervals over subjects, Wilcoxon's"
        " signed-rank test over pairs."
    )
    for line in compared["notes"]:
        page.note(f"Note: {line}")
    figure = figures.paired_scatter(metric_of(a), metric_of(b), names)
    page.picture("comparison", figure, "Dice of the same cases in both runs.")


def _swapped(page: Page, result: Mapping[str, Any]) -> None:
    page.title(f"Swapped {result['key']}")
    about = (
        "Mean Dice of the cases of a row when the model is told the value of a column; brackets:"
        " 95 % interval. The values that are true are in bold."
    )
    page.picture("swap", figures.swap_heat_map(result), about)
    values = sorted(result["sensitivity"].items(), key=lambda x: -x[1])
    if values:
        page.sections.append(
            "<details><summary>Sensitivity of each case: 1 - Dice between its predictions under different"
            " values</summary>"
            + table(("case/label", "sensitivity"), [(k, number(v, 3)) for k, v in values])
            + "</details>"
        )


def _metadata(page: Page, model: LoadedModel) -> None:
    if not model.encoder.size:
        return
    page.title("What the metadata do")
    if not has_film(model):
        page.note("The network has no FiLM layers.")
        return
    for found in inspect(model):
        key = file_name(found.key)
        page.picture(
            f"film_{key}",
            figures.film_heat_maps(found),
            f"γ and β of {found.key} by layer and channel.",
        )
        page.picture(
            f"components_{key}", figures.film_components(found), f"γ and β by {found.key}."
        )
