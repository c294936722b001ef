"""What a run found, in five sentences and a chart of bars for a terminal.

A time that stands beside a ratio is eager's median over that ratio, so that the two agree. The ratio is the median
over the rounds of eager's time over the other's in the same round; a quotient of two medians would show how the
machine's speed changed between rounds as well.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from .record import EAGER, FAILED, NO_TIME, SKIPPED, Row
from .table import SHORT, milliseconds

COMPILED = ("compile", "compile-max-autotune", "compile-contiguous")
OURS = "fastfilm"
STANDS_IN = "fastfilm-reference"
"""The provider that is eager PyTorch again, where none of fastfilm's kernels runs."""

CHARTED = 6
"""Most groups of bars."""

WIDTH = 36
"""Characters of the longest bar."""

Rows = Sequence[Row]


@dataclass(frozen=True)
class Group:
    """The rows of one case, mode and dtype that have a ratio.

    Attributes:
        base: the faster layout of eager PyTorch, whose ratio is 1.
        ours: fastfilm's own choice, or the fastest of its backends where each was forced.
        others: the remaining ones.
    """

    base: Row
    ours: Row | None
    others: tuple[Row, ...]

    @property
    def title(self) -> str:
        """Case, mode and dtype."""
        return f"{self.base.case}, {self.base.mode}, {SHORT.get(self.base.dtype, self.base.dtype)}"

    def seconds(self, row: Row) -> float:
        """Time of a call of ``row`` in the rounds in which eager took its median."""
        assert self.base.median_s is not None and row.ratio is not None
        return self.base.median_s / row.ratio


def groups(rows: Rows, suite: str) -> Iterator[Group]:
    """The cases of a suite in which eager PyTorch was timed, in the order of the run."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for r in rows:
        if r.suite == suite and r.ratio is not None and r.median_s is not None:
            found.setdefault((r.case, r.mode, r.dtype), []).append(r)
    for members in found.values():
        base = next((r for r in members if r.provider in EAGER and r.ratio == 1.0), None)
        if base is None:
            continue
        mine = [r for r in members if r.provider.startswith(OURS) and r.provider != STANDS_IN]
        chosen = [r for r in mine if r.provider == OURS] or mine
        ours = max(chosen, key=lambda r: r.ratio or 0.0, default=None)
        others = tuple(r for r in members if r not in mine and r.provider not in EAGER)
        yield Group(base, ours, others)


def mean(ratios: Sequence[float]) -> float:
    """Geometric mean of ratios, of which there is at least one."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def sentences(rows: Rows, machine: dict[str, Any]) -> list[str]:
    """Five: what was measured, eager PyTorch, torch.compile, memory, and what to do next."""
    networks, blocks = (list(groups(rows, suite)) for suite in ("model", "ops"))
    return [
        _measured(networks, blocks, machine),
        _against_eager(networks, blocks),
        _against_compile(rows, [*networks, *blocks], machine),
        _memory(rows),
        _next(rows, [*networks, *blocks], machine),
    ]


def _count(n: int, one: str) -> str:
    return f"{n} {one}" if n == 1 else f"{n} {one}s"


def _measured(networks: Sequence[Group], blocks: Sequence[Group], machine: dict[str, Any]) -> str:
    where = f"{machine['device_name']}, torch {machine['torch']}"
    if machine["device"] == "cpu":
        where = f"{machine['device_name']} ({_count(machine['threads'], 'thread')}), torch {machine['torch']}"
    kinds = ((networks, "whole FiLMed U-Nets"), (blocks, "single blocks"))
    parts = [f"{_count(len(found), 'case')} of {what}" for found, what in kinds if found]
    load, busy = max(machine.get(k) or 0.0 for k in ("load", "load_end")), ""
    if machine["device"] == "cpu" and load > 1.5 * machine["cores"]:
        cores = _count(machine["cores"], "core")
        busy = f"; the machine was busy with other work (load {load:.1f} on {cores})"
    if not parts:
        return f"Nothing was timed on {where}: the run ended before the first comparison was complete{busy}."
    said = f"Measured on {where}: {' and '.join(parts)}, fastfilm beside eager PyTorch"
    return said + (
        f"{busy}, so times are rough." if busy else "; all took turns in the same rounds."
    )


def _speed(found: Sequence[tuple[Group, float]]) -> str:
    """``1.54 times as fast`` for one case; mean and range for several."""
    ratios = [ratio for _, ratio in found]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f} times as fast"
    text = f"{mean(ratios):.2f} times as fast in the geometric mean"
    return f"{text} ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} cases)"


def _ours(found: Sequence[Group]) -> list[tuple[Group, float]]:
    return [(g, g.ours.ratio) for g in found if g.ours is not None and g.ours.ratio is not None]


def _against_eager(networks: Sequence[Group], blocks: Sequence[Group]) -> str:
    every = [*networks, *blocks]
    if every and not _ours(every) and any(r.provider == STANDS_IN for g in every for r in g.others):
        return "None of fastfilm's kernels runs here: its reference, which is eager PyTorch again, stood in."
    parts = [
        f"{_speed(found)} on {what}"
        for found, what in ((_ours(networks), "whole networks"), (_ours(blocks), "single blocks"))
        if found
    ]
    if not parts:
        return "There is no speed of fastfilm against eager PyTorch: no comparison of the two was complete."
    said = f"Against eager PyTorch in its faster memory layout, fastfilm is {' and '.join(parts)}"
    slower = sum(r < 1 for _, r in _ours(every))
    return said + (f"; in {_count(slower, 'case')} it is slower." if slower else ".")


def _against_compile(rows: Rows, found: Sequence[Group], machine: dict[str, Any]) -> str:
    version = f"torch.compile of torch {machine['torch']}"
    pairs = []
    for group, ours in _ours(found):
        theirs = [r.ratio for r in group.others if r.provider in COMPILED and r.ratio]
        if theirs:
            pairs.append((group, ours / max(theirs)))
    if pairs:
        return f"Against {version}, fastfilm is {_speed(pairs)}, both by way of eager in their own rounds."
    left_out = [r for r in rows if r.provider in COMPILED and r.status == SKIPPED and r.note]
    reason = left_out[0].note if left_out else "this run does not compile"
    return f"Against {version} nothing was measured: {reason.removesuffix('.')}."


def _memory(rows: Rows) -> str:
    for suite in ("memory", "model", "ops"):
        kept: dict[tuple[str, str, str], dict[str, int]] = {}
        for r in rows:
            if r.suite == suite and r.saved_bytes and r.status != SKIPPED:
                kept.setdefault((r.case, r.mode, r.dtype), {})[r.provider] = r.saved_bytes
        for (case, _, dtype), sizes in kept.items():
            ours = [n for n in sizes if n.startswith(OURS) and n != STANDS_IN]
            if ours and "eager" in sizes:
                least = min(ours, key=lambda n: sizes[n])
                here, there = (sizes[n] / 2**20 for n in (least, "eager"))
                return (
                    f"For the backward pass of {case} in {dtype}, fastfilm keeps {here:.1f} MiB in memory and"
                    f" eager PyTorch {there:.1f} MiB, {there / here:.1f} times as much."
                )
    return "Memory was not measured: there was no time left for it."


def _next(rows: Rows, found: Sequence[Group], machine: dict[str, Any]) -> str:
    wrong = [r for r in rows if r.status == FAILED and r.provider.startswith(OURS)]
    if wrong:
        return (
            f"Next: {_count(len(wrong), 'row')} of fastfilm FAILED, see the notes in the table;"
            " `fastfilm check` says which kernels are wrong on this machine."
        )
    if not _ours(found):
        return (
            "Next: give the run more time (`--minutes 3`), or repeat it when the machine is idle."
        )
    if machine["device"] == "cuda":
        return (
            "Next: `fastfilm tune` chooses the fastest kernels of this GPU by measurement, and"
            " `fastfilm.convert(model)` takes your own network there."
        )
    more = any(r.status == SKIPPED and r.note.startswith(NO_TIME) for r in rows)
    rest = " and what there was no time for here" if more else ""
    return (
        "Next: call `fastfilm.convert(model)` on your own network; `python benchmarks/run.py`, three minutes,"
        f" measures torch.compile{rest} as well."
    )


@dataclass(frozen=True)
class Bar:
    """A line of the chart: a title without ``ratio``, or a provider's bar."""

    label: str
    ratio: float | None = None
    seconds: float = 0.0
    ours: bool = False


def bars(rows: Rows) -> list[Bar]:
    """Speed over eager PyTorch's: networks first, single blocks where there is room."""
    chosen = [*groups(rows, "model"), *groups(rows, "ops")]
    found = []
    for group in [g for g in chosen if g.ours is not None][:CHARTED]:
        found.append(Bar(group.title))
        for row in (group.base, *group.others, group.ours):
            if row is not None and row.ratio is not None:
                mine = row is group.ours
                found.append(Bar(row.provider, row.ratio, group.seconds(row), mine))
    return found


def chart(found: Sequence[Bar], block: str = "█") -> list[str]:
    """The bars as text; the longest one has ``WIDTH`` blocks."""
    if not found:
        return []
    most = max(b.ratio or 0.0 for b in found)
    label = max(len(b.label) for b in found if b.ratio is not None)
    lines = ["Speed over eager PyTorch's (longer is faster)"]
    for b in found:
        if b.ratio is None:
            lines.append(b.label)
            continue
        bar = block * max(1, round(WIDTH * b.ratio / most))
        lines.append(
            f"  {b.label:<{label}}  {bar:<{WIDTH}}  {b.ratio:5.2f}×  {milliseconds(b.seconds):>6} ms"
        )
    return lines


def show(rows: Rows, machine: dict[str, Any], out: TextIO | None = None) -> None:
    """Prints sentences and chart; the bars in colour where the package rich and a terminal are there."""
    out = out or sys.stdout
    found = bars(rows)
    try:
        "█×".encode(out.encoding or "utf-8")
        lines = chart(found)
    except UnicodeEncodeError:
        lines = [line.replace("×", "x") for line in chart(found, "#")]
    text = ["", *sentences(rows, machine), "", *lines]
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print("\n".join(text), file=out)
        return
    console = Console(file=out, highlight=False, soft_wrap=True)
    styles = ["bold", *("bold" if b.ratio is None else "blue" if b.ours else "dim" for b in found)]
    plain = len(text) - len(lines)
    for i, line in enumerate(text):
        console.print(Text(line, style=styles[i - plain] if i >= plain else ""))
