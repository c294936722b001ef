"""Figures in the manner of the paper's: bars over conditions, swap tables, curves over few labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from .designs import CONDITIONS, FEW
from .results import title

Row = dict[str, Any]
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee")


def draw(experiment: str, summary: Row, path: Path) -> None:
    """Writes one PNG for an experiment."""
    blocks = [b for b in summary["blocks"] if b["conditions"]]
    if not blocks:
        return
    if experiment == "3":
        _few(blocks, path)
        return
    swaps = [b for b in blocks if b["swap"] is not None and b["key"] == "tumor_type"]
    paper = summary["paper"].get("swap")
    extra = len(swaps) + (paper is not None and bool(swaps))
    columns = max(1, min(3, len(blocks)))
    rows = -(-len(blocks) // columns) + -(-extra // columns)
    width = max(4.4, 0.6 * max(len(b["conditions"]) for b in blocks))
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, 3.3 * rows), squeeze=False, layout="constrained"
    )
    places = list(axes.flat)
    for block in blocks:
        _bars(places.pop(0), block)
    if extra:
        # swap tables begin a row of their own
        while len(places) % columns:
            places.pop(0).set_axis_off()
        for block in swaps:
            _swap(places.pop(0), block["swap"], title(block))
        if paper is not None:
            _swap(places.pop(0), paper, "the paper's tumours")
    for left in places:
        left.set_axis_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Axes, block: Row) -> None:
    conditions = list(block["conditions"])
    labels = block["labels"] if len(block["labels"]) > 1 else ["all"]
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        rows = [
            block["conditions"][c]["all"]
            if label == "all"
            else block["conditions"][c]["labels"].get(label)
            for c in conditions
        ]
        x = np.arange(len(conditions)) + (i - (len(labels) - 1) / 2) * width
        means = [np.nan if r is None else r["mean"] for r in rows]
        stds = [0.0 if r is None else r["std"] for r in rows]
        axes.bar(
            x, means, width * 0.95, yerr=stds, capsize=2, color=COLOURS[i], label=label, zorder=2
        )
        for at, row in zip(x, rows, strict=True):
            if row is not None:
                axes.scatter(
                    [at] * len(row["splits"]),
                    row["splits"],
                    s=7,
                    color="black",
                    alpha=0.5,
                    zorder=3,
                )
    axes.set_xticks(range(len(conditions)), conditions, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("test Dice (%)")
    axes.set_ylim(0, 112 if len(labels) > 1 else 100)
    axes.set_yticks(range(0, 101, 20))
    axes.set_title(title(block), fontsize=10)
    axes.grid(axis="y", alpha=0.3, zorder=0)
    if len(labels) > 1:
        axes.legend(fontsize=7, loc="upper center", ncol=len(labels), frameon=False)


def _swap(axes: Axes, swap: Row, name: str) -> None:
    table = np.array(swap["dice"])
    axes.imshow(table, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for (i, j), v in np.ndenumerate(table):
        weight = "bold" if i == j else "normal"
        axes.text(
            j,
            i,
            f"{v:.1f}",
            ha="center",
            va="center",
            weight=weight,
            color="white" if v < 60 else "black",
        )
    names = swap["names"]
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("type fed")
    axes.set_ylabel("true type")
    axes.set_title(f"test Dice (%): {name}", fontsize=10)


def _few(blocks: list[Row], path: Path) -> None:
    names = list(dict.fromkeys(b["data"] for b in blocks))
    figure, axes = plt.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.0), squeeze=False, layout="constrained"
    )
    for place, name in zip(axes[0], names, strict=True):
        found = {b["few"]: b for b in blocks if b["data"] == name}
        styles = zip(COLOURS, CONDITIONS["3"], "os^", (-0.12, 0.0, 0.12), strict=False)
        for colour, condition, mark, shift in styles:
            few = [n for n in FEW if n in found and condition in found[n]["conditions"]]
            rows = [found[n]["conditions"][condition]["all"] for n in few]
            place.errorbar(
                np.array(few) + shift,
                [r["mean"] for r in rows],
                [r["std"] for r in rows],
                marker=mark,
                capsize=3,
                color=colour,
                label=condition
                if condition == "single"
                else condition.replace("FiLM", "FiLM, with 12 of the other", 1),
            )
        place.set_xticks(list(FEW))
        place.set_xlabel("subjects with this label")
        place.set_ylabel("test Dice (%)")
        place.set_title(f"{name}: {next(iter(found.values()))['labels'][0]}", fontsize=10)
        place.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncol=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
