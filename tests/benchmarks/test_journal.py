"""A suite whose process a kernel ends is started again and goes on without it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaign import runner
from benchmarks.campaign.steps import Step
from benchmarks.measure.journal import DeviceLost, Journal

ROOT = Path(__file__).resolve().parents[2]

SUITE = """
import os, sys
from pathlib import Path
from benchmarks.measure.harness import QUICK, Budget, HostClock
from benchmarks.measure.journal import Journal
from benchmarks.measure.record import Record
from benchmarks.counted.roofline import Ceilings
from benchmarks.measure.session import Case, Provider, Session
import torch
work = Path(sys.argv[1])
journal, record = Journal(work / "steps/s.journal"), Record({}, work / "steps/s.json")
if journal.continued:
    record.resume()
session = Session("cpu", ["float32"], True, QUICK, Budget(None), record, HostClock(), Ceilings(1.0, {}))
session.verbose, session.journal = False, journal
def fine(): return [torch.ones(2)]
def ends(): os._exit(3)
for case in ("a", "b", "c"):
    calls = {"eager": Provider(fine), "fastfilm": Provider(ends if case == "b" else fine)}
    session.measure(Case("s", case, "forward", "float32"), calls)
"""


def test_a_case_that_ends_the_process_costs_its_own_row(tmp_path: Path) -> None:
    (tmp_path / "suite.py").write_text(SUITE)
    command = f"{{python}} {tmp_path / 'suite.py'} {{work}} --journal"
    step = Step("s", "", command, 300, rows=True, after=())
    runner.run(tmp_path / "out", "cpu", 300.0, [step])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = [(r["case"], r["provider"], r["status"]) for r in results["rows"]]
    assert found == [
        ("a", "eager", "ok"), ("a", "fastfilm", "ok"), ("b", "eager", "ok"), ("b", "fastfilm", "FAILED"),
        ("c", "eager", "ok"), ("c", "fastfilm", "ok"),
    ]  # fmt: skip
    assert results["steps"]["s"]["status"] == "ok"
    assert "ended the process" in results["rows"][3]["note"]


def test_what_an_earlier_process_has_done_and_what_ended_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    first = Journal(path)
    assert not first.continued
    with first.doing("a", "fine"):
        pass
    with pytest.raises(ValueError), first.doing("a", "wrong"):
        raise ValueError  # an error that the process survives
    first.finish("a")
    for case in ("b", "c"):
        with pytest.raises(DeviceLost), first.doing(case, "bad"):
            raise DeviceLost
    after = Journal(path)
    assert after.continued and after.finished("a") and not after.finished("b")
    assert after.why_not("a", "wrong") is None and after.why_not("b", "fine") is None
    assert "ended the process" in str(after.why_not("b", "bad"))
    assert "two processes" in str(after.why_not("d", "bad"))


@pytest.mark.parametrize(("usual", "own"), [(0.5, None), (300.0, 0.5)])
def test_a_call_that_does_not_come_back_ends_the_process(
    tmp_path: Path, usual: float, own: float | None
) -> None:
    code = "import time; from pathlib import Path; from benchmarks.measure import journal\n"
    code += f"journal.HUNG = {usual}\n"
    code += f"with journal.Journal(Path('j')).doing('a', 'hangs', {own}): time.sleep(300)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Timeout" in done.stderr
    assert Journal(tmp_path / "j").why_not("a", "hangs")


def test_without_a_file_nothing_is_noted() -> None:
    silent = Journal()
    with silent.doing("a", "b"):
        silent.finish("a")
    assert not silent.finished("a") and silent.why_not("a", "b") is None
