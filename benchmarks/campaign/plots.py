"""Pictures of a campaign: speed of the networks, layers by route; the conditions stand underneath.

    python -m benchmarks.campaign.plots DIR

draws what the ``results.json`` in a folder has rows for.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure.table import SHORT, colour, conditions
from .bundle import LAYERS, SPEED

Rows = Sequence[Mapping[str, Any]]

REFERENCE = "eager-channels-last"
"""What speed-ups are relative to: with autocast in training, as a user would run it."""

NOTE = {"cpu": "tiny networks on a CPU: a dry run, which says nothing about a GPU"}
GROUPS = 8
"""Most cases in one picture."""


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Names of the pictures drawn: those that there are rows for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for name, picture in ((SPEED, _speed), (LAYERS, _layers)):
        figure = plt.figure(figsize=(9.5, 5.0), layout="constrained")
        try:
            if picture(figure, results["rows"]):
                figure.supxlabel(_under(results), fontsize=7.5, color="#444444")
                figure.savefig(folder / f".{name}.part", dpi=110, format="png")
                os.replace(folder / f".{name}.part", folder / name)
                made.append(name)
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


def _groups(rows: Rows) -> dict[Group, dict[str, Mapping[str, Any]]]:
    """(case, mode, dtype) -> provider -> row, of those with a time; a provider's first row counts."""
    found: dict[Group, dict[str, Mapping[str, Any]]] = {}
    for r in rows:
        if r["suite"] in ("model", "converted") and r["status"] == "ok" and r.get("median_s"):
            found.setdefault((r["case"], r["mode"], r["dtype"]), {}).setdefault(r["provider"], r)
    return dict(list(found.items())[:GROUPS])


def _bars(axis: Any, groups: Mapping[Group, Mapping[str, float]]) -> None:
    from matplotlib import patheffects

    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    ours = [n for n in names if n.startswith("fastfilm")]
    place, ticks = 0.0, []
    for group in groups.values():
        begin = place
        for name, value in group.items():
            bar = axis.barh(place, value, height=0.86, color=colour(name, ours))
            stroke = patheffects.withStroke(linewidth=2.5, foreground="white")
            axis.bar_label(bar, [f"{value:.2f}×"], padding=2, fontsize=7, path_effects=[stroke])
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


def _speed(figure: Any, rows: Rows) -> bool:
    groups = {}
    for group, found in _groups(rows).items():
        base = found.get(REFERENCE)
        if base is not None and len(found) > 1:
            groups[group] = {
                n: base["median_s"] / r["median_s"] for n, r in same_step(rows, group, base).items()
            }
    if not groups:
        return False
    figure.set_figheight(1.6 + 0.21 * sum(len(g) + 0.8 for g in groups.values()))
    axis = figure.add_subplot()
    _bars(axis, groups)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axis.set_xlabel("times as fast as eager PyTorch, channels-last (longer is faster)", fontsize=9)
    return True


def same_step(rows: Rows, group: Group, base: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
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


def _layers(figure: Any, rows: Rows) -> bool:
    """One panel a direction, one mark a route: the vendor's time over ours, on a logarithmic axis."""
    found = [r for r in rows if r["suite"] == "routes" and r.get("ratio") and r["status"] == "ok"]
    found = [r for r in found if r["provider"] != "vendor"]
    if not found:
        return False
    cases, modes, names = (
        list(dict.fromkeys(r[k] for r in found)) for k in ("case", "mode", "provider")
    )
    figure.set_figheight(1.8 + 0.36 * len(cases))
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axis, mode in zip(panels, modes, strict=True):
        for name, mark in zip(names, "o^sDvP", strict=False):
            some = [r for r in found if (r["mode"], r["provider"]) == (mode, name)]
            axis.scatter(
                [r["ratio"] for r in some], [cases.index(r["case"]) for r in some],
                s=26, marker=mark, alpha=0.8, color=colour(name, names), label=name,
            )  # fmt: skip
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.tick_params(axis="x", labelsize=7, which="both")
        axis.set_title(mode, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.3)
    panels[0].set_yticks(range(len(cases)), cases, fontsize=7.5)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("time of the vendor's convolution alone over ours", fontsize=8)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return True


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(*draw(json.loads((folder / "results.json").read_text(encoding="utf-8")), folder))
