"""``results/GAPS.md``: each target that is not reached, what limits it by the cost model, and the next step.

    python -m benchmarks.campaign.gaps [RESULTS.json] > benchmarks/results/GAPS.md

from a campaign's results. Without one on a GPU nothing was measured, and the page says so; the cost model then
stands alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastfilm.tuning import cost

from ..counted.roofline import Ceilings
from ..measure import machine
from ..pages.markdown import number, table
from ..subjects import expected_time
from ..subjects.networks import NETWORKS
from . import targets

NEXT = {
    "dram": "one pass less: the gradient at the raw output in the prologues of dgrad and wgrad",
    "launch": "a CUDA graph of the step, fewer small kernels for the coefficients",
}
"""Limiter -> what would move it."""

UNMEASURED = (
    "measure our convolutions by wgmma (`--suite routes`), which have run on no GPU yet: those by mma.sync lose to"
    " the vendor's"
)


def _matrix(rows: targets.Rows) -> str:
    """What would move a network that multiplies most of the time: as the convolutions by wgmma were measured."""
    found = [p for p in targets.pairs(rows) if p.over(p.vendor)]
    if not found:
        return UNMEASURED
    ahead = [p for p in found if (p.over(p.vendor) or 0) >= 1]
    worst = min(found, key=lambda p: p.over(p.vendor) or 0)
    said = f"by wgmma ours are faster than the vendor's alone in {len(ahead)} of {len(found)}"
    if len(ahead) == len(found):
        return f"{said}: `fastfilm tune` takes the fused route where its passes pay"
    return (
        f"{said}; {worst.case}, {worst.mode} is furthest behind ({worst.over(worst.vendor):.2f}×)"
    )


def text(results: Mapping[str, Any] | None) -> str:
    """The page for a campaign's results, or for none."""
    measured = results is not None and results["about"].get("device") == "cuda"
    rows = results["rows"] if measured and results is not None else []
    parts = ["# Gaps", "", *_state(results if measured else None), *_targets(rows)]
    if measured:
        slower = [(case, peer, f"{ratio:.2f}×") for case, peer, ratio in targets.slower(rows)]
        parts += ["## Where a peer was faster", ""]
        parts += table(("case", "peer", "its time over ours"), slower) or ["Nowhere.", ""]
    parts += [
        *_model(
            machine.from_json(results["machine"]) if measured and results is not None else cost.H200
        )
    ]
    return "\n".join(parts).rstrip() + "\n"


def _state(results: Mapping[str, Any] | None) -> list[str]:
    if results is None:
        return [
            "**No campaign has run on a GPU yet: no target has been measured, and none is claimed.** What stands"
            " here is what the cost model ([docs/benchmarks.md](../../docs/benchmarks.md)) says of the layers,"
            " from the copy and the matrix product of an H200 (4.3 TB/s, 790 TFLOP/s), a launch (4 µs), the clock"
            " model's figures of the CUDA kernels and the shares of the matrix rate that the vendor's convolutions"
            " reached (0.5 to 0.6). It says where to look first, not how fast anything is.",
            "",
            "    bash benchmarks/gpu.sh --out DIR --minutes 9",
            "",
            "on a machine with a CUDA device measures them; this page is then made anew from its `results.json`.",
            "",
        ]
    m = results["machine"]
    return [
        f"{m.get('device_name')}, torch {m.get('torch')}, triton {m.get('triton')}, commit {m.get('commit')}.",
        "",
    ]


def _targets(rows: targets.Rows) -> list[str]:
    cells = []
    for v in targets.verdicts(rows):
        if v.word == "reached":
            continue
        t = v.target
        name = "" if "memory" in t.figure else _limiter(t)
        value = "not measured" if v.value is None else f"{number(v.value)} {t.unit}"
        step = _next(rows, t, name)
        if host := _host(rows, t):
            name, step = host, f"less Python for each launch; {step}"
        cells.append((t.figure, f"≥ {number(t.least)} {t.unit}", value, name or "-", step))
    head = (
        "figure",
        "to reach",
        "measured",
        "limiter (by the cost model, or the host)",
        "next step",
    )
    return [
        "## Targets that are not reached",
        "",
        *(table(head, cells) or ["All are reached.", ""]),
    ]


def _host(rows: targets.Rows, target: targets.Target) -> str:
    """That the host limits a network, where its step from a CUDA graph took much less time; else nothing."""
    wanted = {"suite": "model", "case": target.case, "mode": target.mode, "dtype": "bfloat16"}
    for plain in targets.find(rows, provider=targets.OURS, **wanted):
        for graph in targets.find(rows, provider=f"{targets.OURS}-graph", **wanted):
            seconds = [r["median_s"] for r in (plain, graph)]
            if "memory" not in target.figure and seconds[1] < 0.8 * seconds[0]:
                before, after = (number(1e3 * s) for s in seconds)
                return f"the host: {before} ms, {after} ms from a CUDA graph"
    return ""


def _next(rows: targets.Rows, target: targets.Target, limiter: str) -> str:
    if "memory" in target.figure:
        return "measure; bytes kept are counted already (`--suite memory`)"
    return _matrix(rows) if limiter == "matrix" else NEXT.get(limiter, "measure")


def _limiter(target: targets.Target) -> str:
    for network in NETWORKS:
        if network.case == target.case:
            found = expected_time.lines(network, target.mode, "bfloat16", cost.H200)
            return expected_time.limiter(found)
    return ""


def _model(ceilings: Ceilings) -> list[str]:
    cells = []
    for network in NETWORKS[:3]:
        for mode in ("training", "inference"):
            found = expected_time.lines(network, mode, "bfloat16", ceilings)
            floor, estimate = sum(x.floor for x in found), sum(x.seconds for x in found)
            worst = sorted(found, key=lambda x: x.floor - x.seconds)[:3]
            cells.append(
                (
                    f"{network.case}, {mode}",
                    number(1e3 * floor),
                    number(1e3 * estimate),
                    f"{100 * floor / estimate:.0f}%",
                    "; ".join(f"{x.layer.label} ({x.estimate.limiter})" for x in worst),
                )
            )
    head = (
        "network, bfloat16",
        "floor ms",
        "estimate ms",
        "of floor",
        "layers that are furthest from it",
    )
    return ["## By the cost model", "", *table(head, cells)]


if __name__ == "__main__":
    given = [json.loads(Path(p).read_text(encoding="utf-8")) for p in sys.argv[1:2]]
    print(text(given[0] if given else None), end="")
