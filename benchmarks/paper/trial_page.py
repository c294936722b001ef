"""The verdicts of finished trials as a table on a page.

    python benchmarks/paper/trial_page.py OUT... --json docs/results/trials.json --page docs/paper.md

Each OUT is the folder of a trial and gives the row its name. What is written has no names of cases.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.machine import cpu_model
from fastfilm.segmentation.support.files import read_json, write_json
from fastfilm.segmentation.trial.results import RESULTS
from fastfilm.segmentation.trial.verdict import ends, signed, verdict

BEGIN, END = "<!-- trials: begin -->", "<!-- trials: end -->"

KEPT = ("design", "counts", "arms", "primary", "against", "labels", "groups", "swaps", "needed")

SHOWN = ("about", "level", "measure", "value", "low", "high", "chance", "p_corrected")
"""Of a finding of the audit."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("trials", type=Path, nargs="+", help="folders of finished trials")
    parser.add_argument("--json", type=Path, required=True, help="file to write the results to")
    parser.add_argument("--page", type=Path, required=True, help="page whose table is made anew")
    options = parser.parse_args(argv)
    found = {folder.name: summary(folder) for folder in options.trials}
    write_json(options.json, {"machine": cpu_model(), "trials": found})
    page = options.page.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    options.page.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")
    return 0


def summary(folder: Path) -> dict[str, Any]:
    """The numbers of one trial, its verdict, and the versions that trained its networks."""
    results = read_json(folder / RESULTS)
    said = verdict(results)
    return {
        "answer": said.answer,
        "sentences": list(said.sentences),
        **{name: results[name] for name in KEPT},
        "audit": [
            {name: f[name] for name in SHOWN}
            for f in read_json(folder / "audit.json")["findings"]
            if f["level"] != "fine"
        ],
    }


def table(found: dict[str, Any]) -> str:
    """A row a trial, and its sentences below."""
    lines = [
        "| data | metadata | cases (subjects) | with | without | difference | against shuffled | p | answer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, t in found.items():
        p, s = t["primary"], t["against"].get("shuffled")
        arms = [f"{t['arms'][arm]['mean']:.3f}" for arm in ("conditioned", "unconditioned")]
        shuffled = "–" if s is None else f"{signed(s['mean'])} ({ends(s)})"
        lines.append(
            f"| {name} | {', '.join(t['design']['keys'])} | {t['counts']['compared']} ({p['subjects']}) |"
            f" {' | '.join(arms)} | {signed(p['mean'])} ({ends(p)}) | {shuffled} | {p['p']:.2g} | {t['answer']} |"
        )
    for name, t in found.items():
        lines += [
            "",
            f"**{name}**: {t['sentences'][0]}",
            *(f"{line}" for line in t["sentences"][1:]),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
