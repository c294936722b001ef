"""A gate on figures that any machine can count: they may not grow against the committed ones.

Feature maps moved, kernels on maps and bytes kept of a small FiLMed U-Net by each backend and route; Python's
function calls and time of a block; registers and spills of the compiled tiles, instructions of the loops of
kernels of warpgroups, and the clock models' times of the CUDA convolutions (from a run of the static suite).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastfilm

from ..counted import python_calls, traffic
from ..counted.inside import runs_on_cpu
from ..measure.harness import saved_bytes
from ..measure.record import FAILED, Row
from ..measure.session import Case, Session

BASELINE = Path(__file__).resolve().parents[1] / "results" / "gate.json"

PLANS: tuple[tuple[str, str | None], ...] = (
    ("cpu", None),
    ("triton", "fused"),
    ("triton", "composed"),
)

LOOPS = {
    "instructions of the main loop": "main_loop_instructions",
    "instructions of a voxel's transform": "transform_instructions",
}
"""Figure of a kernel of warpgroups -> field of its row in the static suite."""


@dataclass(frozen=True)
class Figure:
    """A count, and how much more than the committed one still passes (a share of it)."""

    name: str
    value: float
    allowed: float = 0.0


def network() -> tuple[nn.Module, Tensor, Tensor]:
    """A FiLMed U-Net so small that Triton's interpreter takes seconds for it, with its input."""
    torch.manual_seed(0)
    net = fastfilm.FiLMedUNet(1, 1, base_filters=8, depth=1, metadata_size=3)
    return net, torch.randn(1, 1, 16, 16), torch.eye(3)[:1]


def maps(name: str, route: str | None) -> Iterator[Figure]:
    """Maps moved a convolution and kernels on maps, forward, backward and inference; bytes kept."""
    net, image, rows = network()
    said = name if route is None else f"{name}/{route}"
    convolutions = sum(isinstance(m, fastfilm.ConvNormFiLM2d) for m in net.modules())
    with fastfilm.backend(name, route):
        found = traffic.of_step(net, image, rows)
        kept = saved_bytes(lambda: net.train()(image, rows), list(net.parameters()))
    for mode, launches in found.items():
        moved = sum(k.passes for k in launches) / max(convolutions, 1)
        yield Figure(f"{said}: maps moved a convolution, {mode}", moved)
        kernels = sum(k.passes > 0 for k in launches)
        yield Figure(f"{said}: kernels on maps, {mode}", kernels)
    yield Figure(f"{said}: bytes kept", kept)


def calls_of(function: Callable[[], object]) -> int:
    """Python functions that one call enters (those written in C are not counted)."""
    for _ in range(2):  # what is computed once is there
        function()
    return python_calls.counted(function, "")[0].calls


def cpu_seconds(
    ours: Callable[[], object], theirs: Callable[[], object], calls: int = 100, rounds: int = 15
) -> tuple[float, float]:
    """Least CPU seconds of a call of ours, and the median ratio to theirs; the two take turns."""

    def once(function: Callable[[], object]) -> float:
        begun = time.process_time()
        for _ in range(calls):
            function()
        return (time.process_time() - begun) / calls

    pairs = [(once(ours), once(theirs)) for _ in range(rounds)]
    return min(o for o, _ in pairs), statistics.median(o / t for o, t in pairs)


def python() -> Iterator[Figure]:
    """Python's work for one block on a map of 8 × 8, and its time over that of PyTorch's layers."""
    block = fastfilm.ConvNormFiLM2d(8, 8, norm="instance", order="conv-norm-act-film")
    plain = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True), nn.ReLU()
    )
    image, gamma, beta = torch.randn(1, 8, 8, 8), torch.rand(1, 8), torch.rand(1, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for mode in ("training", "inference"):
            with torch.set_grad_enabled(mode == "training"):
                ours = partial(block.train(mode == "training"), image, gamma, beta)
                theirs = partial(plain.train(mode == "training"), image)
                # a comprehension is a function of its own up to Python 3.11
                yield Figure(f"Python functions of a block, {mode}", calls_of(ours), 0.1)
                seconds, ratio = cpu_seconds(ours, theirs)
                # a busy or another machine gives other numbers: only a multiple is an error, calls are exact
                yield Figure(f"time of a block over PyTorch's layers, {mode}", ratio, 1.0)
                yield Figure(f"Python µs of a block, {mode}", seconds * 1e6, 3.0)
    finally:
        torch.set_num_threads(threads)


def tiles(path: Path) -> Iterator[Figure]:
    """Spilled bytes, registers and loops of compiled kernels and the models' µs, from rows of a static suite."""
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        name = f"{row['provider']} {row['case']} {row['dtype']}"
        if row.get("registers") is not None:
            yield Figure(f"stack bytes: {name}", row["stack_bytes"])
            yield Figure(f"registers: {name}", row["registers"], 0.1)
        if row.get("main_loop_mma") is not None:
            yield Figure(f"products of the main loop: {name}", row["main_loop_mma"])
            for figure, field in LOOPS.items():
                yield Figure(f"{figure}: {name}", row[field], 0.1)
        if row.get("predicted_us") is not None:
            layer = row["case"].removeprefix("clock model: ")
            name = f"clock model: µs {layer} {row['provider']}"
            yield Figure(name, row["predicted_us"], 0.03)


def figures(static: str | None) -> Iterator[Figure]:
    """All that can be counted here."""
    for name, route in PLANS:
        if runs_on_cpu(name):
            yield from maps(name, route)
    yield from python()
    if static is not None and Path(static).exists():
        yield from tiles(Path(static))


def run(session: Session) -> None:
    """A row for each figure; one that has grown FAILED."""
    known = json.loads(BASELINE.read_text(encoding="utf-8"))["figures"]
    found = list(figures(session.static_rows))
    rows = [judged(session, figure, known.get(figure.name)) for figure in found]
    for row in rows:
        session.record.add(row)
    moved = [r for r in rows if r.extra["value"] != r.extra["committed"]]
    for row in moved:
        print(f"{row.status:6}  {row.case}: {row.note}")
    print(f"gate: {len(rows)} figures, {len(rows) - len(moved)} as committed")
    if session.update_gate:
        write(found)


def judged(session: Session, figure: Figure, committed: float | None) -> Row:
    """The row of a figure beside the committed one."""
    value = float(f"{figure.value:.6g}")
    case = Case("gate", figure.name, "", "", extra={"value": value, "committed": committed})
    row = session.row(case, "fastfilm")
    if committed is None:
        row.note = f"{figure.value:.6g}, new"
        return row
    limit = committed * (1 + figure.allowed)
    row.note = f"{figure.value:.6g}, committed {committed:.6g}"
    if value > limit * (1 + 1e-9) and not session.update_gate:
        row.status = FAILED
        row.note += f": at most {limit:.6g} allowed"
    elif figure.allowed == 0 and value < committed:
        row.note += ": better, --update-gate writes it down"
    return row


def write(found: list[Figure]) -> None:
    """Commits the figures; those that were not counted now stay as they were."""
    before = (
        json.loads(BASELINE.read_text(encoding="utf-8"))["figures"] if BASELINE.exists() else {}
    )
    whole = before | {f.name: float(f"{f.value:.6g}") for f in found}
    about = "counts that --suite gate compares with; written by --suite gate --update-gate"
    text = json.dumps({"about": about, "figures": whole}, indent=1, ensure_ascii=False)
    BASELINE.write_text(text + "\n", encoding="utf-8")
