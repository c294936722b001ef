"""Pictures of a campaign: speed-up, memory, roofline, time by layer, growth; the conditions stand underneath."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import SHORT, colour, conditions

Rows = Sequence[Mapping[str, Any]]

REFERENCE = "eager-channels-last"
"""What speed-ups and memory are relative to: with autocast in training, as a user would run it."""

NOTE = {"cpu": "tiny networks on a CPU: a dry run, which says nothing about a GPU"}
GROUPS = 8
"""Most cases in one picture."""


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws what there are rows for; path below the report -> caption. Nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    made: dict[str, str] = {}
    pictures: dict[str, tuple[Callable[..., str | None], tuple[float, float]]] = {
        "speedup": (_speed, (9.0, 5.5)),
        "memory": (_memory, (9.0, 5.0)),
        "roofline": (_roofline, (8.0, 5.5)),
        "layers": (_layers, (9.0, 5.5)),
        "growth": (_growth, (9.0, 4.5)),
    }
    for name, (picture, size) in pictures.items():
        figure = plt.figure(figsize=size, layout="constrained")
        try:
            caption = picture(figure, results["rows"], results["machine"])
            if caption is not None:
                figure.supxlabel(_under(results), fontsize=7.5, color="#444444")
                figure.savefig(folder / f"{name}.png", dpi=150)
                made[f"{folder.name}/{name}.png"] = caption
        finally:
            plt.close(figure)
    return made


def _under(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    usual = dict.fromkeys(("device_name", "threads", "torch", "triton", "cudnn"), "?")
    note = NOTE.get(str(results["about"].get("device")))
    return conditions(usual | m) + (f"\n{note}" if note else "")


def _label(case: str, mode: str, dtype: str) -> str:
    return f"{textwrap.fill(case, 26)}\n{mode}, {SHORT.get(dtype, dtype)}"


Group = tuple[str, str, str]


def _groups(rows: Rows, key: str) -> dict[Group, dict[str, Mapping[str, Any]]]:
    """(case, mode, dtype) -> provider -> row, of those that have ``key``; a provider's first row counts."""
    found: dict[Group, dict[str, Mapping[str, Any]]] = {}
    for r in rows:
        if r["suite"] in ("model", "converted") and r["status"] == "ok" and r.get(key):
            found.setdefault((r["case"], r["mode"], r["dtype"]), {}).setdefault(r["provider"], r)
    return dict(list(found.items())[:GROUPS])


def _bars(
    axis: Any, groups: Mapping[Group, Mapping[str, float]], say: Callable[[float], str]
) -> None:
    from matplotlib import patheffects

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    ours = [n for n in names if n.startswith("fastfilm")]
    place, ticks = 0.0, []
    for group in groups.values():
        begin = place
        for name, value in group.items():
            bar = axis.barh(place, value, height=0.86, color=colour(name, ours))
            stroke = patheffects.withStroke(linewidth=2.5, foreground="white")
            axis.bar_label(bar, [say(value)], padding=2, fontsize=7, path_effects=[stroke])
            place += 1
        ticks.append((begin + place - 1) / 2)
        place += 0.8
    axis.set_yticks(ticks, [_label(*g) for g in groups], fontsize=7.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.14 * max(v for g in groups.values() for v in g.values()))
    axis.spines[["top", "right"]].set_visible(False)
    handles = [axis.barh(0, 0, color=colour(n, ours), label=n) for n in names]
    axis.figure.legend(
        handles, names, loc="outside upper center", ncols=4, fontsize=8, frameon=False
    )


def _speed(figure: Any, rows: Rows, machine: Mapping[str, Any]) -> str | None:
    groups = {}
    for group, found in _groups(rows, "median_s").items():
        base = found.get(REFERENCE)
        if base is not None and len(found) > 1:
            groups[group] = {
                n: base["median_s"] / r["median_s"]
                for n, r in _same_step(rows, group, base).items()
            }
    if not groups:
        return None
    figure.set_figheight(_height(groups))
    axis = figure.add_subplot()
    _bars(axis, groups, lambda v: f"{v:.2f}×")
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("times as fast as eager PyTorch, channels-last (longer is faster)", fontsize=9)
    return "Speed of whole networks relative to eager PyTorch in channels-last layout."


def _height(groups: Mapping[Group, Mapping[str, float]]) -> float:
    return 1.6 + 0.21 * sum(len(g) + 0.8 for g in groups.values())


def _same_step(rows: Rows, group: Group, base: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """All providers of a group; where a step measured one beside the reference, that row counts.

    Rows of other steps are scaled by their own reference, so that a drift between steps does not show.
    """
    found: dict[str, Mapping[str, Any]] = {}
    some = [
        r for r in rows
        if (r["case"], r["mode"], r["dtype"]) == group and r["status"] == "ok" and r.get("median_s")
        and r["suite"] == base["suite"]
    ]  # fmt: skip
    own = {r["step"]: r["median_s"] for r in some if r["provider"] == REFERENCE}
    for r in some:
        if r["step"] in own and r["provider"] not in found:
            scale = base["median_s"] / own[r["step"]]
            found[r["provider"]] = {**r, "median_s": r["median_s"] * scale}
    return found


MEMORY = {
    "peak_bytes": "peak memory of a step",
    "saved_bytes": "bytes kept for the backward pass",
}
"""The first that was measured is drawn: a CPU's peak is not."""


def _memory(figure: Any, rows: Rows, machine: Mapping[str, Any]) -> str | None:
    training = {
        key: {
            group: {n: r[key] / 2**20 for n, r in found.items()}
            for group, found in _groups(rows, key).items()
            if group[1] == "training"
        }
        for key in MEMORY
    }
    key = next((k for k, groups in training.items() if groups), None)
    if key is None:
        return None
    groups, said = training[key], MEMORY[key]
    figure.set_figheight(_height(groups))
    axis = figure.add_subplot()
    _bars(axis, groups, lambda v: f"{v:.0f}" if v >= 10 else f"{v:.1f}")
    axis.set_xlabel(f"{said}, MiB (shorter is better)", fontsize=9)
    return f"Training step: {said}."


MARKS = {"training": "o", "inference": "^"}
SHADES = ("#1f5fa8", "#c0842d", "#4c8c6b", "#8a5aa8")


def _explained(rows: Rows) -> list[Mapping[str, Any]]:
    return [r for r in rows if r["suite"] == "explain" and r.get("median_s")]


def _roofline(figure: Any, rows: Rows, machine: Mapping[str, Any]) -> str | None:
    found = [r for r in _explained(rows) if r.get("flops_per_byte") and r.get("tflops")]
    rates = machine.get("matrix_tflops", {})
    if not found or not rates or not machine.get("copy_gbps"):
        return None
    axis = figure.add_subplot()
    dtype = found[0]["dtype"]
    found = [r for r in found if r["dtype"] == dtype]
    top, slope = rates.get(dtype) or min(rates.values()), machine["copy_gbps"] / 1e3
    xs = [r["flops_per_byte"] for r in found]
    least, most = min([*xs, top / slope]) / 2, max([*xs, top / slope]) * 2
    line = [least, top / slope, most]
    axis.plot(line, [min(top, slope * x) for x in line], color="black", linewidth=1.2)
    axis.text(
        most, top * 1.05, f"matrix product, {SHORT.get(dtype, dtype)}", ha="right", fontsize=8
    )
    axis.text(least * 1.1, slope * least * 1.6, "copy", fontsize=8)
    for i, network in enumerate(dict.fromkeys(r["network"] for r in found)):
        for mode, mark in MARKS.items():
            some = [r for r in found if r["network"] == network and r["mode"] == mode]
            axis.scatter(
                [r["flops_per_byte"] for r in some], [r["tflops"] for r in some],
                s=[12 + 160 * r["median_s"] / sum(q["median_s"] for q in some) for r in some],
                marker=mark, alpha=0.75, color=SHADES[i % len(SHADES)], label=f"{network}, {mode}",
            )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("arithmetic over compulsory traffic, FLOP/B", fontsize=9)
    axis.set_ylabel("TFLOP/s", fontsize=9)
    axis.legend(fontsize=7.5, frameon=False, loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return "Layers of the networks under the measured ceilings; the larger a mark, the more of the time it takes."


def _layers(figure: Any, rows: Rows, machine: Mapping[str, Any]) -> str | None:
    import matplotlib

    found = _explained(rows)
    if not found:
        return None
    dtype = found[0]["dtype"]
    cases = list(dict.fromkeys((r["network"], r["mode"]) for r in found if r["dtype"] == dtype))
    bars = {"floor": "floor_s", "estimate": "estimate_s", "measured": "median_s"}
    figure.set_figheight(1.6 + 1.25 * len(cases))
    panels = figure.subplots(len(cases), 1, squeeze=False)[:, 0]
    for axis, (network, mode) in zip(panels, cases, strict=True):
        some = [r for r in found if (r["network"], r["mode"], r["dtype"]) == (network, mode, dtype)]
        widest = max(1e3 * sum(r[key] or 0.0 for r in some) for key in bars.values())
        shades = matplotlib.colormaps["viridis"].resampled(len(some))
        for i, (name, key) in enumerate(bars.items()):
            left = 0.0
            for j, r in enumerate(some):
                width = 1e3 * (r[key] or 0.0)
                axis.barh(i, width, left=left, color=shades(j), edgecolor="white", linewidth=0.4)
                if name == "measured" and width > 0.07 * widest:
                    said = r["layer"].split(" @ ")
                    light = j < len(some) / 2
                    axis.text(
                        left + width / 2, i, "\n".join(said), ha="center", va="center",
                        fontsize=5.5, color="white" if light else "black",
                    )  # fmt: skip
                left += width
            axis.text(left, i, f" {left:.3g} ms", va="center", fontsize=7)
        axis.set_yticks(range(len(bars)), bars, fontsize=8)
        axis.set_title(f"{network}, {mode}, {SHORT.get(dtype, dtype)}", fontsize=8.5, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(x=0.1)
    panels[-1].set_xlabel(
        "ms, layers in the order of the network (all occurrences together)", fontsize=9
    )
    return "Time by layer: the floor, the estimate and the measurement."


def _growth(figure: Any, rows: Rows, machine: Mapping[str, Any]) -> str | None:
    found = [r for r in rows if r["suite"] == "scaling" and r["status"] == "ok" and r["median_s"]]
    if not found:
        return None
    from matplotlib import ticker

    panels = sorted({(r["dims"], r["axis"]) for r in found}, key=lambda p: (p[0], p[1] != "size"))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (dims, kind) in zip(axes, panels, strict=True):
        some = [r for r in found if (r["dims"], r["axis"]) == (dims, kind)]
        for name in dict.fromkeys(r["provider"] for r in some):
            points = sorted(
                (r["voxels"], 1e3 * r["median_s"]) for r in some if r["provider"] == name
            )
            axis.plot(
                *zip(*points, strict=True),
                "o-",
                color=colour(name, ["fastfilm"]),
                label=name,
                markersize=4,
            )
        _guide(axis, [(r["voxels"], 1e3 * r["median_s"]) for r in some])
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
        sizes = {
            r["voxels"]: str(r["batch"]) if kind == "batch" else f"{r['voxels'] ** (1 / dims):.0f}"
            for r in some
        }
        axis.set_xticks(list(sizes), list(sizes.values()))
        axis.minorticks_off()
        axis.set_xlabel("samples" if kind == "batch" else "side, voxels", fontsize=8)
        axis.set_title(f"{dims}D, {kind}", fontsize=9)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("training step, ms", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return "Training step against the size of the image or volume, and against the batch."


def _guide(axis: Any, points: Iterable[tuple[float, float]]) -> None:
    """A linear law through the largest case."""
    ordered = sorted(points)
    (first, _), (last, top) = ordered[0], min(p for p in ordered if p[0] == ordered[-1][0])
    axis.plot(
        [first, last], [top * first / last, top], ":", color="black", linewidth=0.9, label="linear"
    )
