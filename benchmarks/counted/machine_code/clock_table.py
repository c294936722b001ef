"""What the clock models predict, as a table and as a file: beside what was measured and was predicted earlier."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from . import clock_model, sass, warpgroup_clocks
from .clock_model import CONSTANTS, GPUS, PASSES, Prediction, cases
from .warpgroup_block import WARPGROUPS
from .warpgroup_loops import PREFIX, TARGET

PROVIDERS = {
    "fastfilm-cuda/fused": "",
    "fastfilm-cuda-mma": "",
    "fastfilm-cuda-wgmma": PREFIX,
    "vendor": "vendor ",
}
"""Provider of the suite ``routes`` -> what stands in front of a pass's name: for kernels by mma.sync nothing."""

VENDOR = PROVIDERS["vendor"]

Seconds = Mapping[tuple[str, str], float]
"""Layer and pass -> seconds on an H200."""


def measured(path: Path) -> dict[tuple[str, str], float]:
    """From a results file of the suite ``routes``: of our kernels, and of the vendor's alone as "vendor fprop"."""
    passes = {mode: name for name, mode in PASSES.items()}
    return {
        (r["case"], PROVIDERS[r["provider"]] + passes[r["mode"]]): r["median_s"]
        for r in json.loads(path.read_text(encoding="utf-8"))["rows"]
        if r.get("suite") == "routes"
        and r.get("provider") in PROVIDERS
        and r.get("mode") in passes
        and r.get("median_s")
    }


def mean(ratios: Iterable[float]) -> float:
    """Geometric mean."""
    logs = [math.log(r) for r in ratios]
    return math.exp(sum(logs) / len(logs))


def table(
    found: Sequence[Prediction],
    seconds: Seconds,
    before: Mapping[tuple[str, str, str], float],
    parts: bool,
) -> list[str]:
    """Lines of markdown, with the means below."""
    head = ["layer", "pass", "device", "blocks", "clocks a tile", "µs", "TFLOP/s", "bound by"]
    head += ["measured µs", "predicted / measured"] if seconds else []
    head += ["speed-up"] if before else []
    head += ["parts, clocks"] if parts else []
    lines, errors, gains = [head, ["---"] * len(head)], [], defaultdict(list)
    for p in found:
        us = p.seconds * 1e6
        cells = [p.layer, p.kernel, p.device, str(p.blocks), f"{p.tile_clocks:.0f}"]
        cells += [f"{us:.0f}", f"{p.tflops:.3g}", p.binding]
        if seconds:
            there = seconds.get((p.layer, p.kernel)) if p.device == "H200" else None
            cells += (
                ["", ""] if there is None else [f"{there * 1e6:.0f}", f"{p.seconds / there:.2f}"]
            )
            errors += [] if there is None else [p.seconds / there]
        if before:
            past = before.get((p.layer, p.kernel, p.device))
            cells.append("" if past is None else f"{past / us:.2f}")
            if past is not None:
                gains[p.device, p.kernel].append(past / us)
        cells += [", ".join(f"{k} {v:.0f}" for k, v in p.phases.items())] if parts else []
        lines.append(cells)
    text = _lines(lines)
    if errors:
        wrong = mean(max(e, 1 / e) for e in errors)
        outside = sum(max(e, 1 / e) > 1.6 for e in errors)
        text += [
            "",
            f"{len(errors)} measured: off by {wrong:.3f} in the geometric mean, {outside} by more than 1.6.",
        ]
    text += [""] * bool(gains)
    for (device, name), ratios in gains.items():
        text.append(f"{device} {name}: {mean(ratios):.2f} times as fast in the geometric mean.")
    if gains:
        whole = mean(r for ratios in gains.values() for r in ratios)
        text.append(f"All: {whole:.2f} times as fast in the geometric mean.")
    return text


def _lines(cells: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in cells]


def beside(
    found: Sequence[Prediction], seconds: Seconds, taken: Iterable[tuple[str, str]]
) -> list[str]:
    """Kernels by mma.sync and of warpgroups as predicted, and the vendor's convolution alone as an H200 took.

    Args:
        taken: layers and passes where the plan takes the kernels of warpgroups.
    """
    chosen = set(taken)
    known = {(p.layer, p.kernel, p.device): p for p in found}
    head = ["layer", "pass", "device", "mma.sync µs", "wgmma µs", "TFLOP/s", "bound by", "taken"]
    head += ["vendor µs", "vendor / wgmma"]
    lines, ratios = [head, ["---"] * len(head)], defaultdict(list)
    for p in found:
        new = known.get((p.layer, PREFIX + p.kernel, p.device))
        if new is None:
            continue
        cells = [p.layer, p.kernel, p.device, f"{p.seconds * 1e6:.0f}", f"{new.seconds * 1e6:.0f}"]
        cells += [f"{new.tflops:.3g}", new.binding]
        cells += ["yes" if (p.layer, p.kernel) in chosen else "no"]
        vendor = seconds.get((p.layer, VENDOR + p.kernel)) if p.device == "H200" else None
        cells += (
            ["", ""] if vendor is None else [f"{vendor * 1e6:.0f}", f"{vendor / new.seconds:.2f}"]
        )
        lines.append(cells)
        if (p.layer, p.kernel) in chosen:
            ratios[p.device, "mma.sync"].append(p.seconds / new.seconds)
            if vendor is not None:
                ratios[p.device, "the vendor's, measured"].append(vendor / new.seconds)
    text = [*_lines(lines), ""]
    for (device, other), gains in ratios.items():
        text.append(
            f"{device}: {mean(gains):.2f} times as fast as {other}, in the geometric mean of the"
            f" {len(gains)} that are taken."
        )
    return text


def _entry(p: Prediction) -> dict[str, Any]:
    return {
        "layer": p.layer,
        "pass": p.kernel,
        "device": p.device,
        "tile_clocks": round(p.tile_clocks),
        "us": float(f"{p.seconds * 1e6:.5g}"),
        "tflops": float(f"{p.tflops:.4g}"),
        "binding": p.binding,
    }


def as_json(found: Sequence[Prediction], taken: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
    """Predictions with everything that was assumed for them: "rows" by mma.sync, "warpgroups" by wgmma.

    Args:
        taken: layers and passes where the plan takes the kernels of warpgroups.
    """
    about = (
        "predictions of the clock models, bfloat16; see docs/benchmarks.md, Clocks without a GPU"
    )
    old = [_entry(p) for p in found if not p.kernel.startswith(PREFIX)]
    chosen = {(layer, PREFIX + name) for layer, name in taken}
    new = [
        _entry(p) | {"taken": (p.layer, p.kernel) in chosen}
        for p in found
        if p.kernel.startswith(PREFIX)
    ]
    return {
        "about": about,
        "constants": CONSTANTS,
        "warpgroup_constants": WARPGROUPS,
        "devices": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "rows": old,
        "warpgroups": new,
    }


def all_of(library: Path, module: ModuleType) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """Predictions of both models for a library, and the layers and passes where its plan takes warpgroups."""
    found: list[Prediction] = []
    taken: list[tuple[str, str]] = []
    for target in module.architectures.split(";"):
        arch = int(target.rstrip("af")) // 10 * 10
        if not any(gpu.arch == arch for gpu in GPUS.values()):
            continue
        kernels = clock_model.read(library, f"sm_{target}")
        found += [clock_model.prediction(kernels, module, *case) for case in cases(arch)]
        if target == TARGET:
            found += warpgroup_clocks.predictions(warpgroup_clocks.read(library), module)
            taken += warpgroup_clocks.taken(module)
    return found, taken


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of a library's kernels."""
    results = Path(__file__).resolve().parents[2] / "results" / "gpu-h200.json"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counted.machine_code.clock_model",
        description=clock_model.__doc__,
    )
    parser.add_argument("--library", type=Path, help="CUDA extension; the installed one without it")
    parser.add_argument("--json", type=Path, help="writes the predictions there")
    parser.add_argument("--against", type=Path, help="earlier file of --json, for speed-ups")
    parser.add_argument("--measured", type=Path, default=results, help="results of an H200")
    parser.add_argument(
        "--beside", action="store_true", help="both kinds of kernels and the vendor's side by side"
    )
    parser.add_argument("--parts", action="store_true", help="clocks of each part of a tile, too")
    args = parser.parse_args(arguments)
    library = args.library or sass.extension()
    if library is None:
        print("the CUDA extension is not built, and --library names no other", file=sys.stderr)
        return 1
    found, taken = all_of(library, sass.load(library))
    before = {}
    if args.against is not None:
        past = json.loads(args.against.read_text(encoding="utf-8"))
        rows = past["rows"] + past.get("warpgroups", [])
        before = {(r["layer"], r["pass"], r["device"]): r["us"] for r in rows}
    seconds = measured(args.measured) if args.measured.exists() else {}
    if args.beside:
        print("\n".join(beside(found, seconds, taken)))
    else:
        print("\n".join(table(found, seconds, before, args.parts)))
    if args.json is not None:
        text = json.dumps(as_json(found, taken), indent=1, ensure_ascii=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0
