"""``report.md`` of a campaign: ten lines that answer, then what was measured and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..counted.verdicts import BAD
from ..pages.markdown import number, table
from . import targets

DRY = (
    "**A dry run on a CPU.** It shows that every step, table and picture works. Its times are those of a CPU on"
    " tiny maps and say nothing about a GPU: no speed on a GPU is claimed."
)
CHECKS = ("memcheck", "racecheck", "synccheck", "tests", "check", "all-tests")
PRINTED = 11_000
"""Characters of the report that a run prints at its end."""

Results = Mapping[str, Any]


def text(results: Results, pictures: Sequence[str]) -> str:
    """The whole page; ``pictures`` lie beside it."""
    rows = results["rows"]
    dry = [DRY, ""] if results["about"].get("device") == "cpu" else []
    parts = ["# Campaign", "", *dry, *(f"{i}. {a}" for i, a in enumerate(answers(results), 1)), ""]
    parts += [*_steps(results), *_checks(results), *_tests(results), *_kinds(rows), *_routes(rows)]
    measured = [] if dry else rows  # a CPU says nothing about the targets
    parts += [*_profiles(rows), *_probes(results), *_targets(measured), *_slower(measured)]
    parts += _speed(rows)
    parts += [*(line for p in pictures for line in (f"![{p}]({p})", ""))]
    return "\n".join(parts).rstrip() + "\n"


def _ms(value: float | None) -> str:
    return "-" if value is None else number(value * 1e3)


def _mib(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def answers(results: Results) -> list[str]:
    """On what; which kernels are right, which are fast, what limits each, what to do next."""
    rows, steps = results["rows"], results["steps"]
    m, about = results["machine"], results["about"]
    names = ("driver", "torch", "cuda", "cudnn", "triton", "python", "fastfilm")
    versions = ", ".join(f"{name} {m[name]}" for name in names if m.get(name))
    return [
        f"On: {m.get('device_name') or 'no rows yet'}; {versions}; commit {about.get('commit')}.",
        f"Built: {_became(steps, ('package', 'kernels', 'binaries'))}.",
        _right(results["checks"]),
        f"Checks: {_became(steps, CHECKS)}{_wrong_tests(results['tests'])}.",
        _ceilings(m),
        _fast(rows),
        _networks(rows),
        _limits(rows),
        _probed(results["probes"]),
        f"Next: {_next(results)}",
    ]


def _became(steps: Results, names: Sequence[str]) -> str:
    known = [n for n in names if n in steps]
    return ", ".join(f"{n} {steps[n]['status']}" for n in known) or "nothing yet"


def _right(checks: Sequence[Results]) -> str:
    if not checks:
        return "Kernels: not checked yet."
    bad = [f"{c['check']} {c['status']}" for c in checks if c["status"] in BAD]
    right = sum(c["status"] == "right" for c in checks)
    return f"Kernels: {right} right against float64" + (
        f"; left out of all that follows: {', '.join(bad)}." if bad else ", none wrong."
    )


def _wrong_tests(tests: Results) -> str:
    wrong = sum(len(t.get("wrong", ())) for t in tests.values())
    passed = sum(t.get("passed", 0) for t in tests.values())
    return f"; {passed} tests passed, {wrong} failed" if tests else ""


def _ceilings(m: Results) -> str:
    if not m.get("copy_gbps"):
        return "Ceilings: not measured yet."
    rates = ", ".join(f"{k} {number(v)}" for k, v in m.get("matrix_tflops", {}).items())
    return (
        f"Ceilings: copy {number(m['copy_gbps'])} GB/s, L2 {number(m.get('l2_gbps'))} GB/s, launch"
        f" {number(m.get('launch_us'))} µs, matrix product {rates} TFLOP/s."
    )


def _best(rows: targets.Rows) -> dict[tuple[str, str], Results]:
    """(layer, direction) -> the row of our fastest route."""
    found: dict[tuple[str, str], Results] = {}
    for r in targets.find(rows, suite="routes"):
        if r["provider"] != "vendor" and r.get("ratio"):
            key = r["case"], r["mode"]
            found[key] = max(found.get(key, r), r, key=lambda x: x["ratio"])
    return found


def _fast(rows: targets.Rows) -> str:
    best = _best(rows)
    if not best:
        return "Layers: not measured yet."
    ahead = sum(r["ratio"] >= 1 for r in best.values())
    worst = min(best.values(), key=lambda r: r["ratio"])
    median = statistics.median(r["ratio"] for r in best.values())
    return (
        f"Layers: the best route is faster than the vendor's convolution alone in {ahead} of {len(best)}, median"
        f" {median:.2f}×, worst {worst['ratio']:.2f}× ({worst['case']}, {worst['mode']}, {worst['provider']})."
        f"{_by_wgmma(rows)}"
    )


def _by_wgmma(rows: targets.Rows) -> str:
    pairs = targets.pairs(rows)
    said = []
    for name, ratios in (
        ("those by mma", [p.over(p.old) for p in pairs]),
        ("the vendor's", [p.over(p.vendor) for p in pairs]),
    ):
        if found := [r for r in ratios if r is not None]:
            ahead, median = sum(r >= 1 for r in found), statistics.median(found)
            said.append(f"faster than {name} in {ahead} of {len(found)}, median {median:.2f}×")
    return f" CUDA convolutions by wgmma: {'; '.join(said)}." if said else ""


def _networks(rows: targets.Rows) -> str:
    said = []
    for case in dict.fromkeys(r["case"] for r in rows if r["suite"] == "model"):
        for mode in ("training", "inference"):
            for ours in targets.find(rows, suite="model", case=case, mode=mode):
                if ours["provider"].startswith("fastfilm") and ours.get("ratio"):
                    said.append(f"{case} {mode} {ours['dtype']} {ours['ratio']:.2f}×")
                    break
    return f"Networks, against the faster eager layout: {', '.join(said) or 'not measured yet'}."


def _limits(rows: targets.Rows) -> str:
    said = []
    for r in targets.find(rows, suite="profile", provider="ncu"):
        stalls = r.get("stalls") or {}
        top = ", ".join(f"{k} {100 * v:.0f} %" for k, v in list(stalls.items())[:2])
        rates = (
            f"tensor {number(r.get('tensor_percent'))} %, DRAM {number(r.get('dram_percent'))} %"
        )
        said.append(f"{r['note']}: {top or 'no stall reasons'} ({rates})")
    reasons = [r["note"] for r in rows if r["suite"] == "profile" and r["status"] == "skipped"]
    return (
        f"Limits, by hardware counters: {'; '.join(said[:6]) or (reasons or ['not read yet'])[0]}."
    )


def _probed(probes: Sequence[Results]) -> str:
    if not probes:
        return "Probes of wgmma: not run."
    failed = [p["probe"] for p in probes if p["status"] == "FAIL"]
    count = {s: sum(p["status"] == s for p in probes) for s in ("PASS", "FAIL", "SKIPPED")}
    said = ", ".join(f"{n} {s}" for s, n in count.items() if n)
    return f"Probes of wgmma: {said}{': ' * bool(failed)}{', '.join(failed)}."


def _next(results: Results) -> str:
    steps, rows = results["steps"], results["rows"]
    if steps.get("kernels", {}).get("status") in ("FAILED", "cut"):
        return "mend the build (logs/kernels.log in the bundle)."
    bad = [c["check"] for c in results["checks"] if c["status"] in BAD]
    if bad:
        return (
            f"mend {', '.join(bad[:6])} (logs/smoke in the bundle), then --from with --only smoke."
        )
    failed = [n for n, s in steps.items() if s["status"] == "FAILED"]
    if failed:
        return f"read why {', '.join(failed)} FAILED."
    if results["about"].get("device") == "cpu":
        return "run it on a GPU; nothing here needs mending."
    left = [n for n, s in steps.items() if s["status"] in ("cut", "skipped")]
    best = _best(rows)
    slow = [r for r in sorted(best.values(), key=lambda r: r["ratio"]) if r["ratio"] < 1][:3]
    said = [f"make {r['case']}, {r['mode']} faster ({r['ratio']:.2f}×)" for r in slow]
    said += [f"go on with --from for {', '.join(left)}"] if left else []
    return "; ".join(said) + "." if said else "nothing is left."


def _checks(results: Results) -> list[str]:
    cells = [
        (c["check"], c["status"], number(c.get("error"), 2), c.get("note") or "")
        for c in results["checks"]
        if c["status"] != "right"
    ]
    head = ("check", "", "error", "note")
    return ["## Kernels that are not right", "", *table(head, cells)] if cells else []


def _kinds(rows: targets.Rows) -> list[str]:
    """The CUDA convolutions by mma and by wgmma beside the vendor's, a line a layer and direction."""
    cells = []
    for p in targets.pairs(rows):
        ratios = [p.over(peer) for peer in (p.old, p.vendor)]
        times = [_plain(r) for r in (p.old, p.new, p.vendor)]
        said = ["-" if r is None else f"{r:.2f}×" for r in ratios]
        cells.append((p.case, p.mode, *times, *said, _taken(p)))
    head = ("layer", "direction", "by mma", "by wgmma", "vendor", "mma / wgmma", "vendor / wgmma")
    text = (
        "ms and TFLOP/s, with everything around the convolution; the vendor's is the convolution alone. The last"
        " column is what the extension takes by itself, bold where the other kind was faster."
    )
    title = "## CUDA convolutions by mma and by wgmma"
    return [title, "", text, "", *table((*head, "taken"), cells)] if cells else []


def _taken(p: targets.Pair) -> str:
    if p.new.get("chosen") is None:
        return "-"
    kind, faster = "wgmma" if p.new["chosen"] else "mma", p.over(p.old)
    wrong = faster is not None and (faster >= 1) != p.new["chosen"]
    return f"**{kind}**" if wrong else kind


def _plain(r: Results | None) -> str:
    if r is None or not r["median_s"]:
        return _route(r)
    return f"{_ms(r['median_s'])} {number(r.get('tflops'))}"


def _routes(rows: targets.Rows) -> list[str]:
    found = [r for r in rows if r["suite"] == "routes" and r["mode"] != "all" and not _untimed(r)]
    providers = list(dict.fromkeys(r["provider"] for r in found if r["median_s"]))
    cells = []
    for key in dict.fromkeys((r["case"], r["mode"]) for r in found):
        of = {r["provider"]: r for r in found if (r["case"], r["mode"]) == key}
        cells.append((*key, *(_route(of.get(p)) for p in providers)))
    head = ("layer", "direction", *(p.removeprefix("fastfilm-") for p in providers))
    said = "ms, TFLOP/s, and the time of the vendor's convolution alone over it."
    return ["## Layers by route", "", said, "", *table(head, cells)] if providers else []


def _route(r: Results | None) -> str:
    if r is None:
        return "-"
    if not r["median_s"]:
        return f"{r['status']} {(r.get('note') or '')[:60]}"
    ratio = f" {r['ratio']:.2f}×" if r.get("ratio") and r["provider"] != "vendor" else ""
    return f"{_ms(r['median_s'])} {number(r.get('tflops'))}{ratio}"


COUNTERS = {
    "registers": "registers",
    "occupancy %": "occupancy_percent",
    "tensor %": "tensor_percent",
    "DRAM %": "dram_percent",
    "L2 %": "l2_percent",
    "SM %": "sm_percent",
    "issue %": "issue_percent",
    "bank conflicts %": "conflict_percent",
}


def _profiles(rows: targets.Rows) -> list[str]:
    cells = []
    for r in targets.find(rows, suite="profile", provider="ncu"):
        stalls = ", ".join(f"{k} {100 * v:.0f} %" for k, v in (r.get("stalls") or {}).items())
        figures = [number(r.get(k)) for k in COUNTERS.values()]
        cells.append(
            (r["case"], r["mode"], r.get("note") or "", _ms(r["median_s"]), *figures, stalls)
        )
    head = ("layer", "direction", "kernel", "ms", *COUNTERS, "stalls")
    return ["## Hardware counters", "", *table(head, cells)] if cells else []


def _probes(results: Results) -> list[str]:
    cells = []
    for p in results["probes"]:
        figure = f"{number(p.get('figure'))} {p.get('unit') or ''}"
        cells.append((str(p.get("probe")), p["status"], figure, p.get("note") or ""))
    return ["## Probes", "", *table(("probe", "", "figure", "note"), cells)] if cells else []


def _targets(rows: targets.Rows) -> list[str]:
    cells = []
    for v in targets.verdicts(rows):
        t = v.target
        value = "-" if v.value is None else f"{number(v.value)} {t.unit}"
        cells.append((t.figure, f"≥ {number(t.least)} {t.unit}", value, v.word))
    return ["## Targets", "", *table(("figure", "to reach", "measured", ""), cells)]


def _untimed(r: Results) -> bool:
    """Whether a row says no more than that there was no time for it."""
    return r["status"] == "skipped" and str(r.get("note")).startswith("no time left")


def _slower(rows: targets.Rows) -> list[str]:
    found = [(case, peer, f"{ratio:.2f}×") for case, peer, ratio in targets.slower(rows)]
    head = ("case", "fastest peer", "its time over ours")
    return ["## Where a peer was faster", "", *table(head, found)] if found else []


def _speed(rows: targets.Rows) -> list[str]:
    parts = []
    for suite in ("model", "converted", "ops"):
        cells = [
            (
                f"{r['case']}, {r['mode']}, {r['dtype']}", r["provider"], _ms(r["median_s"]),
                f"{r['ratio']:.2f}×" if r.get("ratio") else r["status"],
                "-" if r.get("fraction_of_floor") is None else f"{100 * r['fraction_of_floor']:.0f}%",
                number(r.get("tflops")), _mib(r.get("peak_bytes")), number(r.get("error"), 2), r.get("note") or "",
            )
            for r in rows
            if r["suite"] == suite and not _untimed(r)
        ]  # fmt: skip
        head = (
            "case",
            "provider",
            "median ms",
            "eager's faster layout over it",
            "of floor",
            "TFLOP/s",
        )
        head += ("peak MiB", "error", "note")
        parts += [f"## Suite {suite}", "", *table(head, cells)] if cells else []
    return parts


def _tests(results: Results) -> list[str]:
    parts = []
    for name, counts in results["tests"].items():
        said = ", ".join(f"{n} {what}" for what, n in counts.items() if what != "wrong")
        parts.append(f"- {name}: {said}" + "".join(f"\n  - {w}" for w in counts.get("wrong", ())))
    return ["## Tests", "", *parts, ""] if parts else []


def _steps(results: Results) -> list[str]:
    cells = [
        (name, d["status"], f"{d['seconds']:.0f}", d.get("note") or "")
        for name, d in results["steps"].items()
    ]
    late = sum(map(_untimed, results["rows"]))
    said = [f"{late} rows were left out for want of time (results.json names them).", ""]
    parts = ["## Steps", "", *table(("step", "", "s", "note"), cells)] if cells else []
    return parts + said * bool(late)
