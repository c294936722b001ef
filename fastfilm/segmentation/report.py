"""One HTML file that needs nothing else: curves, tables, overlays, comparisons, swapped and inspected metadata."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

import fastfilm

from . import figures
from .errors import UserError
from .evaluation import metric_of, read_summary
from .files import read_json, write_text
from .inspection import inspect
from .metrics import METRICS
from .model_folder import load_model
from .record import read_log

SHOWN = ("Dice", "IoU", "HD95", "NSD", "volume_error", "lesion_F1")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.6em } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .8em; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
tr:nth-child(even) { background: #f5f5f5 } img { max-width: 100% } p.note { color: #555; font-size: .9em }
"""


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
        UserError: nothing to report, or a folder that is not what it should be.
    """
    sections: list[str] = []
    folder = out

    def picture(name: str, figure: Figure | None, note: str) -> None:
        if figure is None:
            return
        path = folder / f"{name}.png"
        figures.save(figure, path)
        data = base64.b64encode(path.read_bytes()).decode()
        note = html.escape(note)
        sections.append(
            f'<p class="note">{note}</p><img alt="{note}" src="data:image/png;base64,{data}">'
        )

    if model is not None:
        sections.append("<h2>Model</h2>" + _model(model))
        log = read_log(model)
        if log:
            sections.append("<h2>Training</h2>")
            picture(
                "training", figures.training_curves(log), "By epoch; the dotted line is the best."
            )
    if evaluated is not None:
        summary = read_summary(evaluated)
        sections.append("<h2>Evaluation</h2>" + _summary(summary))
        picture(
            "overlays",
            figures.overlays(summary),
            "From the worst to the best case. Solid: truth, dashed: prediction; the slice with most of both.",
        )
        sections.append("<h2>Cases</h2>" + _cases(summary))
        if compared is not None:
            a, b = metric_of(summary), metric_of(read_summary(compared))
            if not set(a) & set(b):
                raise UserError(f"{compared}: no case and label in common with {evaluated}")
            sections.append("<h2>Comparison</h2>")
            names = (evaluated.resolve().name, compared.resolve().name)
            picture(
                "comparison", figures.paired_scatter(a, b, names), "The same cases in two runs."
            )
    if swapped is not None:
        result = read_json(swapped / "swap_table.json")
        sections.append(f"<h2>Swapped {html.escape(result['key'])}</h2>")
        picture(
            "swap",
            figures.swap_heat_map(result),
            "Mean Dice of the cases of a row when the model is told the value of a column;"
            " brackets: 95 % interval. The values that are true are in bold.",
        )
        sections.append(_sensitivity(result["sensitivity"]))
    if model is not None and load_model(model).encoder.size:
        sections.append("<h2>What the metadata do</h2>")
        for found in inspect(load_model(model)):
            picture(
                f"film_{found.key}", figures.film_heat_maps(found), "γ and β by layer and channel."
            )
            picture(f"components_{found.key}", figures.film_components(found), "γ and β by value.")
    if not sections:
        raise UserError("nothing to report: give --model, --evaluated or --swapped")
    body = "\n".join(sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>fastfilm report</title>'
        f"<style>{STYLE}</style></head><body><h1>fastfilm report</h1>"
        f'<p class="note">fastfilm {fastfilm.__version__}</p>{body}</body></html>\n'
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; every cell is escaped."""

    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    return "<table>" + row(head, "th") + "".join(row(r, "td") for r in rows) + "</table>"


def _model(folder: Path) -> str:
    info = load_model(folder).info
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
    rows += [(k.replace("_", " "), f"{v:.4g}" if isinstance(v, float) else v)
             for k, v in info.training.items()]  # fmt: skip
    return table(("", ""), rows)


def _summary(summary: Mapping[str, Any]) -> str:
    head = ["label", "group", "cases"]
    for m in SHOWN:
        unit = METRICS[m] or (f"at {summary['tolerance_mm']:g} mm" if m == "NSD" else "")
        head.append(m.replace("_", " ") + (f" ({unit})" if unit else ""))
    rows = []
    for detail in summary["labels"].values():
        groups = [("all", detail["metrics"])]
        for key, values in detail["groups"].items():
            if len(values) > 1:
                groups += [(f"{key} = {v}", m) for v, m in values.items()]
        for name, metrics in groups:
            n = metrics["volume_error"]["n"]
            cells = [_interval(metrics[m], 2 if METRICS[m] else 3) for m in SHOWN]
            rows.append([detail["name"], name, n, *cells])
    mean = summary["foreground_mean"]["Dice"]
    note = "Mean and 95 % bootstrap interval over subjects. " + summary["conventions"]
    shown = "not defined" if mean is None else f"{mean:.3f}"
    return (
        f"<p>Mean Dice over labels: <b>{shown}</b></p>"
        + table(head, rows)
        + f'<p class="note">{html.escape(note)}</p>'
    )


def _interval(mean: Mapping[str, Any], digits: int) -> str:
    if mean["mean"] is None:
        return "-"
    return f"{mean['mean']:.{digits}f} [{mean['low']:.{digits}f}, {mean['high']:.{digits}f}]"


def _cases(summary: Mapping[str, Any]) -> str:
    rows = []
    for case in summary["metric_per_case"]:
        for value, m in case["metrics"].items():
            cells = ["-" if m[k] is None else f"{m[k]:.{2 if METRICS[k] else 3}f}" for k in SHOWN]
            rows.append([case["case"], summary["labels"][value]["name"], *cells])
    rows.sort(key=lambda r: (r[2] != "-", r[2]))
    head = [m.replace("_", " ") + (f" ({METRICS[m]})" if METRICS[m] else "") for m in SHOWN]
    return (
        f"<details><summary>{len(rows)} rows, worst Dice first</summary>"
        + table(["case", "label", *head], rows)
        + "</details>"
    )


def _sensitivity(values: Mapping[str, float]) -> str:
    if not values:
        return ""
    rows = [(k, f"{v:.3f}") for k, v in sorted(values.items(), key=lambda x: -x[1])]
    return (
        "<details><summary>Sensitivity of each case: 1 - Dice between its predictions under different values"
        "</summary>" + table(("case/label", "sensitivity"), rows) + "</details>"
    )
