"""The pictures of reports, as matplotlib figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from .evaluation import load_mask
from .files import atomic
from .inspection import Inspection, principal_components

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Okabe and Ito's, told apart by most colour-blind readers."""


def save(figure: Figure, path: Path) -> None:
    """As PNG, atomically."""
    with matplotlib.rc_context({"savefig.dpi": 110}), atomic(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", facecolor="white")


def training_curves(log: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, Dice of each label and learning rate by epoch."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    loss, dice, rate = figure.subplots(1, 3)
    epochs = [line["epoch"] for line in log]
    loss.plot(epochs, [line["loss"] for line in log], ".-", color=COLOURS[0])
    loss.set(title="training loss", xlabel="epoch", ylabel="loss")
    rate.plot(epochs, [line["learning_rate"] for line in log], ".-", color=COLOURS[0])
    rate.set(title="learning rate (last step of the epoch)", xlabel="epoch", ylabel="learning rate")
    validated = [line for line in log if "dice" in line]
    for i, name in enumerate(sorted({k for line in validated for k in line["dice"]})):
        points = [(v["epoch"], v["dice"][name]) for v in validated if name in v["dice"]]
        dice.plot(*zip(*points, strict=True), ".-", color=COLOURS[i % len(COLOURS)], label=name)
    if validated:
        best = max(validated, key=lambda line: line["dice_mean"])
        dice.axvline(best["epoch"], color="0.6", linestyle=":", label="best")
        dice.legend(fontsize=8)
    dice.set(title="validation Dice", xlabel="epoch", ylabel="Dice", ylim=(0, 1))
    for axes in (loss, dice, rate):
        axes.grid(alpha=0.3)
    return figure


def overlays(summary: Mapping[str, Any], most: int = 6) -> Figure | None:
    """Cases from the worst to the best mean Dice: outlines of truth and prediction on the image.

    None where the images are not known or not there any more.
    """
    cases = [
        c for c in summary["metric_per_case"] if c["image_file"] and Path(c["image_file"]).is_file()
    ]
    if not cases:
        return None
    cases.sort(key=lambda c: _mean_dice(c))
    pick = np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(int))
    columns = min(3, len(pick))
    rows = -(-len(pick) // columns)
    figure = Figure(figsize=(3.8 * columns, 4.2 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    labels = {v: d["name"] for v, d in summary["labels"].items()}
    colour = {v: COLOURS[i % len(COLOURS)] for i, v in enumerate(labels)}
    for axes, i in zip(grid, pick, strict=False):
        _overlay(axes, cases[int(i)], labels, colour)
    handles = [Line2D([], [], color=colour[v], label=n) for v, n in labels.items()]
    handles += [
        Line2D([], [], color="0.2", linestyle="-", label="truth"),
        Line2D([], [], color="0.2", linestyle="--", label="prediction"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    return figure


def paired_scatter(a: Mapping[Any, Any], b: Mapping[Any, Any], names: tuple[str, str]) -> Figure:
    """Dice of each case and label in two runs, and the differences with their mean and 95 % interval."""
    from .statistics import compare

    both = [k for k in a if k in b and a[k][0] is not None and b[k][0] is not None]
    x, y = (np.array([run[k][0] for k in both]) for run in (b, a))
    labels = list(dict.fromkeys(k[1] for k in both))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rng = np.random.default_rng(0)
    for i, label in enumerate(labels):
        at = [j for j, k in enumerate(both) if k[1] == label]
        c = COLOURS[i % len(COLOURS)]
        left.scatter(x[at], y[at], s=18, color=c, alpha=0.7, label=label)
        d = y[at] - x[at]
        right.scatter(i + rng.uniform(-0.15, 0.15, len(at)), d, s=14, color=c, alpha=0.5)
        found = compare(y[at].tolist(), x[at].tolist(), [a[both[j]][1] for j in at])
        if found is not None:
            ends = [[found.difference - found.low], [found.high - found.difference]]
            right.errorbar(
                i + 0.28, found.difference, ends, fmt="o", color=c, capsize=4, markersize=6
            )
    low = min(x.min(), y.min(), 0.9) if len(both) else 0
    left.plot([low, 1], [low, 1], color="0.6", linewidth=1)
    left.set(xlabel=f"Dice, {names[1]}", ylabel=f"Dice, {names[0]}", title="each case", aspect=1)
    left.legend(fontsize=8)
    right.axhline(0, color="0.6", linewidth=1)
    right.set(
        title="difference: cases, mean and 95 % interval",
        ylabel=f"Dice, {names[0]} - {names[1]}",
        xlim=(-0.6, len(labels) - 0.3),
    )
    right.set_xticks(range(len(labels)), labels)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def swap_heat_map(result: Mapping[str, Any]) -> Figure:
    """Dice by true (rows) and fed value (columns), each with its 95 % interval."""
    rows = list(result["rows"])
    columns = list(next(iter(result["rows"].values())))
    mean = np.array([[_none(result["rows"][r][c]["mean"]) for c in columns] for r in rows])
    figure = Figure(
        figsize=(2.2 + 1.7 * len(columns), 1.6 + 0.85 * len(rows)), layout="constrained"
    )
    axes = figure.subplots()
    shown = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            cell = result["rows"][r][c]
            if cell["mean"] is None:
                continue
            text = f"{cell['mean']:.2f}\n[{cell['low']:.2f}, {cell['high']:.2f}]"
            dark = cell["mean"] < 0.55
            axes.text(
                j, i, text, ha="center", va="center", fontsize=9, color="white" if dark else "black",
                fontweight="bold" if r == c else "normal",
            )  # fmt: skip
    counts = [max(result["rows"][r][c]["n"] for c in columns) for r in rows]
    axes.set_xticks(range(len(columns)), columns, rotation=15 if len(columns) > 3 else 0)
    axes.set_yticks(range(len(rows)), [f"{r} (n = {n})" for r, n in zip(rows, counts, strict=True)])
    axes.set(xlabel=f"{result['key']} fed to the model", ylabel=f"true {result['key']}")
    figure.colorbar(shown, ax=axes, label="mean Dice")
    return figure


def film_heat_maps(found: Inspection) -> Figure:
    """γ and β of every layer: rows are values, columns channels."""
    n = len(found.layers)
    high = 0.22 * len(found.values) + 0.62
    figure = Figure(figsize=(11, n * high + 0.9), layout="constrained")
    grid = figure.subplots(n, 2, squeeze=False)
    for column, symbol in enumerate(("gamma", "beta")):
        arrays = [getattr(layer, symbol) for layer in found.layers]
        middle = 1.0 if symbol == "gamma" else 0.0
        reach = max(max(float(np.abs(a - middle).max()) for a in arrays), 1e-6)
        for row, (layer, array) in enumerate(zip(found.layers, arrays, strict=True)):
            axes = grid[row, column]
            shown = axes.imshow(
                array, cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach, aspect="auto",
                interpolation="nearest",
            )  # fmt: skip
            axes.set_title(f"{'γ' if column == 0 else 'β'}, {layer.name}", fontsize=9)
            axes.set_yticks(range(len(found.values)), found.values if column == 0 else [])
            axes.tick_params(labelsize=7)
            if array.shape[1] == 1:
                axes.set_xticks([0])
        grid[-1, column].set_xlabel("channel")
        label = "γ (white: 1)" if column == 0 else "β (white: 0)"
        figure.colorbar(shown, ax=grid[:, column], label=label, shrink=0.8)
    figure.suptitle(f"FiLM coefficients by {found.key}", fontsize=11)
    return figure


def film_components(found: Inspection) -> Figure:
    """Values on the first two principal components of all layers' γ and β, and of each layer's."""
    n = len(found.layers)
    columns = min(4, n + 1)
    rows = -(-(n + 1) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[n + 1 :]:
        axes.set_axis_off()
    each = [np.concatenate([layer.gamma, layer.beta], 1) for layer in found.layers]
    parts = [("all layers", np.concatenate(each, 1))]
    parts += [(layer.name, e) for layer, e in zip(found.layers, each, strict=True)]
    for axes, (title, values) in zip(grid, parts, strict=False):
        at, share = principal_components(values)
        for i, name in enumerate(found.values):
            axes.scatter(*at[i], s=30, color=COLOURS[i % len(COLOURS)], label=name)
        axes.margins(0.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"component 1 ({share[0]:.0%} of variance)", fontsize=7)
        axes.set_ylabel(f"component 2 ({share[1]:.0%})", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(6, len(names)), fontsize=8)
    figure.suptitle(f"γ and β by {found.key}, principal components", fontsize=11)
    return figure


def _none(value: float | None) -> float:
    return np.nan if value is None else value


def _mean_dice(case: Mapping[str, Any]) -> float:
    values = [m["Dice"] for m in case["metrics"].values() if m["Dice"] is not None]
    return float(np.mean(values)) if values else 1.0


def _overlay(
    axes: Any, case: Mapping[str, Any], labels: Mapping[str, str], colour: Mapping[str, str]
) -> None:
    image: Any = nib.as_closest_canonical(nib.load(case["image_file"]))
    voxels = np.asarray(image.dataobj, np.float32)
    voxels = voxels.reshape(voxels.shape[:3])
    spacing = nib.affines.voxel_sizes(image.affine)
    masks = {}
    for value, (prediction, truth, values) in case["files"].items():
        own = case["own_files"]
        masks[value] = (
            _canonical(Path(truth), values),
            _canonical(Path(prediction), None if own else [int(value)]),
        )
    # across the thickest direction, else axial
    axis = int(np.argmax(spacing)) if max(spacing) > 1.5 * np.median(spacing) else 2
    marked = sum(t.astype(int) + p for t, p in masks.values())
    others = tuple(a for a in range(3) if a != axis)
    counts = np.asarray(marked).sum(others)
    index = int(counts.argmax()) if counts.any() else voxels.shape[axis] // 2
    shown = voxels.take(index, axis).T
    low, high = np.percentile(voxels, (1, 99.5))
    aspect = spacing[others[1]] / spacing[others[0]]
    axes.imshow(
        shown, cmap="gray", origin="lower", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect
    )
    for value, (truth, prediction) in masks.items():
        for mask, line in ((truth, "-"), (prediction, "--")):
            flat = mask.take(index, axis).T
            if flat.any():
                axes.contour(flat, [0.5], colors=[colour[value]], linewidths=1.4, linestyles=line)
    position = np.zeros(3)
    position[axis] = index
    mm = nib.affines.apply_affine(image.affine, position)[axis]
    dice = ", ".join(
        f"{labels[v]} {'-' if m['Dice'] is None else format(m['Dice'], '.3f')}"
        for v, m in case["metrics"].items()
    )
    known = ", ".join(str(v) for v in case["metadata"].values() if v is not None)
    title = f"{case['case']}" + (f" ({known})" if known else "")
    axes.set_title(f"{title}, {'xyz'[axis]} = {mm:.0f} mm\nDice {dice}", fontsize=8)
    names = ("L", "R"), ("P", "A"), ("I", "S")
    for (x, y), text in (
        ((0.02, 0.5), names[others[0]][0]),
        ((0.98, 0.5), names[others[0]][1]),
        ((0.5, 0.02), names[others[1]][0]),
        ((0.5, 0.98), names[others[1]][1]),
    ):
        axes.text(
            x,
            y,
            text,
            color="yellow",
            fontsize=8,
            transform=axes.transAxes,
            ha="center",
            va="center",
        )


def _canonical(path: Path, values: Sequence[int] | None) -> NDArray[np.bool_]:
    volume, mask = load_mask(path, values)
    turned = nib.as_closest_canonical(nib.Nifti1Image(mask.astype(np.uint8), volume.affine))
    return np.asarray(turned.dataobj) != 0
