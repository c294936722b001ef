"""The slowest layers from inside: hardware counters where ncu may read them, and stages left out everywhere."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastfilm

from .. import explain, providers
from ..layers import STAGES, LayerStep, steady
from ..networks import Network
from ..roofline import Layer
from ..session import Case, Session
from .explain import block_of
from .model import networks

SLOWEST = 3
MODE = "training"

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes.sum": "dram_bytes",
    "lts__t_bytes.sum": "l2_bytes",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "l2_percent",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
"""ncu's counters, and what they are called in the record."""

NCU_SECONDS = 45.0


def run(session: Session) -> None:
    """The three slowest layers over the model suite's networks."""
    dtype = session.dtypes[0]
    for network, layer in slowest(session, dtype):
        if session.budget.spent():
            return
        stages(session, network, layer, dtype)
        counters(session, network, layer, dtype)


def slowest(session: Session, dtype: str) -> list[tuple[Network, Layer]]:
    """By the measured time of an earlier explained run (``--explained``), else by the estimate."""
    times = _measured(session.explained, dtype)
    found: dict[tuple[Network, Layer], float] = {}
    for network in networks(session):
        for line in explain.lines(network, MODE, dtype, session.ceilings):
            seconds = times.get((network.case, line.layer.label))
            found[network, line.layer] = line.seconds if seconds is None else seconds
    return sorted(found, key=lambda key: -found[key])[:SLOWEST]


def _measured(path: str | None, dtype: str) -> dict[tuple[str, str], float]:
    """Seconds of all occurrences of each (network, layer) in a file of rows."""
    if path is None or not Path(path).exists():
        return {}
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    return {
        (r["network"], r["layer"]): r["median_s"]
        for r in rows
        if r["suite"] == "explain" and r["mode"] == MODE and r["dtype"] == dtype and r["median_s"]
    }


def _seconds(session: Session, step: Any) -> float:
    call, _ = steady(step, session.device)
    call()
    once = session.clock.time(call, 1)
    calls = max(1, round(session.effort.window / max(once, 1e-7)))
    rounds = session.effort.min_rounds
    return statistics.median(session.clock.time(call, calls) for _ in range(rounds))


def stages(session: Session, network: Network, layer: Layer, dtype: str) -> None:
    """The layer whole, by each backend and route, and with one stage after the other left out."""
    session.say(f"profile: {layer.label}, stages")
    step = partial(LayerStep, block_of(network, layer), session.device, dtype, MODE)
    whole = _seconds(session, step())
    variants: dict[str, Any] = {f"without {s}": partial(step, without=(s,)) for s in STAGES}
    variants["without all of them"] = partial(step, without=STAGES)
    for name in providers.backends(session.device)[0]:
        for route in ("fused", "composed"):
            variants[f"{name}/{route}"] = partial(
                step, scope=partial(fastfilm.backend, name, route)
            )
    case = _case(network, layer, dtype)
    session.record.add(session.row(case, "fastfilm", median_s=whole, note="whole layer"))
    for name, make in variants.items():
        if name == "without prologue" and not layer.input_grad:
            continue
        try:
            seconds = _seconds(session, make())
        except NotImplementedError:
            continue  # a route that does not cover this layer
        row = session.row(case, "fastfilm", median_s=seconds, note=name)
        row.extra |= {"variant": name, "difference_s": whole - seconds}
        session.record.add(row)


def _case(network: Network, layer: Layer, dtype: str) -> Case:
    extra = {"network": network.case, "layer": layer.label}
    return Case("profile", f"{network.case}: {layer.label}", MODE, dtype, extra=extra)


def counters(session: Session, network: Network, layer: Layer, dtype: str) -> None:
    """A row for each kernel of one step by ncu, or one row that says why there is none."""
    case = _case(network, layer, dtype)
    reason = why_not_ncu(session.device)
    if reason is None:
        session.say(f"profile: {layer.label}, ncu")
        index = list(network.layers()).index(layer)
        where = f"{networks(session).index(network)}:{index}"
        found, reason = under_ncu(["--one", where, "--dtype", dtype], session.quick)
        for name, values in found:
            row = session.row(case, "ncu", note=name[:100])
            row.median_s = values.pop("time", None)
            row.extra |= values
            session.record.add(row)
    if reason is not None:
        session.skip(case, "ncu", reason)


def why_not_ncu(device: str) -> str | None:
    """Why hardware counters are not read; None if it can be tried."""
    if device != "cuda":
        return "no GPU: no hardware counters"
    return None if shutil.which("ncu") else "ncu is not on the path"


def under_ncu(
    arguments: Sequence[str], quick: bool
) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    """(kernel, counters) of each launch of one call in a process of its own; or why there are none.

    Clocks are left as they are.
    """
    script = [sys.executable, str(Path(__file__).parents[1] / "run.py"), "--suite", "profile"]
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw"]
    command += ["--profile-from-start", "off", "--metrics", ",".join(METRICS)]
    command += [*script, "--device", "cuda", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=NCU_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [], f"ncu took longer than {NCU_SECONDS:.0f} s"
    found = read_csv(done.stdout)
    if found:
        return found, None
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "==ERROR==" in line] or lines[-1:]
    return [], f"ncu gave no counters: {errors[0][:100] if errors else 'no output'}"


UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9,
    "nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0,
    "ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0,
}  # fmt: skip


def read_csv(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Kernels and counters of ncu's CSV (raw page: names, then units, then a line a kernel), in SI units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(rows) < 3 or "Kernel Name" not in rows[0]:
        return []
    names, units = rows[0], rows[1]
    found = []
    for row in rows[2:]:
        values: dict[str, Any] = {}
        for name, unit, value in zip(names, units, row, strict=False):
            if name in METRICS:
                with contextlib.suppress(ValueError):
                    values[METRICS[name]] = float(value.replace(",", "")) * UNITS.get(unit, 1.0)
        found.append((row[names.index("Kernel Name")], values))
    return found


def one(session: Session, where: str) -> None:
    """One step of one layer between the profiler's marks: what ncu runs."""
    network_index, layer_index = map(int, where.split(":"))
    network = networks(session)[network_index]
    layer = list(network.layers())[layer_index]
    step = LayerStep(block_of(network, layer), session.device, session.dtypes[0], MODE)
    step()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
