"""The pictures of a trial's page, narrow enough for a telephone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..reports.figures import (
    COLOURS,
    TALLEST,
    text,
)
from .scores import CONDITIONED, UNCONDITIONED

WIDTH = 5.6
"""Inches of a picture: 10 points stay readable where it is scaled to 370 pixels."""

ROW = 0.34
"""Inches of a row of a forest plot."""


@dataclass(frozen=True)
class Row:
    """A row of a forest plot: a difference with its interval, or a heading without."""

    name: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    heading: bool = False


def forest(rows: Sequence[Row], margin: float, whole: Mapping[str, Any] | None = None) -> Figure:
    """Differences with 95 % intervals against 0 and the margin.

    Args:
        margin: smallest difference worth having; the range from 0 to it is shaded.
        whole: the difference over all cases, a dotted line.
    """
    height = min(ROW * len(rows) + 0.9, TALLEST)
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(0, margin, color="0.92", label=f"0 to the margin of {margin:g}")
    axes.axvline(0, color="0.2", linewidth=1)
    if whole is not None:
        axes.axvline(whole["mean"], color=COLOURS[0], linestyle=":", linewidth=1.2)
    for i, row in enumerate(rows):
        if row.mean is None:
            continue
        colour = COLOURS[0] if row.high is None or row.high >= 0 else COLOURS[1]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [i, i], color=colour, linewidth=2)
        axes.plot([row.mean], [i], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [text(r.name) for r in rows], fontsize=9)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if row.heading else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.08)
    axes.set_xlabel("difference of Dice (right of 0: better with metadata)", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", alpha=0.3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def chance(results: Mapping[str, Any]) -> Figure:
    """Differences of the training runs beside those of the cases, each a dot, with the mean."""
    points = results["points"]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    runs = [p["difference"] for p in points["networks"]]
    cases = [p["difference"] for p in points["cases"]]
    for x, values, colour in ((0, runs, COLOURS[1]), (1, cases, COLOURS[0])):
        at = x + rng.uniform(-0.18, 0.18, len(values))
        axes.scatter(at, values, s=18, color=colour, alpha=0.6, linewidths=0)
    axes.axhline(0, color="0.2", linewidth=1)
    axes.axhline(results["primary"]["mean"], color="0.2", linestyle=":", linewidth=1.2)
    names = (
        f"{len(runs)} training runs\n(mean of a fold's cases)",
        f"{len(cases)} cases\n(mean of seeds)",
    )
    axes.set_xticks([0, 1], names)
    axes.set(xlim=(-0.5, 1.5), ylabel="difference of Dice")
    axes.grid(axis="y", alpha=0.3)
    return figure


def reliability(calibration: Mapping[str, Any]) -> Figure:
    """Share of the label by predicted probability in both arms; a panel for each label, six at most."""
    labels = list(calibration["labels"][CONDITIONED])[:6]
    columns = min(2, len(labels))
    rows = -(-len(labels) // columns)
    size = (WIDTH if columns == 2 else 3.6), 2.9 * rows + 0.5
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(labels) :]:
        axes.set_axis_off()
    for axes, label in zip(grid, labels, strict=False):
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
        for arm, colour, marker in (
            (CONDITIONED, COLOURS[0], "o"),
            (UNCONDITIONED, COLOURS[1], "s"),
        ):
            found = calibration["labels"][arm].get(label)
            if found is not None:
                _, p, share = zip(*found["bins"], strict=True)
                name = "with metadata" if arm == CONDITIONED else "without"
                axes.plot(p, share, marker + "-", color=colour, markersize=4, label=name)
        axes.set_title(text(label), fontsize=10)
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect=1)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("predicted probability", fontsize=9)
    figure.supylabel("share of the label", fontsize=9)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=2, fontsize=9)
    return figure


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Validation Dice by step of each arm: mean over its runs, and the range between them."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes: Axes = figure.subplots()
    for i, (arm, points) in enumerate(found.items()):
        if not points:
            continue
        steps = [p["step"] for p in points]
        colour = COLOURS[i % len(COLOURS)]
        axes.fill_between(steps, [p["low"] for p in points], [p["high"] for p in points],
                          color=colour, alpha=0.15, linewidth=0)  # fmt: skip
        axes.plot(steps, [p["mean"] for p in points], ".-", color=colour, label=text(arm))
    axes.set(xlabel="step", ylabel="validation Dice")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    return figure
