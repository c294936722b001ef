"""Runs ``fastfilm trial`` on data sets whose answer is known, and counts how often it gives it.

    python benchmarks/paper/trial_calibration.py --out DIR --jobs 2 [--json FILE] [--page docs/trial.md]

The data sets are those of ``trial_phantoms``: metadata that do not matter (null), that matter (help), and that
mislead. Each trial is a folder below DIR; a killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.machine import cpu_model
from benchmarks.paper.trial_phantoms import KINDS, configuration, write_phantoms

TRIALS = {"null": 40, "help": 20, "mislead": 10}

ASKED = {
    "null": "“use it” in 2 or fewer",
    "help": "“use it” in 17 or more",
    "mislead": "“use it” in none",
}

ANSWERS = ("use it", "do not", "cannot tell yet")

BEGIN, END = "<!-- calibration: begin -->", "<!-- calibration: end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0; 1 where a trial failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--jobs", type=int, default=1, help="processes, with one thread each")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--trials", type=int, help="of each kind; none: 40, 20 and 10")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--page", type=Path, help="page whose table is made anew")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    units = [
        (options.out, kind, number)
        for kind in options.kinds
        for number in range(options.trials or TRIALS[kind])
    ]
    found: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for unit, result in zip(units, pool.map(one, units), strict=True):
            print(f"{unit[1]} {unit[2]}: {result.get('answer', result.get('error'))}", flush=True)
            found.append(result)
    summary = summarise(found)
    print(table(summary))
    if options.json is not None:
        from fastfilm.segmentation.support.files import write_json

        write_json(options.json, {**summary, "trials": found})
    if options.page is not None:
        page = options.page.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        options.page.write_text(
            f"{before}{BEGIN}\n{table(summary)}\n{END}{after}", encoding="utf-8"
        )
    return int(any("error" in r for r in found))


def one(unit: tuple[Path, str, int]) -> dict[str, Any]:
    """One trial: its answer, its effect and interval, and against shuffled metadata."""
    import torch

    from fastfilm.segmentation.config.schema import read_config
    from fastfilm.segmentation.support.console import quiet
    from fastfilm.segmentation.support.distributed import processes
    from fastfilm.segmentation.support.errors import UserError
    from fastfilm.segmentation.trial.design import runs
    from fastfilm.segmentation.trial.folder import open_trial
    from fastfilm.segmentation.trial.results import collect
    from fastfilm.segmentation.trial.runs import make_runs
    from fastfilm.segmentation.trial.verdict import verdict

    torch.set_num_threads(1)
    out, kind, number = unit
    folder = out / f"{kind}-{number:02d}"
    try:
        if not (folder / "data" / "participants.tsv").is_file():
            write_phantoms(folder / "data", kind, number)
        (folder / "config.yaml").write_text(configuration(kind), encoding="utf-8")
        with quiet(), processes("cpu") as joined:
            plan, design, _ = open_trial(read_config(folder / "config.yaml"), folder / "trial")
            make_runs(folder / "trial", plan, design, list(runs(design)), joined)
        results = collect(folder / "trial")
    except UserError as error:
        return {"kind": kind, "number": number, "error": str(error)}
    return {
        "kind": kind,
        "number": number,
        "answer": verdict(results).answer,
        **{k: results["primary"][k] for k in ("mean", "low", "high", "p")},
        "against_shuffled": results["against"]["shuffled"]["mean"],
    }


def summarise(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the answers and the effects of each kind; the machine."""
    import numpy as np
    import torch

    kinds: dict[str, Any] = {}
    for kind in dict.fromkeys(r["kind"] for r in found):
        of = [r for r in found if r["kind"] == kind and "answer" in r]
        answers = Counter(r["answer"] for r in of)
        effects = np.array([r["mean"] for r in of])
        kinds[kind] = {
            "trials": len(of),
            "answers": {a: answers.get(a, 0) for a in ANSWERS},
            "mean_effect": float(effects.mean()) if len(of) else None,
            "lowest_effect": float(effects.min()) if len(of) else None,
            "highest_effect": float(effects.max()) if len(of) else None,
        }
    return {"kinds": kinds, "machine": cpu_model(), "torch": torch.__version__}


def table(summary: dict[str, Any]) -> str:
    """The counts, as Markdown."""
    lines = [
        f"| metadata | trials | {' | '.join(ANSWERS)} | effect: mean, range | asked for |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, s in summary["kinds"].items():
        counts = " | ".join(str(s["answers"][a]) for a in ANSWERS)
        effect = "–"
        if s["mean_effect"] is not None:
            effect = (
                f"{s['mean_effect']:+.3f}, {s['lowest_effect']:+.3f} to {s['highest_effect']:+.3f}"
            )
        lines.append(f"| {kind} | {s['trials']} | {counts} | {effect} | {ASKED[kind]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
