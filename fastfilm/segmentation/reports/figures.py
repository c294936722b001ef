"""The pictures of reports, as matplotlib figures."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from ..evaluation.folder import load_mask
from ..evaluation.statistics import compare
from ..images.nifti import read_volume
from ..images.preprocessing import Volume
from ..support.errors import UserError
from ..support.files import atomic
from ..support.hints import some
from .inspection import (
    Inspection,
    principal_components,
    spread,
)
from .layout import number, plain

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")
"""Okabe and Ito's, told apart by most colour-blind readers."""

MARKERS = "os^Dv<>"
"""With the colours, for as many values as both have together."""

DPI = 110

TALLEST = 60.0
"""Inches of a picture's height at most."""

LEGEND = 42
"""Entries of a legend at most."""

LAYERS = 24
"""FiLM layers in a picture at most: those that the metadata change most."""


def png(figure: Figure) -> bytes:
    """The picture as PNG."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # names in scripts that the font does not have
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight", facecolor="white")
    return file.getvalue()


def write_png(path: Path, picture: bytes) -> None:
    """Atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(picture)


def text(name: str, longest: int = 28) -> str:
    """A user's name as matplotlib shall show it: on one line, not too long, nothing in it a formula."""
    name = plain(name)
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    # a legend leaves out what begins with an underscore
    return name.replace("$", r"\$").replace("_", "\u200b_", 1 if name.startswith("_") else 0)


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
        dice.plot(*zip(*points, strict=True), ".-", color=COLOURS[i % len(COLOURS)],
                  label=text(name))  # fmt: skip
    if validated:
        best = max(validated, key=lambda line: line["dice_mean"])
        dice.axvline(best["epoch"], color="0.6", linestyle=":", label="best")
        dice.legend(fontsize=8)
    dice.set(title="validation Dice", xlabel="epoch", ylabel="Dice", ylim=(0, 1))
    for axes in (loss, dice, rate):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def overlays(summary: Mapping[str, Any], most: int = 6) -> tuple[Figure | None, str]:
    """Cases from the worst to the best mean Dice: outlines of truth and prediction on the image.

    Returns:
        the figure, None where no case can be shown; a sentence on cases that cannot, or "".
    """
    cases: list[Mapping[str, Any]] = []
    left_out: list[Mapping[str, Any]] = []
    for case in sorted(summary["metric_per_case"], key=_mean_dice):
        (cases if _shows(case) else left_out).append(case)
    said = ""
    if left_out:
        names = some([c["case"] for c in left_out])
        said = f"{len(left_out)} cases cannot be shown, their image or masks are not there: {names}"
    if not cases:
        return None, said
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
    handles = [
        Line2D([], [], color="0.2", linestyle="-", label="truth"),
        Line2D([], [], color="0.2", linestyle="--", label="prediction"),
    ]
    handles += [Line2D([], [], color=colour[v], label=text(n)) for v, n in labels.items()]
    figure.legend(
        handles=handles[:LEGEND],
        loc="outside lower center",
        ncols=min(len(handles), 2 * columns),
        fontsize=8,
    )
    return figure, said


def _shows(case: Mapping[str, Any]) -> bool:
    """Whether image and masks of a case are there."""
    files = [f[what] for f in case["files"].values() for what in ("prediction", "reference")]
    return len(files) > 0 and all(p and Path(p).is_file() for p in (case["image_file"], *files))


def paired_scatter(a: Mapping[Any, Any], b: Mapping[Any, Any], names: tuple[str, str]) -> Figure:
    """Dice of each case and label in two runs, and the differences with their mean and 95 % interval."""
    both = [k for k in a if k in b and a[k][0] is not None and b[k][0] is not None]
    x, y = (np.array([run[k][0] for k in both]) for run in (b, a))
    labels = list(dict.fromkeys(k[1] for k in both))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rng = np.random.default_rng(0)
    for i, label in enumerate(labels):
        at = [j for j, k in enumerate(both) if k[1] == label]
        c = COLOURS[i % len(COLOURS)]
        left.scatter(x[at], y[at], s=18, color=c, alpha=0.7, label=text(label))
        d = y[at] - x[at]
        right.scatter(i + rng.uniform(-0.15, 0.15, len(at)), d, s=14, color=c, alpha=0.5)
        found = compare(y[at].tolist(), x[at].tolist(), [a[both[j]][1] for j in at])
        if found is not None and found.low is not None and found.high is not None:
            ends = [[found.difference - found.low], [found.high - found.difference]]
            right.errorbar(
                i + 0.28, found.difference, ends, fmt="o", color=c, capsize=4, markersize=6
            )
    low = min(x.min(), y.min(), 0.9) if len(both) else 0
    left.plot([low, 1], [low, 1], color="0.6", linewidth=1)
    names = text(names[0]), text(names[1])
    left.set(xlabel=f"Dice, {names[1]}", ylabel=f"Dice, {names[0]}", title="each case", aspect=1)
    left.legend(fontsize=8)
    right.axhline(0, color="0.6", linewidth=1)
    right.set(
        title="difference: cases, mean and 95 % interval",
        ylabel=f"Dice, {names[0]} - {names[1]}",
        xlim=(-0.6, len(labels) - 0.3),
    )
    slanted = {"rotation": 30, "ha": "right", "fontsize": 8} if len(labels) > 3 else {}
    right.set_xticks(range(len(labels)), [text(n) for n in labels], **slanted)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


def swap_heat_map(result: Mapping[str, Any]) -> Figure:
    """Dice by true (rows) and fed value (columns), with 95 % intervals where there is room for them."""
    rows = list(result["rows"])
    columns = list(next(iter(result["rows"].values())))
    mean = np.array([[_none(result["rows"][r][c]["mean"]) for c in columns] for r in rows])
    few = len(columns) <= 8
    size = 2.2 + (1.7 if few else 0.55) * len(columns), 1.6 + (0.85 if few else 0.3) * len(rows)
    figure = Figure(figsize=(size[0], min(size[1], TALLEST)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(mean, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            cell = result["rows"][r][c]
            if cell["mean"] is None:
                continue
            words = f"{cell['mean']:.2f}"
            if few and cell["low"] is not None:
                words += f"\n[{cell['low']:.2f}, {cell['high']:.2f}]"
            dark = cell["mean"] < 0.55
            axes.text(
                j, i, words, ha="center", va="center", fontsize=9, color="white" if dark else "black",
                fontweight="bold" if r == c else "normal",
            )  # fmt: skip
    counts = [max(result["rows"][r][c]["n"] for c in columns) for r in rows]
    rotation = 0 if len(columns) <= 3 else 15 if few else 90
    axes.set_xticks(range(len(columns)), [text(c) for c in columns], rotation=rotation)
    names = [f"{text(r)} (n = {n})" for r, n in zip(rows, counts, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    key = text(result["key"])
    axes.set(xlabel=f"{key} fed to the model", ylabel=f"true {key}")
    figure.colorbar(shown, ax=axes, label="mean Dice")
    return figure


def film_heat_maps(found: Inspection) -> Figure:
    """γ and β of every layer: rows are values, columns channels."""
    found, said = _most_changed(found)
    n = len(found.layers)
    high = min(0.22 * len(found.values) + 0.62, TALLEST / n)
    # names of values that have room beside the rows
    step = max(1, round(0.15 * len(found.values) / max(high - 0.62, 0.15)))
    named = range(0, len(found.values), step)
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
            axes.set_yticks(named, [text(found.values[i]) if column == 0 else "" for i in named])
            axes.tick_params(labelsize=7)
            if array.shape[1] == 1:
                axes.set_xticks([0])
        grid[-1, column].set_xlabel("channel")
        label = "γ (white: 1)" if column == 0 else "β (white: 0)"
        figure.colorbar(shown, ax=grid[:, column], label=label, shrink=0.8)
    figure.suptitle(f"FiLM coefficients by {text(found.key)}{said}", fontsize=11)
    return figure


def film_components(found: Inspection) -> Figure:
    """Values on the first two principal components of all layers' γ and β, and of each layer's."""
    every = [np.concatenate([layer.gamma, layer.beta], 1) for layer in found.layers]
    found, said = _most_changed(found)
    n = len(found.layers)
    columns = min(4, n + 1)
    rows = -(-(n + 1) // columns)
    legend = min(len(found.values), LEGEND)
    height = min(2.9 * rows, TALLEST) + 0.2 * -(-legend // columns) + 0.4
    figure = Figure(figsize=(3.1 * columns, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[n + 1 :]:
        axes.set_axis_off()
    parts = [("all layers", np.concatenate(every, 1))]
    parts += [(la.name, np.concatenate([la.gamma, la.beta], 1)) for la in found.layers]
    for axes, (title, values) in zip(grid, parts, strict=False):
        at, share = principal_components(values)
        for i, name in enumerate(found.values):
            marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
            colour = COLOURS[i % len(COLOURS)]
            axes.scatter(*at[i], s=30, color=colour, marker=marker, label=text(name))
        axes.margins(0.2)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"component 1 ({share[0]:.0%} of variance)", fontsize=7)
        axes.set_ylabel(f"component 2 ({share[1]:.0%})", fontsize=7)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    handles, names = grid[0].get_legend_handles_labels()
    if len(names) > legend:
        handles, names = handles[: legend - 1], names[: legend - 1]
        handles.append(Line2D([], [], linestyle=""))
        names.append(f"… {len(found.values) - legend + 1} more")
    figure.legend(
        handles, names, loc="outside lower center", ncols=min(columns, len(names)), fontsize=8
    )
    figure.suptitle(f"γ and β by {text(found.key)}, principal components{said}", fontsize=11)
    return figure


def _most_changed(found: Inspection) -> tuple[Inspection, str]:
    """With ``LAYERS`` layers at most, and words on that for the title."""
    n = len(found.layers)
    if n <= LAYERS:
        return found, ""
    ranked = sorted(range(n), key=lambda i: spread(found.layers[i]), reverse=True)
    kept = [found.layers[i] for i in sorted(ranked[:LAYERS])]
    return replace(found, layers=kept), f" ({LAYERS} of {n} layers, those that differ most)"


def _none(value: float | None) -> float:
    return np.nan if value is None else value


def _mean_dice(case: Mapping[str, Any], undefined: float | None = 1.0) -> Any:
    values = [m["Dice"] for m in case["metrics"].values() if m["Dice"] is not None]
    return float(np.mean(values)) if values else undefined


def _overlay(
    axes: Any, case: Mapping[str, Any], labels: Mapping[str, str], colour: Mapping[str, str]
) -> None:
    path = Path(case["image_file"])
    image = read_volume(path)
    voxels, affine = _canonical(image.array.astype(np.float32), image.affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    masks = {}
    for value, files in case["files"].items():
        pair = []
        for what in ("reference", "prediction"):
            volume, mask = load_mask(Path(files[what]), files[f"{what}_values"])
            if volume.array.shape != image.array.shape:
                raise UserError(f"{files[what]}: its shape is not that of the image {path}")
            pair.append(_canonical(mask.astype(np.uint8), image.affine)[0] > 0)
        masks[value] = tuple(pair)
    # across the thickest direction, else axial
    axis = int(np.argmax(spacing)) if max(spacing) > 1.5 * np.median(spacing) else 2
    marked = sum(t.astype(int) + p for t, p in masks.values())
    others = tuple(a for a in range(3) if a != axis)
    counts = np.asarray(marked).sum(others)
    index = int(counts.argmax()) if counts.any() else voxels.shape[axis] // 2
    shown = voxels.take(index, axis).T
    finite = voxels[np.isfinite(voxels)]
    low, high = np.percentile(finite, (1, 99.5)) if finite.size else (0.0, 1.0)
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
    mm = nib.affines.apply_affine(affine, position)[axis]
    each = [f"{text(labels[v], 16)} {number(m['Dice'], 3)}" for v, m in case["metrics"].items()]
    if len(each) > 3:
        each = [f"of {len(each)} labels {number(_mean_dice(case, None), 3)}"]
    known = ", ".join(str(v) for v in case["metadata"].values() if v is not None)
    title = text(case["case"]) + (f" ({text(known)})" if known else "")
    axes.set_title(f"{title}, {'xyz'[axis]} = {mm:.0f} mm\nDice {', '.join(each)}", fontsize=8)
    names = ("L", "R"), ("P", "A"), ("I", "S")
    for (x, y), side in (
        ((0.02, 0.5), names[others[0]][0]),
        ((0.98, 0.5), names[others[0]][1]),
        ((0.5, 0.02), names[others[1]][0]),
        ((0.5, 0.98), names[others[1]][1]),
    ):
        axes.text(
            x,
            y,
            side,
            color="yellow",
            fontsize=8,
            transform=axes.transAxes,
            ha="center",
            va="center",
        )


def _canonical(array: Volume, affine: NDArray[np.float64]) -> tuple[Volume, Volume]:
    """Array and affine turned to right, anterior, superior."""
    turned = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    return np.asarray(turned.dataobj), np.asarray(turned.affine)
