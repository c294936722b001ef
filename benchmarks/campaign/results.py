"""``results.json``: what all steps of a campaign have given so far, as far as it can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .steps import Step

ENDED = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
TEST = re.compile(rf"^(tests/\S+::.*?) {ENDED}\b")
DISTRIBUTED = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {ENDED} (tests/\S+::.*)$")
"""A line of pytest's verbose output, and of that with pytest-xdist."""

TEXT = ("suite", "case", "provider", "mode", "dtype", "status")
NUMBERS = ("median_s", "tflops", "ratio", "fraction_of_floor", "peak_bytes", "error")


def why_unreadable(path: Path) -> str | None:
    """What is wrong with the rows of a step; None if they can be read, or if there are none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return f"{path.name} is no JSON: {error}"
    if not isinstance(data, dict) or not isinstance(data.get("machine"), dict):
        return f"{path.name} has no machine"
    rows = data.get("rows")
    if not isinstance(rows, list):
        return f"{path.name} has no rows"
    for row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in TEXT):
            return f"{path.name}: a row lacks one of {', '.join(TEXT)}"
        if not all(isinstance(row.get(k), (int, float, type(None))) for k in NUMBERS):
            return f"{path.name}: a row of {row['case']} has text where a number belongs"
    return None


def collect(
    work: Path, about: Mapping[str, Any], done: Mapping[str, Any], steps: Sequence[Step]
) -> dict[str, Any]:
    """Everything in one value; the machine is that of the rows, and rows that cannot be read are left out."""
    machine: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for step in steps:
        path = work / "steps" / f"{step.name}.json"
        if not step.rows or not path.exists() or why_unreadable(path):
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        rates = machine.get("matrix_tflops", {}) | data["machine"].get("matrix_tflops", {})
        machine = {**data["machine"], **machine}
        if rates:
            machine["matrix_tflops"] = rates
        rows += [{"step": step.name, **row} for row in data["rows"]]
    if about.get("commit"):  # known too where there is no git
        machine["commit"] = about["commit"]
    for key in ("command", "seconds", "started"):
        machine.pop(key, None)
    logs = {s.name: work / "logs" / f"{s.name}.log" for s in steps if " pytest " in s.command}
    tests = {name: outcomes(log) for name, log in logs.items()}
    return {
        "about": dict(about),
        "machine": machine,
        "steps": dict(done),
        "checks": listed(work / "steps" / "smoke.json"),
        "probes": listed(work / "steps" / "probes.json"),
        "tests": {name: counts for name, counts in tests.items() if counts},
        "tuned": {p.stem: t for p in sorted((work / "tuned").glob("*.json")) if (t := _table(p))},
        "rows": rows,
    }


def listed(path: Path) -> list[dict[str, Any]]:
    """A file's list of what has a status; empty where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [r for r in found if isinstance(r.get("status"), str)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _table(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found.get("entries"), dict) else None
    except (OSError, ValueError, AttributeError):
        return None


def outcomes(log: Path) -> dict[str, Any]:
    """How many tests ended how, and the names of those that failed, from pytest's verbose output, ended or not."""
    if not log.exists():
        return {}
    last: dict[str, str] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match, other = TEST.match(line), DISTRIBUTED.match(line)
        if match:
            last[match[1]] = match[2]
        elif other:
            last[other[2].rstrip()] = other[1]
    counts: dict[str, Any] = {}
    for outcome in last.values():
        counts[outcome.lower()] = counts.get(outcome.lower(), 0) + 1
    wrong = [name for name, outcome in last.items() if outcome in ("FAILED", "ERROR")]
    return counts | ({"wrong": wrong} if wrong else {})
