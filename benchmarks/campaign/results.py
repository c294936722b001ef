"""``results.json`` and ``tuned.json``: what all steps of a campaign have given so far."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .steps import Step

ENDED = "(PASSED|FAILED|ERROR|SKIPPED|XFAIL)"
TEST = re.compile(rf"^(tests/\S+::.*?) {ENDED}\b")
DISTRIBUTED = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {ENDED} (tests/\S+::.*)$")
"""A line of pytest's verbose output, and of that with pytest-xdist."""


def collect(
    out: Path, about: Mapping[str, Any], done: Mapping[str, Any], steps: Sequence[Step]
) -> dict[str, Any]:
    """Merges the rows of all steps into ``results.json``; a later step's machine stands for the campaign's."""
    machine: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for step in steps:
        path = out / "steps" / f"{step.name}.json"
        if not step.rows or not path.exists():
            continue
        data = json.loads(path.read_text(encoding="utf-8"))
        rates = machine.get("matrix_tflops", {}) | data["machine"].get("matrix_tflops", {})
        machine = {**data["machine"], **machine}
        if rates:
            machine["matrix_tflops"] = rates
        rows += [{"step": step.name, **row} for row in data["rows"]]
    for key in ("command", "seconds", "started"):
        machine.pop(key, None)
    tests = {
        s.name: outcomes(out / "logs" / f"{s.name}.log") for s in steps if "pytest" in s.command
    }
    tables = sorted((out / "tuned").glob("*.json"))
    whole = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in tables}
    write_json(out / "tuned.json", whole)
    found = {
        "about": dict(about),
        "machine": machine,
        "steps": dict(done),
        "tests": {name: counts for name, counts in tests.items() if counts},
        "tuned": whole,
        "rows": rows,
    }
    write_json(out / "results.json", found)
    return found


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


def write_json(path: Path, value: Any) -> None:
    """Writes JSON, to a neighbour first."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
