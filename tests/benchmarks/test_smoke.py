"""Smoke: checks that are wrong, die, hang or print something else are named, and the others go on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import smoke
from benchmarks.counted import verdicts
from fastfilm.ops.settings import left_out

FAKE = """
import json, os, sys, time
for key in sys.argv[-1].split(","):
    family = key.split(":")[1]
    if family == "fprop": os._exit(3)
    if family == "dgrad": time.sleep(300)
    print("a word of somebody else's", flush=True)
    status = "WRONG" if family == "wgrad" else "right"
    print(json.dumps({"check": key, "status": status, "pid": os.getpid()}), flush=True)
"""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_check_is_settled_whatever_the_others_do(tmp_path: Path, device: str) -> None:
    file = tmp_path / "fake.py"
    file.write_text(FAKE)
    rows: list[dict[str, Any]] = []
    judge = smoke.Judge([sys.executable, str(file)], 5.0, tmp_path / "logs", rows.append)
    families = ("pointwise", "fprop", "dgrad", "wgrad", "moments", "taps")
    for group in smoke.groups([f"triton:{f}:float32" for f in families], device):
        judge.run(group)
    found = {r["check"].split(":")[1]: r["status"] for r in rows}
    bad = {"fprop": "DIED", "dgrad": "HUNG", "wgrad": "WRONG"}
    assert found == {"pointwise": "right", **bad, "moments": "right", "taps": "right"}
    pids = {r["check"].split(":")[1]: r.get("pid") for r in rows}
    # on a GPU each has a process of its own; what comes behind a wrong result always has another
    assert (pids["moments"] == pids["taps"]) == (device == "cpu") and pids["wgrad"] != pids[
        "moments"
    ]
    left = ",".join(f"triton:{f}:float32" for f in ("fprop", "dgrad", "wgrad"))
    assert verdicts.without(rows) == left and len(left_out.parse(left)) == 3


def test_every_family_has_a_check_and_can_be_left_out() -> None:
    from benchmarks.counted import kernel_checks

    assert {b: set(f) for b, f in verdicts.FAMILIES.items()} == {
        b: set(f) for b, f in left_out.FAMILIES.items()
    }
    assert {f for families in verdicts.FAMILIES.values() for f in families} == set(
        kernel_checks.CHECKS
    )


def test_an_error_beyond_rounding_is_wrong_and_so_is_none_at_all() -> None:
    for error, status in (
        (1e-7, "right"),
        (3e-4, "WRONG"),
        (float("nan"), "WRONG"),
        (None, "skipped"),
    ):
        assert verdicts.judged("triton:fprop:float32", lambda dtype, e=error: e)["status"] == status

    def raising(dtype: str) -> float:
        raise RuntimeError("CUDA error: misaligned address")

    row = verdicts.judged("triton:fprop:float32", raising)
    assert row["status"] == "WRONG" and "misaligned" in row["note"]


def test_nothing_is_judged_wrong_where_there_is_no_backend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    options = ["--device", "cpu", "--library", str(tmp_path / "none.so"), "--backends", "cuda"]
    assert (
        smoke.main([*options, "--only", "cuda:pack", "--out", str(out), "--logs", str(tmp_path)])
        == 0
    )
    assert {r["status"] for r in json.loads(out.read_text())} == {"skipped"}
    assert "nothing is left out" in capsys.readouterr().out
