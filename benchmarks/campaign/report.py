"""``report.md`` of a campaign: what was measured, on what, what it says to the targets, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import targets

DRY = (
    "**A dry run on a CPU.** It shows that every step, table and picture works. Its times are those of a CPU on"
    " tiny networks and say nothing about a GPU: no speed on a GPU is claimed."
)


def write(out: Path, pictures: bool = False) -> Path:
    """Writes ``report.md`` from ``results.json``, and the pictures in ``plots/`` if wanted."""
    from . import gaps, plots

    path = out / "results.json"
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        results = {"about": {"device": ""}, "machine": {}, "steps": {}, "tests": {}, "rows": []}
    drawn = plots.draw(results, out / "plots") if pictures else {}
    report = out / "report.md"
    report.write_text(text(results, drawn), encoding="utf-8")
    (out / "GAPS.md").write_text(gaps.text(results), encoding="utf-8")
    return report


def text(results: Mapping[str, Any], drawn: Mapping[str, str]) -> str:
    """The whole page; ``drawn``: path of a picture below the report -> its caption."""
    rows = results["rows"]
    parts = ["# Campaign", ""]
    if results["about"].get("device") == "cpu":
        parts += [DRY, ""]
    parts += [*_machine(results), *_targets(rows), *_slower(rows), *_speed(rows), *_layers(rows)]
    parts += [
        *_profiles(rows),
        *_scaling(rows),
        *_tuned(results),
        *_tests(results),
        *_steps(results),
    ]
    if drawn:
        parts += ["## Pictures", ""]
        for path, caption in drawn.items():
            parts += [f"![{caption}]({path})", "", caption, ""]
    return "\n".join(parts).rstrip() + "\n"


def table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; nothing without cells."""
    body = [f"| {' | '.join(c.replace('|', '/') for c in line)} |" for line in cells]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *body, ""] if body else []


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}g}"


def _ms(value: float | None) -> str:
    return "-" if value is None else number(value * 1e3)


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def _machine(results: Mapping[str, Any]) -> list[str]:
    m = results["machine"]
    if not m:
        return ["No step has given rows yet.", ""]
    rates = ", ".join(f"{k} {number(v)}" for k, v in m.get("matrix_tflops", {}).items())
    versions = ", ".join(
        f"{name} {m.get(name)}" for name in ("driver", "torch", "cuda", "cudnn", "triton", "python") if m.get(name)
    )  # fmt: skip
    return [
        f"{m.get('device_name')}; {versions}; fastfilm {m.get('fastfilm')}, commit {m.get('commit')}.",
        "",
        f"Ceilings: copy {number(m.get('copy_gbps'))} GB/s, L2 {number(m.get('l2_gbps'))} GB/s, launch"
        f" {number(m.get('launch_us'))} µs, matrix product {rates} TFLOP/s.",
        "",
    ]


def _targets(rows: targets.Rows) -> list[str]:
    cells = []
    for v in targets.verdicts(rows):
        t = v.target
        sign = "≥" if t.above else "≤"
        value = "-" if v.value is None else f"{number(v.value)} {t.unit}"
        cells.append(
            (t.figure, f"{sign} {number(t.least)} {t.unit}", value, v.word, v.limiter or "-")
        )
    head = ("figure", "to reach", "measured", "", "limiter by the cost model")
    return ["## Targets", "", *table(head, cells)]


def _slower(rows: targets.Rows) -> list[str]:
    found = [(case, peer, f"{ratio:.2f}×") for case, peer, ratio in targets.slower(rows)]
    if not found:
        return []
    head = ("case", "fastest peer", "its time over ours")
    return ["## Where a peer was faster", "", *table(head, found)]


def _speed(rows: targets.Rows) -> list[str]:
    parts = []
    for suite in ("model", "converted", "ops"):
        cells = [
            (
                f"{r['case']}, {r['mode']}, {r['dtype']}",
                r["provider"],
                _ms(r["median_s"]),
                f"{r['ratio']:.2f}×" if r.get("ratio") else r["status"],
                "-"
                if r.get("fraction_of_floor") is None
                else f"{100 * r['fraction_of_floor']:.0f}%",
                number(r.get("tflops")),
                _mib(r.get("peak_bytes")),
                _mib(r.get("saved_bytes")),
                "-" if r.get("error") is None else f"{r['error']:.1e}",
                r.get("note") or "",
            )
            for r in rows
            if r["suite"] == suite
        ]
        head = (
            "case", "provider", "median ms", "against the faster eager layout", "of floor", "TFLOP/s", "peak MiB",
            "saved MiB", "error", "note",
        )  # fmt: skip
        if cells:
            parts += [f"## Suite {suite}", "", *table(head, cells)]
    return parts


def _layers(rows: targets.Rows) -> list[str]:
    cells = [
        (
            f"{r['network']}, {r['mode']}, {r['dtype']}",
            r["layer"],
            str(r["count"]),
            _ms(r["floor_s"]),
            _ms(r["estimate_s"]),
            _ms(r["median_s"]),
            r["limiter"],
        )
        for r in rows
        if r["suite"] == "explain"
    ]
    head = ("network", "layer", "count", "floor ms", "estimate ms", "measured ms", "limiter")
    return ["## Layers", "", *table(head, cells)] if cells else []


PERCENT = ("dram_percent", "l2_percent", "sm_percent", "occupancy_percent", "registers")


def _profiles(rows: targets.Rows) -> list[str]:
    found = [r for r in rows if r["suite"] == "profile"]
    cells = [
        (r["layer"], r["note"], _ms(r["median_s"]), _ms(r.get("difference_s")))
        for r in found
        if r["provider"] == "fastfilm"
    ]
    parts = (
        ["## Slowest layers", "", *table(("layer", "variant", "ms", "whole minus this"), cells)]
        if cells
        else []
    )
    counters = [
        (
            r["layer"],
            r["note"],
            _ms(r["median_s"]),
            _mib(r.get("dram_bytes")),
            _mib(r.get("l2_bytes")),
            *(number(r.get(k)) for k in PERCENT),
        )
        for r in found
        if r["provider"] == "ncu" and r["status"] == "ok"
    ]  # fmt: skip
    head = (
        "layer",
        "kernel",
        "ms",
        "DRAM MiB",
        "L2 MiB",
        "DRAM %",
        "L2 %",
        "SM %",
        "occupancy %",
        "registers",
    )
    parts += table(head, counters)
    reasons = {r["note"] for r in found if r["provider"] == "ncu" and r["status"] == "skipped"}
    return [*parts, *(f"Hardware counters: {reason}.\n" for reason in sorted(reasons))]


def _scaling(rows: targets.Rows) -> list[str]:
    from ..suites.scaling import slope

    found = [r for r in rows if r["suite"] == "scaling" and r["median_s"]]
    cells = []
    for key in dict.fromkeys((r["dims"], r["axis"], r["provider"]) for r in found):
        some = [r for r in found if (r["dims"], r["axis"], r["provider"]) == key]
        exponent = slope([(r["voxels"], r["median_s"]) for r in some])
        least, most = min(r["voxels"] for r in some), max(r["voxels"] for r in some)
        cells.append((f"{key[0]}D", key[1], key[2], f"{least:,} to {most:,}", number(exponent)))
    head = ("network", "grows with", "provider", "voxels", "exponent of the time (1: linear)")
    return ["## Growth", "", *table(head, cells)] if cells else []


def _tuned(results: Mapping[str, Any]) -> list[str]:
    cells = [
        (
            arch,
            key,
            entry["plan"],
            "; ".join(f"{plan} {_ms(seconds)}" for plan, seconds in entry["seconds"].items()),
            "; ".join(
                f"{family} {'x'.join(map(str, tile))}" for family, tile in entry["tiles"].items()
            ),
        )
        for arch, found in results.get("tuned", {}).items()
        for key, entry in found["entries"].items()
    ]
    head = ("GPU", "bucket", "fastest", "training step of the layer, ms", "tiles, warps, stages")
    return ["## Tuned", "", *table(head, cells)] if cells else []


def _tests(results: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, counts in results["tests"].items():
        said = ", ".join(f"{n} {what}" for what, n in counts.items() if what != "wrong")
        parts.append(f"- {name}: {said}" + "".join(f"\n  - {w}" for w in counts.get("wrong", ())))
    return ["## Tests", "", *parts, ""] if parts else []


def _steps(results: Mapping[str, Any]) -> list[str]:
    cells = [
        (name, d["status"], f"{d['seconds']:.0f}", d.get("note") or "")
        for name, d in results["steps"].items()
    ]
    return ["## Steps", "", *table(("step", "", "s", "note"), cells)] if cells else []
