"""Draws the results at the head of the README from committed files: python docs/results_figure.py

Left: the speed of a FiLMed U-Net on a CPU (benchmarks/results/model-cpu.json). Middle: the differences that trials
of metadata found (docs/results/trial-calibration.json, trials.json). Right: Dice under right and wrong
metadata (benchmarks/results/paper/experiment-1.json). Nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "img" / "results.png"
NAMES = {"lgg": "brain MRI\n(lgg)", "acdc": "cardiac MRI\n(acdc)"}
INK, MUTED, GREY, LIGHT, BLUE = "#222222", "#777777", "#c9c9c9", "#8fb8de", "#2f6db0"


def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / name).read_text(encoding="utf-8"))
    return found


def draw_speed(axes: Axes) -> None:
    """Speed in float32 of eager PyTorch's faster layout (1), torch.compile and fastfilm."""
    measured = read("benchmarks/results/model-cpu.json")
    torch = measured["machine"]["torch"].split("+")[0]
    ratio = {
        (row["case"], row["mode"], row["provider"]): row["ratio"]
        for row in measured["rows"]
        if row["dtype"] == "float32"
    }
    groups = sorted({(case, mode) for case, mode, _ in ratio})
    for offset, provider, colour, label in (
        (-0.27, None, GREY, f"eager PyTorch {torch}"),
        (0.0, "compile", LIGHT, f"torch.compile {torch}"),
        (0.27, "fastfilm-cpu", BLUE, "fastfilm"),
    ):
        heights = [ratio[(*group, provider)] if provider else 1.0 for group in groups]
        places = [i + offset for i in range(len(groups))]
        axes.bar(places, heights, 0.25, color=colour, label=label)
        for x, height in zip(places, heights, strict=True):
            axes.text(x, height + 0.02, f"{height:.2g}", ha="center", fontsize=8, color=INK)
    axes.set_xticks(
        range(len(groups)),
        [f"{case.split()[1]}\n{mode}" for case, mode in groups],
    )
    axes.set_ylim(0, 2.3)
    axes.set_ylabel("speed, eager = 1", color=MUTED)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_title("Speed of a FiLMed U-Net on two CPU cores", fontsize=10, loc="left")


def draw_trials(axes: Axes) -> None:
    """The difference in Dice with its 95 % interval, and the answer."""
    phantoms = read("docs/results/trial-calibration.json")["trials"]
    rows: list[tuple[str, dict[str, Any], str]] = []
    for kind, name in (
        ("help", "phantoms whose\nmetadata matter"),
        ("null", "phantoms whose\nmetadata do not"),
    ):
        first = next(t for t in phantoms if t["kind"] == kind)
        rows.append((name, first, first["answer"]))
    for name, trial in read("docs/results/trials.json")["trials"].items():
        rows.append((NAMES.get(name, name), trial["primary"], trial["answer"]))
    for y, (_, found, answer) in enumerate(reversed(rows)):
        colour = BLUE if found["low"] > 0 else MUTED
        axes.plot([found["low"], found["high"]], [y, y], color=colour, lw=2)
        axes.plot([found["mean"]], [y], "o", color=colour)
        axes.text(found["mean"], y + 0.16, answer, color=INK, fontsize=8, ha="center")
    axes.axvline(0, color=GREY, lw=1, zorder=0)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    axes.set_ylim(-0.5, len(rows) - 0.4)
    axes.margins(x=0.2)
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    axes.set_xlabel("Dice with metadata - without", color=MUTED)
    axes.set_title("Do the metadata help? fastfilm trial", fontsize=10, loc="left")


def draw_swap(axes: Axes) -> None:
    """Mean Dice in percent of the phantoms of each type under each type's metadata."""
    blocks = read("benchmarks/results/paper/experiment-1.json")["summary"]["blocks"]
    found = next(block for block in blocks if block["data"] == "phantom")["swap"]
    names, values = found["names"], found["dice"]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            ink = "white" if value > 55 else INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=ink)
    short = [name.replace("hemangioblastoma", "hemangio-\nblastoma") for name in names]
    axes.set_xticks(range(len(names)), short)
    axes.set_yticks(range(len(names)), short)
    axes.set_xlabel("type that the network is told", color=MUTED)
    axes.set_ylabel("true type", color=MUTED)
    axes.set_title("Dice % under right and wrong metadata", fontsize=10, loc="left")


def main() -> None:
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1.15, 1))
    draw_speed(left)
    draw_trials(middle)
    draw_swap(right)
    for axes in (left, middle, right):
        axes.tick_params(labelsize=8, colors=INK)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(OUT, dpi=150)
    print(OUT)


if __name__ == "__main__":
    main()
