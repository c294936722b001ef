"""Summaries of an experiment's units: means over splits, paired comparisons, tables beside the paper's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fastfilm.segmentation.evaluation.statistics import compare

from .designs import CONDITIONS, FEW, LONGER, SEEDS

Row = dict[str, Any]

PAPER = {
    "1": {
        "rows": "tumour type given / not given, Dice %: astrocytoma 57.8 / 53.3, ependymoma 57.7 / 57.2,"
        " hemangioblastoma 61.7 / 51.2, all 59.1 ± 2.3 / 54.0 ± 2.2",
        "swap": {
            "names": ["astrocytoma", "ependymoma", "hemangioblastoma"],
            "dice": [[57.9, 57.3, 32.2], [57.6, 57.7, 35.9], [41.5, 41.8, 61.7]],
        },
    },
    "2": {
        "rows": "liver / spleen / kidney, Dice %: missing as background 50.3 / 35.6 / 39.2, one network per"
        " organ 95.1 / 91.7 / 90.4, FiLM 94.1 / 92.2 / 90.7"
    },
    "3": {
        "rows": "gain of FiLM over the single-organ network: 11.5 / 16.7 / 5.5 / 4.7 points at 2 / 4 / 6 / 8"
    },
    "ablation": {"rows": ""},
}
"""What Lemay et al. (MIDL 2021) report, in Dice points."""

BASELINES = {"1": "constant", "2": "single", "3": "single", "ablation": "all layers (base)"}
"""The condition that the others are compared with."""


def summarise(experiment: str, units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything that tables and figures show, as plain JSON.

    Dice is in points (0 to 100). Differences are paired by case, label and split; their interval is a bootstrap
    over subjects, p is Wilcoxon's signed-rank test, one-sided (this condition higher) and two-sided.
    """
    blocks = []
    for key, found in _blocks(units).items():
        data, metadata, few = key
        conditions = [c for c in CONDITIONS[experiment] if c in found]
        values = {c: _own(found[c]) for c in conditions}
        base = BASELINES[experiment]
        seconds = {c: float(np.mean([u["seconds"] for u in found[c]])) for c in conditions}
        blocks.append(
            {
                "data": data,
                "key": metadata,
                "few": few,
                "labels": sorted({k[1] for v in values.values() for k in v}),
                "conditions": {
                    c: {**_means(values[c]), "seconds": round(seconds[c], 1)} for c in conditions
                },
                "against": base,
                "differences": {
                    c: d
                    for c in conditions
                    if c != base
                    and base in values
                    and (d := _difference(values[c], values[base])) is not None
                },
                "further": _further(experiment, values),
                "swap": _swap(found.get("true", []))
                if experiment == "1" and metadata != "contrast"
                else None,
                "paths": _paths(values) if experiment == "ablation" else None,
            }
        )
    return {"experiment": experiment, "paper": PAPER[experiment], "blocks": blocks}


def _blocks(
    units: Iterable[dict[str, Any]],
) -> dict[tuple[str, str, int], dict[str, list[dict[str, Any]]]]:
    found: dict[Any, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for u in units:
        unit = u["unit"]
        found[unit["data"], unit["key"], unit["few"]][unit["condition"]].append(u)
    return found


Key = tuple[int, str, str, str]
"""Split, label, case, metadata fed (of a contrast)."""


def _own(units: Iterable[dict[str, Any]]) -> dict[Key, tuple[str, float]]:
    """(subject, Dice points) of each case under its own metadata (whatever that is in a condition)."""
    found = {}
    for u in units:
        swapped = u["unit"]["condition"] in ("true", "base")
        for c in u["cases"]:
            if c["dice"] is None or (swapped and c["fed"] != c["true"]):
                continue
            contrast = c["fed"] if u["unit"]["key"] == "contrast" else ""
            found[u["unit"]["split"], c["label"], c["case"], contrast] = (
                c["subject"],
                100 * c["dice"],
            )
    return found


def _means(values: dict[Key, tuple[str, float]]) -> Row:
    """Mean over splits of the split's mean, and the deviation over splits; for each label and over the labels."""

    def over(keys: list[Key]) -> Row:
        splits = sorted({k[0] for k in keys})
        means = [np.mean([values[k][1] for k in keys if k[0] == s]) for s in splits]
        deviation = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
        return {
            "mean": round(float(np.mean(means)), 2),
            "std": round(deviation, 2),
            "splits": [round(float(m), 2) for m in means],
            "cases": len(keys),
        }

    labels = sorted({k[1] for k in values})
    rows = {label: over([k for k in values if k[1] == label]) for label in labels}
    # every label counts the same
    splits = np.mean([rows[label]["splits"] for label in labels], axis=0)
    whole = {
        "mean": round(float(np.mean(splits)), 2),
        "std": round(float(np.std(splits, ddof=1)), 2) if len(splits) > 1 else 0.0,
        "splits": [round(float(s), 2) for s in splits],
    }
    return {"labels": rows, "all": whole}


def _difference(a: dict[Key, tuple[str, float]], b: dict[Key, tuple[str, float]]) -> Row | None:
    keys = sorted(a.keys() & b.keys())
    found = compare([a[k][1] for k in keys], [b[k][1] for k in keys], [a[k][0] for k in keys])
    if found is None or found.low is None or found.high is None:
        # one subject has no interval
        return None
    return {
        "n": found.n,
        "difference": round(found.difference, 2),
        "low": round(found.low, 2),
        "high": round(found.high, 2),
        "p_greater": found.p_greater,
        "p_two_sided": found.p_two_sided,
    }


_PAIRS = {
    "1": [("true", "plain"), ("true", "shuffled"), ("true", "concatenated")],
    "2": [
        ("mask + FiLM", "mask"),
        ("mask + FiLM", "FiLM"),
        ("mask + FiLM", "missing as background"),
        (f"mask + FiLM{LONGER}", f"mask{LONGER}"),
        (f"mask + FiLM{LONGER}", f"FiLM{LONGER}"),
    ],
}


def _further(experiment: str, values: dict[str, dict[Key, tuple[str, float]]]) -> dict[str, Row]:
    return {
        f"{a} - {b}": d
        for a, b in _PAIRS.get(experiment, [])
        if a in values and b in values and (d := _difference(values[a], values[b])) is not None
    }


def _paths(values: dict[str, dict[Key, tuple[str, float]]]) -> Row | None:
    """Networks of several seeds by the fused path and by plain PyTorch; a network's mean is one value."""
    networks: dict[str, dict[str, float]] = {}
    for path, conditions in SEEDS.items():
        networks[path] = {
            f"{i}, split {split}": v
            for i, c in enumerate(conditions)
            if c in values
            for split, v in enumerate(_means(values[c])["all"]["splits"])
        }
    same = sorted(networks["fused"].keys() & networks["eager"].keys())
    a, b = ([networks[path][k] for k in same] for path in ("fused", "eager"))
    found = compare(a, b, same)
    if found is None or found.low is None or found.high is None:
        return None
    rows = {
        path: {"mean": round(float(np.mean(x)), 2), "std": round(float(np.std(x, ddof=1)), 2)}
        for path, x in (("fused", a), ("eager", b))
    }
    return {
        **rows,
        "networks": found.n,
        "difference": round(found.difference, 2),
        "low": round(found.low, 2),
        "high": round(found.high, 2),
        "p_two_sided": found.p_two_sided,
    }


def _swap(units: Sequence[dict[str, Any]]) -> Row | None:
    """Mean Dice by true (rows) and fed (columns) value, and the paired gain of the true one."""
    if not units:
        return None
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    pairs: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    subject = {}
    for u in units:
        for c in u["cases"]:
            if c["dice"] is None:
                continue
            found[c["true"], c["fed"]].append(100 * c["dice"])
            at = (u["unit"]["split"], c["case"])
            subject[at] = c["subject"]
            kind = "true" if c["true"] == c["fed"] else c["fed"]
            pairs[at][kind] = 100 * c["dice"]
    names = sorted({t for t, _ in found})
    own, others, who = [], [], []
    for at, dice in pairs.items():
        rest = [v for k, v in dice.items() if k != "true"]
        if "true" in dice and rest:
            own.append(dice["true"])
            others.append(float(np.mean(rest)))
            who.append(subject[at])
    gain = compare(own, others, who)
    table = [[round(float(np.mean(found[t, f])), 2) for f in names] for t in names]
    return {
        "names": names,
        "dice": table,
        "diagonal_on_top": all(row[i] == max(row) for i, row in enumerate(table)),
        "own_against_others": None
        if gain is None or gain.low is None or gain.high is None
        else {
            "difference": round(gain.difference, 2),
            "low": round(gain.low, 2),
            "high": round(gain.high, 2),
            "p_greater": gain.p_greater,
        },
    }


def title(block: Row) -> str:
    """Of a block's table or picture."""
    parts = [block["data"] + (" (synthetic)" if block["data"] == "phantom" else "")]
    parts += [block["key"].replace("_", " ")] if block["key"] else []
    parts += [f"{block['few']} annotated subjects"] if block["few"] else []
    return ", ".join(parts)


def p_text(p: float) -> str:
    """Two figures, or a bound."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def p_value(p: float) -> str:
    """``p_text`` in a sentence."""
    return f"p {p_text(p)}" if p < 0.001 else f"p = {p_text(p)}"


def text(experiment: str, summary: Row) -> str:
    """Tables in Markdown, the paper's row above."""
    lines = [f"The paper: {summary['paper']['rows']}."] if summary["paper"]["rows"] else []
    if experiment == "3":
        return "\n".join([*lines, *_few_text(summary)])
    for block in summary["blocks"]:
        lines += ["", f"### {title(block)}", ""]
        lines += _table(block)
        for name, d in block["further"].items():
            lines += ["", f"{name}: {_gain(d)}."]
        if block["swap"] is not None:
            lines += ["", *_swap_text(block["swap"])]
        if block.get("paths") is not None:
            lines += ["", _paths_text(block["paths"])]
    return "\n".join(lines)


def _gain(d: Row) -> str:
    return (
        f"{_interval(d)}, {p_value(d['p_greater'])} one-sided,"
        f" {p_value(d['p_two_sided'])} two-sided, {d['n']} pairs"
    )


def _table(block: Row) -> list[str]:
    labels = block["labels"] if len(block["labels"]) > 1 else []
    head = [
        "condition",
        *labels,
        "Dice %",
        f"against {block['against']}",
        "p one-sided",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, c in block["conditions"].items():
        cells = [name]
        cells += [
            f"{c['labels'][x]['mean']:.1f} ± {c['labels'][x]['std']:.1f}"
            if x in c["labels"]
            else "-"
            for x in labels
        ]
        cells.append(_level(block, name))
        d = block["differences"].get(name)
        cells += (
            [
                _interval(d),
                p_value(d["p_greater"])[2:],
            ]
            if d
            else ["-", "-"]
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _paths_text(d: Row) -> str:
    fused, eager = d["fused"], d["eager"]
    return (
        f"The same network trained {d['networks']} times (3 seeds a split) by each path: fused {fused['mean']:.1f}"
        f" ± {fused['std']:.1f}, plain PyTorch {eager['mean']:.1f} ± {eager['std']:.1f}; {_interval(d)},"
        f" {p_value(d['p_two_sided'])} two-sided over networks."
    )


def _swap_text(swap: Row) -> list[str]:
    names = swap["names"]
    lines = ["| true \\ fed | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for name, row in zip(names, swap["dice"], strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{v:.1f}" for v in row) + " |")
    g = swap["own_against_others"]
    if g is not None:
        lines += [
            "",
            f"True value against the mean of the others: {g['difference']:+.1f}"
            f" [{g['low']:+.1f}, {g['high']:+.1f}], {p_value(g['p_greater'])}.",
        ]
    return lines


def ratio_text(ratio: Row) -> str:
    """Of ``train.eager_ratio``."""
    low, high = ratio["quartiles"]
    return (
        f"Wall-clock of a training step, plain PyTorch over the fused path, paired: {ratio['median']:.2f}"
        f" [{low:.2f}, {high:.2f}] (median and quartiles of {ratio['rounds']} rounds)."
    )


def _level(block: Row, condition: str) -> str:
    """Mean ± deviation over splits."""
    found = block["conditions"].get(condition)
    return "-" if found is None else f"{found['all']['mean']:.1f} ± {found['all']['std']:.1f}"


def _interval(d: Row) -> str:
    return f"{d['difference']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}]"


def _few_text(summary: Row) -> list[str]:
    lines = []
    for data in dict.fromkeys(b["data"] for b in summary["blocks"]):
        blocks = {b["few"]: b for b in summary["blocks"] if b["data"] == data}
        label = next(iter(blocks.values()))["labels"][0]
        lines += ["", f"### {data}: {label}", ""]
        joint = [c for c in CONDITIONS["3"] if c != "single"]
        head = ["annotated subjects", "single"]
        for c in joint:
            head += [c, "gain", "p one-sided"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for few in (n for n in FEW if n in blocks):
            b = blocks[few]
            cells = [str(few), _level(b, "single")]
            for c in joint:
                d = b["differences"].get(c)
                gain = "-" if d is None else _interval(d)
                cells += [_level(b, c), gain, "-" if d is None else p_text(d["p_greater"])]
            lines.append("| " + " | ".join(cells) + " |")
    return lines
