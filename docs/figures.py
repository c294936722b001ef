"""Draws the figure of docs/design.md from a trace taken here: python docs/figures.py

A FiLMed U-Net of depth 4 with 64 filters, bfloat16, runs one training step in eager PyTorch and by each route of
fastfilm. ``benchmarks.counted.traffic`` sees every kernel and the feature maps that it reads and writes. The CUDA
kernels run on the host, one block of each (``benchmarks.counted.emulated_passes``). A bar is one convolution
with everything since the one before it. Caches are not modelled and nothing is timed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # the fused route, on a machine without a GPU

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastfilm
from benchmarks.counted import traffic
from benchmarks.counted.emulated_passes import DEPTH, launching, step

OUT = Path(__file__).parent / "img" / "passes.png"
INK, MUTED = "#222222", "#777777"
FORMS: tuple[tuple[str, str, str | None, str], ...] = (
    # title, backend, route, colour
    ("eager PyTorch", "reference", None, "#c9c9c9"),
    ("fastfilm, composed route", "cpu", "composed", "#8fb8de"),
    ("fastfilm, CUDA kernels", "cuda", "fused", "#2f6db0"),
)
FORWARD_END = ("convolution", "convolve", "fprop")
BACKWARD_END = ("convolution_wgrad", "convolve_wgrad", "wgrad")


def layers() -> list[str]:
    """Names of the convolutions, first to last."""
    down = [f"down {i + 1}{half}" for i in range(DEPTH) for half in "ab"]
    up = [f"up {i}{half}" for i in range(DEPTH, 0, -1) for half in "ab"]
    return [*down, "bottom a", "bottom b", *up, "last"]


def per_layer(launches: list[traffic.Launch], ends: tuple[str, ...]) -> list[float]:
    """Passes since the convolution before, for each; what follows the last one counts with it."""
    found = [0.0]
    for launch in launches:
        found[-1] += launch.passes
        if launch.name in ends:
            found.append(0.0)
    rest = found.pop()
    found[-1] += rest
    return found


def trace() -> dict[str, tuple[list[float], list[float]]]:
    """Forward and backward passes of each layer, for each form."""
    found = {}
    for title, backend, route, _ in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            emulated = backend == "cuda"
            scope = launching(Path(folder)) if emulated else fastfilm.backend(backend, route)
            with scope:
                launches = step()
        forward = per_layer(launches["forward"], FORWARD_END)
        found[title] = forward, per_layer(launches["backward"], BACKWARD_END)[::-1]
    return found


def draw(found: dict[str, tuple[list[float], list[float]]]) -> None:
    """Bars of each layer, forward above and backward below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = layers()
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.6), sharex=True, layout="constrained")
    for part, (axis, title) in enumerate(zip(axes, ("forward", "backward"), strict=True)):
        for i, (form, _, _, colour) in enumerate(FORMS):
            counts = found[form][part]
            assert len(counts) == len(names)
            mean = sum(counts) / len(names)
            places = [x + 0.27 * (i - 1) for x in range(len(names))]
            label = f"{form}: {mean:.1f} a convolution"
            axis.bar(places, counts, width=0.27, color=colour, label=label)
        axis.set_title(f"{title} pass of a training step", loc="left", color=INK, fontsize=11)
        axis.set_ylabel("feature maps\nread or written", color=INK)
        top = max(max(found[form][part]) for form, *_ in FORMS)
        axis.set_ylim(0, 1.45 * top)
        axis.legend(loc="upper left", ncol=3, frameon=False, fontsize=9.5)
        _plain(axis)
    axes[1].set_xticks(range(len(names)), names, rotation=40, ha="right", color=INK)
    figure.text(
        0.5,
        -0.03,
        f"FiLMedUNet, depth {DEPTH}. Each bar: one convolution with all that happens since the one before it"
        " (norm, activation, FiLM, pooling, upsampling, concatenation).\n"
        "Counted from the kernels of a real step; maps of all sizes count one; not timed.",
        ha="center",
        color=MUTED,
        fontsize=8.5,
    )
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=130, bbox_inches="tight", facecolor="white")


def _plain(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=MUTED)


if __name__ == "__main__":
    draw(trace())
    print(OUT)
