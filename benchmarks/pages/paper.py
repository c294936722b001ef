"""Writes the tables of docs/paper.md from the committed results of the paper's experiments.

Usage: python -m benchmarks.pages.paper
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..paper import results
from .markdown import between

HERE = Path(__file__).resolve().parents[1]
PAGE = HERE.parent / "docs" / "paper.md"
RECORDS = HERE / "results" / "paper"


def records() -> dict[str, dict[str, Any]]:
    """Name -> committed record."""
    return {p.stem: json.loads(p.read_text()) for p in sorted(RECORDS.glob("*.json"))}


def _steps(record: dict[str, Any]) -> str:
    """Those that were made, by data set; more than one figure where conditions differ."""
    made: dict[str, set[int]] = {}
    for unit in record["units"]:
        made.setdefault(unit["unit"]["data"], set()).add(unit["steps"])
    parts = [f"{' or '.join(map(str, sorted(n)))} ({name})" for name, n in made.items()]
    return ", ".join(parts)


def written(page: str, found: dict[str, dict[str, Any]]) -> str:
    """The page with the tables of ``found`` between their marks."""
    for name, record in found.items():
        machine, size = record["machine"], record["configuration"]
        about = (
            f"{len(record['units'])} networks of {size['filters']} filters and depth {size['depth']},"
            f" {_steps(record)} steps of {size['batch']} slices, {size['splits']} splits;"
            f" {machine['cpu']}, torch {machine['torch']}, commit {machine['commit']}."
        )
        table = results.text(record["experiment"], record["summary"]).strip()
        if "eager_over_fused" in record:
            table += "\n\n" + results.ratio_text(record["eager_over_fused"])
        page = between(page, name, f"{about}\n\n{table}")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), records()), encoding="utf-8")
