"""OUT/report.html of a trial: the answer first, then what it rests on, in one file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import fastfilm

from ..evaluation.metrics import METRICS
from ..reports.html_page import (
    STYLE,
    Page,
    table,
)
from ..reports.layout import (
    NONE,
    number,
    p_value,
)
from ..support.files import write_text
from . import pictures
from .methods import MEANING, counted, methods, steps
from .pictures import Row
from .scores import CONDITIONED, UNCONDITIONED
from .statistics import Needed
from .verdict import Verdict, ends, group_name, needed_text, signed, verdict

PAGE = "report.html"

OWN_STYLE = """
p.answer { font-size: 1.5em; line-height: 1.3; font-weight: 600; padding: .6em .8em; background: #f5f5f5;
  border-left: .3em solid }
p.use { border-color: #009e73 } p.not { border-color: #d55e00 } p.open { border-color: #e69f00 }
p.methods { background: #f5f5f5; padding: .8em; overflow-wrap: anywhere }
p, li { overflow-wrap: anywhere; max-width: 48em } ul { padding-left: 1.2em } li { margin: .4em 0 }
img { height: auto } h2 { font-size: 1.25em } summary { cursor: pointer }
td.name, th.name { min-width: 10em; max-width: 24em }
"""

CLASSES = {"use it": "use", "do not": "not", "cannot tell yet": "open"}

LEVELS = {"warning": "Warning", "look": "Look at this", "fine": "Fine"}
"""Of the audit's findings, the worst first."""


def write_page(out: Path, results: Mapping[str, Any], audit: Mapping[str, Any] | None) -> Path:
    """Writes OUT/report.html.

    Args:
        results: of ``results.collect``.
        audit: what audit.json holds; None: there was no audit.

    Raises:
        UserError: the file cannot be written.
    """
    page, found = Page(), verdict(results)
    _answer(page, found)
    _effect(page, results)
    _labels(page, results)
    _groups(page, results)
    _swaps(page, results)
    _calibration(page, results)
    _chance(page, results)
    _curves(page, results)
    if audit is not None:
        _audit(page, audit)
    _notes(page, results)
    _design(page, results)
    page.title("For the methods section")
    page.sections.append(f'<p class="methods">{html.escape(methods(results))}</p>')
    title = "Does the metadata help?"
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{OWN_STYLE}</style></head><body><h1>{title}</h1>"
        f"{chr(10).join(page.sections)}"
        f'<p class="note">fastfilm {fastfilm.__version__}</p></body></html>\n'
    )
    write_text(out / PAGE, text)
    return out / PAGE


def _paragraph(page: Page, text: str) -> None:
    page.sections.append(f"<p>{html.escape(text)}</p>")


def _bullets(page: Page, lines: Iterable[str]) -> None:
    page.sections.append("<ul>" + "".join(f"<li>{html.escape(x)}</li>" for x in lines) + "</ul>")


def _folded(page: Page, summary: str, content: str) -> None:
    page.sections.append(f"<details><summary>{html.escape(summary)}</summary>{content}</details>")


def _answer(page: Page, found: Verdict) -> None:
    first, *rest = found.sentences
    page.sections.append(f'<p class="answer {CLASSES[found.answer]}">{html.escape(first)}</p>')
    _bullets(page, rest)
    page.note(f"Why this answer: {'; '.join(found.reasons)}.")


def _row(name: str, row: Mapping[str, Any]) -> Row:
    return Row(name, row["mean"], row["low"], row["high"])


def _effect(page: Page, results: Mapping[str, Any]) -> None:
    page.title("The effect")
    margin = results["design"]["margin"]
    rows = {f"{CONDITIONED} - {UNCONDITIONED}": results["primary"]}
    rows |= {f"{CONDITIONED} - {arm}": row for arm, row in results["against"].items()}
    rows |= results["pairs"]
    _paragraph(
        page,
        "Dice says how far a segmentation and the truth overlap: 0 not at all, 1 fully. Every case was"
        " segmented by networks that had not seen it in training; each row is the mean difference on the same"
        f" cases. A difference of {margin:g} is the smallest that was called worth having before the trial.",
    )
    about = (
        "Dice with metadata minus Dice of another arm: mean (dot) and 95 % interval (line). Grey: from 0 to"
        f" the margin of {margin:g}. An interval right of 0 is a gain that chance does not explain; one left of"
        " the margin excludes a gain worth having."
    )
    shown = [_row(name, row) for name, row in rows.items()]
    page.picture("effect", pictures.forest(shown, margin), about)
    cells = [
        [
            name,
            signed(row["mean"]),
            ends(row),
            p_value(row["p"]),
            p_value(row["p_holm"]) if "p_holm" in row else NONE,
            f"{row['higher']:.0%} / {row['lower']:.0%}",
        ]
        for name, row in rows.items()
    ]
    head = ["difference of Dice", "mean", "95 % interval", "p", "p (Holm)", "cases better / worse"]
    page.sections.append(table(head, cells))
    page.note(
        "The first row is the primary comparison. p (Holm) is corrected for the number of further arms."
    )
    arms = [
        [
            arm,
            MEANING.get(arm, ""),
            number(a["mean"], 3),
            number(a["spread_seeds"], 3),
            number(a["spread_cases"], 3),
        ]
        for arm, a in results["arms"].items()
    ]
    head = ["arm", "networks", "mean Dice", "deviation\nof seeds", "deviation\nof cases"]
    page.sections.append(table(head, arms, names=2))
    if results["secondary"]:
        rows_ = []
        for metric, row in results["secondary"].items():
            unit = f" ({METRICS[metric]})" if METRICS[metric] else ""
            digits = 2 if METRICS[metric] else 3
            rows_.append(
                [
                    f"{metric}{unit}, {row['better']} is better",
                    *(number(row[arm], digits) for arm in (CONDITIONED, UNCONDITIONED)),
                    signed(row["mean"], digits),
                    ends(row, digits),
                    p_value(row["p_holm"]),
                ]
            )
        head = ["further metric", "with", "without", "difference", "95 % interval", "p (Holm)"]
        page.sections.append(table(head, rows_))


DETAIL = ["with", "without", "difference", "95 % interval", "p (Holm)", "cases", "subjects"]


def _detail(row: Mapping[str, Any]) -> list[Any]:
    return [
        *(number(row[arm], 3) for arm in (CONDITIONED, UNCONDITIONED)),
        signed(row["mean"]),
        ends(row),
        p_value(row["p_holm"]),
        row["cases"],
        row["subjects"],
    ]


def _labels(page: Page, results: Mapping[str, Any]) -> None:
    rows, margin = results["labels"], results["design"]["margin"]
    if len(results["design"]["labels"]) < 2:
        return
    page.title("By label")
    about = "Dice with metadata minus Dice without, by label; dotted: the mean over labels."
    shown = [_row(name, row) for name, row in rows.items()]
    page.picture("labels", pictures.forest(shown, margin, results["primary"]), about)
    cells = [[name, *_detail(row)] for name, row in rows.items()]
    page.sections.append(table(["label", *DETAIL], cells))
    page.note("p (Holm) is corrected for the number of labels.")


def _groups(page: Page, results: Mapping[str, Any]) -> None:
    groups, margin = results["groups"], results["design"]["margin"]
    if not groups:
        return
    page.title("Where it helps and hurts")
    shown, cells = [], []
    for key, found in groups.items():
        shown.append(Row(key, heading=True))
        for name, row in found["groups"].items():
            shown.append(_row(f"{name} (n = {row['cases']})", row))
            cells.append([group_name(key, name, found["binned"]), *_detail(row)])
    about = (
        "Dice with metadata minus Dice without, by group of cases; orange: the interval lies below 0; dotted: all"
        " cases. A group of one subject has no interval."
    )
    page.picture("groups", pictures.forest(shown, margin, results["primary"]), about)
    page.sections.append(table(["group", *DETAIL], cells))
    page.note(
        "Groups were not chosen before the trial and may be small: take them for hints. p (Holm) is corrected"
        f" for the number of groups ({len(cells)}), the intervals are not."
    )
    cluster = results["design"]["cluster"]
    if cluster in groups:
        page.note(
            f"{cluster}: the interval of one value is over its subjects and says nothing of other values."
        )


def _swaps(page: Page, results: Mapping[str, Any]) -> None:
    swaps = results["swaps"]
    if not swaps:
        return
    page.title("What a wrong value does")
    _paragraph(
        page,
        "The networks with metadata segmented every case again with values that are not the case's own, and"
        " without a value. Where that costs nothing, a network does not use the key.",
    )
    for key, found in swaps.items():
        words = {
            True: "the networks use it",
            False: "the networks do not use it",
            None: "whether the networks use it is not clear",
        }
        lines = [f"{key}: {words[found['used']]}."]
        for what, name in (("wrong", "A wrong value"), ("unknown", "No value")):
            row = found[what]
            if row is not None:
                turned = {"low": _minus(row["high"]), "high": _minus(row["low"])}
                lines.append(
                    f"{name} changes Dice by {signed(-row['mean'])} (95 % interval"
                    f" {ends(turned)}, {row['subjects']} subjects)."
                )
        _paragraph(page, " ".join(lines))
        fed = list(dict.fromkeys(v for row in found["rows"].values() for v in row["fed"]))
        cells = [
            [group, row["n"], number(row["true"], 3), *(number(row["fed"][v], 3) for v in fed)]
            for group, row in found["rows"].items()
        ]
        page.sections.append(table([f"true {key}", "cases", "own value", *fed], cells))
    page.note("Mean Dice of the cases of a row, when the network is told the value of a column.")


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _calibration(page: Page, results: Mapping[str, Any]) -> None:
    found = results["calibration"]
    if not found or not found["labels"][CONDITIONED]:
        return
    page.title("Are the probabilities right?")
    about = (
        "Of the voxels with a predicted probability (across), the share that belongs to the label (up). On the"
        " grey line they agree; below it the network is too sure."
    )
    page.picture("calibration", pictures.reliability(found), about)
    rows = [
        ["all cases", *(number(found["error"][arm], 4) for arm in (CONDITIONED, UNCONDITIONED))]
    ]
    for key, groups in found["groups"].items():
        binned = results["groups"].get(key, {}).get("binned", False)
        for name, errors in groups.items():
            cells = [number(errors[arm], 4) for arm in (CONDITIONED, UNCONDITIONED)]
            rows.append([group_name(key, name, binned), *cells])
    page.sections.append(table(["expected calibration error", "with", "without"], rows))
    page.note(
        "The expected calibration error is the mean difference between probability and share over ten bins,"
        " weighted by their voxels, and over labels; 0 is perfect."
    )


def _chance(page: Page, results: Mapping[str, Any]) -> None:
    row = results["primary"]
    page.title("How much is chance")
    about = (
        "Dice with metadata minus Dice without. Left: each pair of networks, the mean over the cases that its fold"
        " holds out; right: each case, the mean over seeds. Dotted: the mean."
    )
    page.picture("chance", pictures.chance(results), about)
    unit = "subjects" if row["clusters"] is None else "clusters"
    cells = [
        ["deviation between subjects", number(row["spread_subjects"], 4)],
        ["deviation between training runs of a fold", number(row["spread_runs"], 4)],
        ["standard error of the mean", number(row["standard_error"], 4)],
        [f"… of {unit} alone", number(row["error_units"], 4)],
        ["… of training runs alone", number(row["error_runs"], 4)],
        ["p, t test", p_value(row["p_t"])],
        ["p, permutation of training runs", p_value(row["p_runs"])],
        [f"p, permutation of {unit}", p_value(row["p_units"])],
        ["smallest p that permutations allow here", p_value(row["p_smallest"])],
        ["95 % interval by t", ends(row)],
        [
            "95 % interval by hierarchical bootstrap",
            ends({"low": row["bootstrap_low"], "high": row["bootstrap_high"]}),
        ],
    ]
    page.sections.append(table(["primary comparison", "value"], cells))
    lines = [
        f"Conditioned against {arm}: {needed_text(Needed(**found), arm)}."
        for arm, found in results["needed"].items()
        if found["subjects"] or found["seeds"]
    ]
    if lines:
        _bullets(page, lines)


def _curves(page: Page, results: Mapping[str, Any]) -> None:
    if not any(results["curves"].values()):
        return
    page.title("Training")
    about = "Validation Dice by step: mean over the runs of an arm, and the range between them."
    page.picture("curves", pictures.curves(results["curves"]), about)


def _audit(page: Page, audit: Mapping[str, Any]) -> None:
    page.title("Audit of the metadata")
    findings = audit["findings"]
    levels = [*LEVELS]
    ranked = sorted(findings, key=lambda f: levels.index(f["level"]) if f["level"] in levels else 0)
    if not findings:
        _paragraph(page, "The audit found nothing to look at.")
        return
    lines = []
    for finding in ranked:
        if finding["level"] != "fine":
            name = LEVELS.get(finding["level"], finding["level"])
            lines.append(f"{name}: {finding['text']} {finding['advice']}")
    if lines:
        _bullets(page, lines)
    else:
        _paragraph(page, f"{counted(len(findings), 'finding')}, none of which needs attention.")
    rows = [
        [
            f["about"],
            LEVELS.get(f["level"], f["level"]),
            f["measure"],
            number(f["value"], 2),
            NONE if f["low"] is None else f"{number(f['low'], 2)} to {number(f['high'], 2)}",
        ]
        for f in ranked
    ]
    head = ["about", "", "measure", "value", "95 % interval"]
    _folded(page, f"All {len(rows)} findings", table(head, rows, names=2))


def _notes(page: Page, results: Mapping[str, Any]) -> None:
    if results["notes"]:
        page.title("Notes")
        _bullets(page, results["notes"])


def _design(page: Page, results: Mapping[str, Any]) -> None:
    design, counts = results["design"], results["counts"]
    page.title("Design")
    rows = [
        ["metadata", ", ".join(f"{k} ({kind})" for k, kind in design["keys"].items())],
        ["labels", ", ".join(design["labels"])],
        ["arms", "\n".join(f"{arm}: {MEANING.get(arm, '')}" for arm in design["arms"])],
        ["cases, subjects", f"{counts['cases']}, {counts['subjects']}"],
        ["folds, seeds", f"{design['folds']}, {', '.join(map(str, design['seeds']))}"],
        ["networks", f"{counts['networks']}, {steps(counts['steps'])} steps each"],
        [
            "clusters",
            NONE if design["cluster"] is None else f"{counts['clusters']} of {design['cluster']}",
        ],
        ["endpoint", design["endpoint"]],
        ["test", design["test"]],
        ["margin, alpha", f"{design['margin']:g}, {design['alpha']:g}"],
        ["SHA-256 of the design", design["sha256"]],
    ]
    page.sections.append(table(["", ""], rows, names=2))
    page.note("The design was written before the first step of training.")
