"""What a run prints and draws: a header, one aligned table, one plot."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .record import EAGER, FAILED, NO_TIME, SKIPPED, Row

LABELS = ("suite", "case", "mode", "dtype", "provider")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def header(machine: dict[str, Any]) -> str:
    """The machine, the versions and the ceilings, in a few lines."""
    rates = ", ".join(
        f"{SHORT.get(k, k)} {v:.3g}" for k, v in machine.get("matrix_tflops", {}).items()
    )
    lines = [
        f"{machine['device_name']}, {machine['threads']} threads of {machine['cores']} cores,"
        f" load {machine['load']}",
        f"driver {machine['driver']}  torch {machine['torch']}  cuda {machine['cuda']}"
        f"  cudnn {machine['cudnn']}  triton {machine['triton']}  python {machine['python']}"
        f"  fastfilm {machine['fastfilm']}  commit {machine['commit']}",
    ]
    if rates:
        copy = machine["copy_gbps"]
        lines.append(f"ceilings of this run: copy {copy:.3g} GB/s, matrix product {rates} TFLOP/s")
    return "\n".join(lines)


def milliseconds(value: float | None) -> str:
    """Milliseconds with three digits."""
    return "-" if value is None else _three(value * 1e3)


def _three(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def mib(value: float | None) -> str:
    """Mebibytes."""
    return "-" if value is None else f"{value / 2**20:.1f}"


def error(value: float | None) -> str:
    """An error with two digits."""
    return "-" if value is None else f"{value:.1e}"


def ratio(row: Row) -> str:
    """The speed-up, or why there is none."""
    if row.status in (FAILED, SKIPPED):
        return row.status
    return "-" if row.ratio is None else f"{row.ratio:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def _rate(value: float | None) -> str:
    return "-" if value is None else _three(value)


COLUMNS = (
    ("provider", lambda r: r.provider),
    ("median ms", lambda r: milliseconds(r.median_s)),
    ("p20", lambda r: milliseconds(r.p20_s)),
    ("p80", lambda r: milliseconds(r.p80_s)),
    ("vs eager", ratio),
    ("TFLOP/s", lambda r: _rate(r.tflops)),
    ("GB/s", lambda r: _rate(r.gbps)),
    ("floor ms", lambda r: milliseconds(r.floor_s)),
    ("of floor", lambda r: _percent(r.fraction_of_floor)),
    ("peak MiB", lambda r: mib(r.peak_bytes)),
    ("saved MiB", lambda r: mib(r.saved_bytes)),
    ("error", lambda r: error(r.error)),
    ("eager err", lambda r: error(r.eager_error)),
    ("max diff", lambda r: error(r.extra.get("max_abs_diff"))),
)

STATIC_COLUMNS = ("registers", "stack_bytes", "shared_bytes", "mma", "blocks", "l2_ratio")


def no_time(row: Row) -> bool:
    """Whether the run's end left the row out."""
    return row.status == SKIPPED and row.note.startswith(NO_TIME)


def left_out(rows: Iterable[Row]) -> str:
    """One line: what there was no time for; empty where there was time for all."""
    missing: dict[tuple[str, str, str], list[str]] = {}
    for row in filter(no_time, rows):
        key = row.suite, row.dtype, f"{row.case} {row.mode}".strip()
        missing.setdefault(key, []).append(row.provider)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (suite, dtype, case), providers in missing.items():
        who = "all" if "all" in providers else ", ".join(providers)
        groups.setdefault((suite, dtype, who), []).append(case)
    parts = []
    for (suite, dtype, provider), cases in groups.items():
        which = cases[0] if len(cases) == 1 else f"{len(cases)} cases"
        who = "" if provider == "all" else f"{provider} in "
        parts.append(f"{suite} {dtype}".strip() + f": {who}{which}")
    return f"no time left for: {'; '.join(parts)}" if parts else ""


def align(cells: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]


def _static_figure(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


DRIFT = 0.05
"""Part of a ratio by which the quotient of the medians may differ from it without a mark."""

DRIFTED = (
    "~ the machine's speed changed between rounds: this ratio is the median over the rounds of eager's time over"
    "\n  this row's in the same round, and the quotient of the two medians is another number"
)


def drifted(rows: Iterable[Row]) -> set[int]:
    """``id`` of each row whose ratio is not the quotient of eager's median and its own, to within ``DRIFT``."""
    rows = [r for r in rows if r.ratio is not None and r.median_s]
    base = {
        (r.suite, r.case, r.mode, r.dtype): r.median_s
        for r in rows
        if r.provider in EAGER and r.ratio == 1.0
    }
    found = set()
    for r in rows:
        eager = base.get((r.suite, r.case, r.mode, r.dtype))
        if eager and r.median_s and r.ratio and abs(eager / r.median_s / r.ratio - 1) > DRIFT:
            found.add(id(r))
    return found


def table(rows: Iterable[Row]) -> str:
    """All rows, a line each, under a line for their case; the best eager layout is the 1.00x.

    What there was no time for is left to the line that names it all.
    """
    rows = [r for r in rows if not no_time(r)]
    timed = [r for r in rows if r.suite != "static"]
    parts = []
    if timed:
        names = [title for title, _ in COLUMNS]
        cells = [[show(r) for _, show in COLUMNS] for r in timed]
        marked = drifted(timed)
        for row, line in zip(timed, cells, strict=True):
            line[names.index("vs eager")] += ("~" if id(row) in marked else " ") * bool(marked)
        lines = align([names, *cells])
        parts += ["", lines[0]]
        previous = None
        for row, line in zip(timed, lines[1:], strict=True):
            case = f"{row.suite}: {row.case}, {row.mode}, {SHORT.get(row.dtype, row.dtype)}"
            if case != previous:
                parts += ["", case]
                previous = case
            parts.append(f"{line}  {row.note}".rstrip())
        if marked:
            parts += ["", DRIFTED]
    static = [r for r in rows if r.suite == "static"]
    if static:
        head = ["kernel", "status", *STATIC_COLUMNS]
        body = [
            [
                r.case if r.provider in ("", "triton") else f"{r.provider} {r.case}",
                r.status,
                *(_static_figure(r.extra.get(c)) for c in STATIC_COLUMNS),
            ]
            for r in static
        ]
        parts += ["", "static: shipped kernel configurations", *align([head, *body])]
    return "\n".join(parts)


COLOURS = {
    "eager": "#9e9e9e",
    "eager-channels-last": "#616161",
    "eager-no-film": "#cfcfcf",
    "paper": "#c0842d",
    "compile": "#4c8c6b",
    "compile-max-autotune": "#7cb79a",
}
OURS = ("#1f5fa8", "#6a9bd1", "#123a66")


def colour(provider: str, ours: list[str]) -> str:
    """A fixed colour for each peer, shades of blue for fastfilm's backends."""
    if provider in COLOURS:
        return COLOURS[provider]
    return OURS[ours.index(provider) % len(OURS)] if provider in ours else "#b07aa1"


def plot(rows: Sequence[Row], machine: dict[str, Any], path: Path) -> str | None:
    """Bars of speed-up and of saved bytes; returns why there is no picture, or None."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "matplotlib is not installed"
    suites = [s for s in ("model", "ops", "peers") if any(r.suite == s and r.ratio for r in rows)]
    memory = [r for r in rows if r.suite == "memory" and r.saved_bytes]
    memory = [r for r in memory if r.case == memory[0].case]
    if not suites and not memory:
        return "no timed row and no counted row"
    first = next((r for s in suites for r in rows if r.suite == s and r.ratio), None)
    chosen = [r for r in rows if first and r.suite == first.suite and r.status != SKIPPED]
    groups = list(dict.fromkeys((r.case, r.mode, r.dtype) for r in chosen))[:12]
    chosen = [r for r in chosen if (r.case, r.mode, r.dtype) in groups]
    names = list(dict.fromkeys(r.provider for r in chosen))
    ours = [n for n in names if n.startswith("fastfilm")]
    bars = len(groups) * (len(names) + 1)
    height = max(3.2, 0.2 * bars + 1.8, 0.5 * len(memory) + 1.8)
    panels = bool(groups) + bool(memory)
    figure, axes = plt.subplots(
        1, panels, figsize=(4 + 4.2 * panels, height), squeeze=False, layout="constrained"
    )
    if groups:
        _speed_bars(axes[0][0], chosen, groups, names, ours)
    if memory:
        _memory_bars(axes[0][-1], memory, [r.provider for r in memory if "fastfilm" in r.provider])
    if groups:
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False
        )
    figure.supxlabel(conditions(machine), fontsize=7.5, color="#444444")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return None


def _speed_bars(
    axis: Any,
    rows: Sequence[Row],
    groups: list[tuple[str, str, str]],
    names: list[str],
    ours: list[str],
) -> None:
    step = len(names) + 1
    for i, name in enumerate(names):
        places, values, labels = [], [], []
        for g, group in enumerate(groups):
            row = next(
                (r for r in rows if r.provider == name and (r.case, r.mode, r.dtype) == group), None
            )
            if row is None:
                continue
            places.append(g * step + i)
            values.append(row.ratio or 0.0)
            labels.append(f"{row.ratio:.2f}×" if row.ratio else row.status)
        bars = axis.barh(places, values, height=0.9, color=colour(name, ours), label=name)
        axis.bar_label(bars, labels, padding=2, fontsize=7)
    axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    titles = [f"{textwrap.fill(c, 30)}\n{m}, {SHORT.get(d, d)}" for c, m, d in groups]
    centres = [g * step + (len(names) - 1) / 2 for g in range(len(groups))]
    axis.set_yticks(centres, titles, fontsize=7.5)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * max([r.ratio or 0.0 for r in rows] + [1.0]))
    axis.set_xlabel("speed relative to the faster eager layout (higher is faster)")
    axis.set_title(f"Time per call, suite {rows[0].suite}", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def _memory_bars(axis: Any, rows: Sequence[Row], ours: list[str]) -> None:
    values = [(r.saved_bytes or 0) / 2**20 for r in rows]
    colours = [colour(r.provider, ours) for r in rows]
    bars = axis.barh([r.provider for r in rows], values, color=colours)
    axis.bar_label(bars, [f"{v:.0f}" for v in values], padding=2, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(values))
    axis.set_xlabel("MiB kept for the backward pass (lower is better)")
    axis.set_title(f"Saved activations, {rows[0].case}, fp32", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def conditions(machine: dict[str, Any]) -> str:
    text = (
        f"{machine['device_name']}, {machine['threads']} threads; torch {machine['torch']},"
        f" triton {machine['triton']}, cudnn {machine['cudnn']}; medians of interleaved rounds"
    )
    return textwrap.fill(text, 110)
