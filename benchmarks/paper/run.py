"""Runs the paper's experiments: ``python benchmarks/paper/run.py --experiment 1|2|3|ablation --size small|full``.

Every network is a unit with a result file of its own, so that a killed run goes on where it stopped and several
processes (on several machines with one folder) share the work. The summary and the figure are made of all units.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.machine import describe
from benchmarks.paper import designs, train
from benchmarks.paper.data import load
from benchmarks.paper.designs import Unit
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.files import write_json


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 with one message where something is missing."""
    options = _parser().parse_args(argv)
    try:
        return _run(options)
    except UserError as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\npaper: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--experiment", required=True, choices=designs.EXPERIMENTS)
    parser.add_argument("--size", default="small", choices=list(train.SIZES))
    parser.add_argument(
        "--data", type=Path, help="folder with the BIDS folders lgg, acdc, hippocampus"
    )
    parser.add_argument("--sets", nargs="+", help="only these data sets")
    parser.add_argument("--out", type=Path, default=Path("paper-results"), help="results folder")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    return parser


def _run(options: argparse.Namespace) -> int:
    size = train.SIZES[options.size]
    todo = designs.units(options.experiment, size.splits, train.labels(), size.base)
    if options.sets:
        todo = [u for u in todo if u.data in options.sets]
        if not todo:
            raise UserError(f"--sets: experiment {options.experiment} uses none of {options.sets}")
    # a missing set is told before anything is computed
    for name in dict.fromkeys(u.data for u in todo):
        load(name, options.data, options.size != "full")
    folder = options.out / options.size / "units"
    missing = [u for u in todo if not (folder / f"{u.name}.json").is_file()]
    print(f"{len(todo)} networks, {len(todo) - len(missing)} of them are there", flush=True)
    _compute(missing, options, folder)
    found = [json.loads((folder / f"{u.name}.json").read_text()) for u in todo]
    from benchmarks.paper import figures, results

    summary = results.summarise(options.experiment, found)
    record = {
        "experiment": options.experiment,
        "size": options.size,
        "configuration": size.to_json(),
        "machine": describe(options.device.split(":")[0]),
        "summary": summary,
        "units": found,
    }
    if options.experiment == "ablation":
        record["eager_over_fused"] = ratio = train.eager_ratio(options.size, options.device)
        print(results.ratio_text(ratio))
    name = f"experiment-{options.experiment}" if options.experiment != "ablation" else "ablation"
    path = options.out / options.size / f"{name}.json"
    write_json(path, record)
    figures.draw(options.experiment, summary, path.with_suffix(".png"))
    print(results.text(options.experiment, summary), flush=True)
    print(f"\nwritten: {path} and {path.with_suffix('.png').name}")
    return 0


def _compute(missing: Sequence[Unit], options: argparse.Namespace, folder: Path) -> None:
    jobs = max(1, min(options.jobs, len(missing)))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    started = time.monotonic()
    arguments = (options.size, options.data, options.device, folder)
    if jobs == 1:
        for i, unit in enumerate(missing):
            one(unit, *arguments)
            _progress(i + 1, len(missing), started, unit)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _start, (threads,)) as pool:
        running = {pool.submit(one, unit, *arguments): unit for unit in missing}
        for i, future in enumerate(concurrent.futures.as_completed(running)):
            future.result()
            _progress(i + 1, len(missing), started, running[future])


def _start(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def one(unit: Unit, size: str, root: Path | None, device: str, folder: Path) -> None:
    """Computes a unit and writes its file, whole or not at all."""
    result: dict[str, Any] = train.run(unit, size, root, device)
    write_json(folder / f"{unit.name}.json", result)


def _progress(done: int, total: int, started: float, unit: Unit) -> None:
    left = (time.monotonic() - started) / done * (total - done)
    print(f"{done}/{total} {unit.name}, {left / 60:.0f} min left", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
