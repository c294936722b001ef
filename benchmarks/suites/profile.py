"""The CUDA convolutions from inside: hardware counters where ncu may read them, and stages left out everywhere."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..counted import inside, verdicts
from ..counted.deciding_layers import SUBJECTS
from ..counted.roofline import DTYPES
from ..measure.harness import median_call
from ..measure.session import Case, Session
from ..subjects.layers import STAGES, LayerStep, steady
from .routes import DIRECTIONS, LAUNCHED, MMA, OURS, WGMMA, routes, scope, step_of

LAYER = SUBJECTS[0]
MODE = "training"
KERNELS = {kernel: direction for direction, (kernel, *others) in LAUNCHED.items() if not others}
"""Kernel -> the direction that launches it, once. By warpgroup products it has ``verdicts.SM90`` in front."""

SECTIONS = (
    "SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis_Tables", "Occupancy", "LaunchStats",
)  # fmt: skip

METRICS = {
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "dram__bytes.sum": "dram_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": "tensor_percent",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": "hmma_percent",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared_wavefronts",
}
"""ncu's counters, and what they are called in the record; one that a GPU lacks is left out."""

STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
"""Warps in a state for each instruction issued; ``selected`` is the one that issues it."""

NCU_SECONDS = 30.0


def run(session: Session) -> None:
    """Counters of each CUDA convolution, then the layer with one stage after the other left out."""
    dtype = session.dtypes[0]
    for names in kinds(dtype):
        if not session.budget.spent():
            counters(session, names, dtype)
    if not session.budget.spent():
        stages(session, dtype)


def kinds(dtype: str) -> list[tuple[str, ...]]:
    """The kernels, each kind for itself: one that does not come back takes no counters of the other along."""
    plain = tuple(KERNELS)
    if "wgmma" not in inside.instructions(DTYPES[dtype]):
        return [plain]
    by_warpgroups = (verdicts.SM90 + k for k in plain)
    ours = tuple(k for k in by_warpgroups if inside.why_left_out(k, DTYPES[dtype]) is None)
    return [ours, plain] if ours else [plain]


def launched_by(name: str, dtype: str) -> tuple[str, str]:
    """The direction and the route that launch a kernel."""
    kernel = name.removeprefix(verdicts.SM90)
    if kernel != name:
        return KERNELS[kernel], WGMMA
    both = "wgmma" in inside.instructions(DTYPES[dtype])
    return KERNELS[kernel], MMA if both else OURS


def _case(session: Session, dtype: str) -> Case:
    name = (LAYER if session.device == "cuda" else LAYER.tiny()).name
    return Case("profile", name, MODE, dtype, extra={"layer": name})


def _seconds(session: Session, step: LayerStep) -> float:
    call, _ = steady(step, session.device)
    return median_call(call, session.clock, session.effort)


def stages(session: Session, dtype: str) -> None:
    """The layer on the CUDA kernels (without them by the automatic choice), whole and with stages left out."""
    subject = LAYER if session.device == "cuda" else LAYER.tiny()
    session.say(f"profile: {subject.name}, stages")
    step = partial(LayerStep, subject.block, session.device, dtype, MODE)
    if {OURS, MMA} & {*routes(session.device, dtype)[0]}:
        step = partial(step, scope=partial(scope, OURS))
    case, whole = _case(session, dtype), _seconds(session, step())
    session.record.add(session.row(case, "fastfilm", median_s=whole, note="whole layer"))
    for without in (*((stage,) for stage in STAGES), STAGES):
        seconds = _seconds(session, step(without=without))
        name = f"without {', '.join(without)}"
        row = session.row(case, "fastfilm", median_s=seconds, note=name)
        row.extra |= {"variant": name, "difference_s": whole - seconds}
        session.record.add(row)


def counters(session: Session, names: Sequence[str], dtype: str) -> None:
    """A row for each of the kernels by ncu, or one row that says why there is none."""
    case, reason = _case(session, dtype), why_not_ncu(session.device)
    if reason is None:
        session.say(f"profile: ncu, {', '.join(names)}")
        text, found, reason = under_ncu(names, dtype)
        path = session.record.path
        if path is not None and text:
            path = path.with_name(f"{path.stem}-ncu-{'-'.join(names)}.csv")
            path.write_text(text, encoding="utf-8")
        for kernel, values in found:
            row = session.row(
                case, "ncu", note=kernel_of(kernel), median_s=values.pop("time", None)
            )
            row.extra |= {"kernel": kernel[:300], "text": path and path.name, **values}
            session.record.add(row)
            session.say(f"{row.note}: {values}")
    if reason is not None:
        session.skip(case, "ncu", reason)


def why_not_ncu(device: str) -> str | None:
    """Why hardware counters are not read; None if it can be tried."""
    if device != "cuda":
        return "no GPU: no hardware counters"
    return None if shutil.which("ncu") else "ncu is not on the path"


def under_ncu(
    names: Sequence[str], dtype: str
) -> tuple[str, list[tuple[str, dict[str, Any]]], str | None]:
    """ncu's output on one launch of each kernel in a process of its own, what it says, or why it says nothing.

    Clocks are left as they are.
    """
    script = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "--suite", "profile"]
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "details"]
    command += ["--print-details", "all", "--print-metric-name", "name"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += ["--metrics", ",".join(METRICS), "--profile-from-start", "off"]
    command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:Convolve|Wgrad"]
    command += ["--launch-count", str(len(names))]
    command += [*script, "--device", "cuda", "--one", ",".join(names), "--dtype", dtype]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NCU_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return "", [], f"ncu took longer than {NCU_SECONDS:.0f} s"
    text = done.stdout + done.stderr
    found = read_csv(done.stdout)
    if found:
        return text, found, None
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line] or lines[-1:]
    return text, [], f"ncu gave no counters: {errors[0][:100] if errors else 'no output'}"


UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0,
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
}  # fmt: skip


def read_csv(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(kernel, counters in SI units) of each launch, from ncu's CSV with a line a counter (page "details").

    ``stalls`` are the three states other than issuing that warps are in most, with their shares of all states.
    ``conflict_percent`` is the share of the wavefronts of shared memory that conflicts cause, of loads and stores;
    what matrix instructions read there by themselves counts in neither.
    """
    table = text[text.find('"ID"') :] if '"ID"' in text else ""
    launches: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {}
    for line in csv.DictReader(io.StringIO(table)):
        name, kernel = line.get("Metric Name"), line.get("Kernel Name")
        if not name or kernel is None:
            continue
        _, values, states = launches.setdefault(line["ID"], (kernel, {}, {}))
        try:
            value = float(line["Metric Value"].replace(",", ""))
        except ValueError:
            continue  # "n/a": this GPU does not have it
        stall = STALL.fullmatch(name)
        if stall is not None:
            states[stall[1]] = value
        elif name in METRICS:
            values[METRICS[name]] = value * UNITS.get(line["Metric Unit"], 1.0)
    for _, values, states in launches.values():
        if values.get("shared_wavefronts") and "bank_conflicts" in values:
            share = values["bank_conflicts"] / values["shared_wavefronts"]
            values["conflict_percent"] = round(100 * share, 2)
        total = sum(states.values())
        most = sorted(states.keys() - {"selected"}, key=lambda s: -states[s])[:3]
        if total:
            values["stalls"] = {s: round(states[s] / total, 3) for s in most}
    return [(kernel, values) for kernel, values, _ in launches.values()]


WGRAD = re.compile(r"Wgrad<(?P<by_warpgroups>[^,<>]+, [^,<>]+>)?")
PLANES = re.compile(r"\b(Activated|Gradient)Planes\b")
"""What ncu calls kernels, with namespaces or without: those by warpgroup products have one size, and planes."""


def kernel_of(name: str) -> str:
    """A key of ``KERNELS``, by warpgroup products with ``verdicts.SM90`` in front, for a CUDA function's name."""
    wgrad = WGRAD.search(name)
    if wgrad is not None:
        return (verdicts.SM90 if wgrad["by_warpgroups"] else "") + "wgrad"
    kernel = "dgrad" if "BackwardEpilogue" in name else "fprop"
    return (verdicts.SM90 if PLANES.search(name) else "") + kernel


def one(session: Session, names: str) -> None:
    """Each kernel of ``names`` ("fprop,dgrad") between the profiler's marks: what ncu runs."""
    directions = [launched_by(name, session.dtypes[0]) for name in names.split(",")]
    calls = []
    for direction, route in directions:
        step = step_of(LAYER, session.device, session.dtypes[0], route, DIRECTIONS[direction])
        out = step.forward()
        backward = partial(step.gradients, out)
        calls.append(step.forward if direction == "forward" else backward)
        calls[-1]()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
