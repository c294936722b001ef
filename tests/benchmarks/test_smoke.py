"""Smoke: checks that are wrong, die, hang or print something else are named, and the others go on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from benchmarks.campaign import smoke
from benchmarks.counted import kernel_checks, verdicts
from fastfilm.ops.launchers import eager
from fastfilm.ops.settings import left_out
from tests.support.emulated import compiler, library

__all__ = ["library"]

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

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
    assert {b: set(f) for b, f in verdicts.FAMILIES.items()} == {
        b: set(f) for b, f in left_out.FAMILIES.items()
    }
    assert {f for families in verdicts.FAMILIES.values() for f in families} == set(
        kernel_checks.CHECKS
    )


@pytest.mark.parametrize("family", ["pointwise", "moments", "residual", "coefficients"])
def test_a_check_calls_launchers_as_they_are_and_tells_right_from_wrong(
    family: str,
) -> None:
    if family == "coefficients":
        pytest.importorskip(
            "fastfilm.ops.launchers.cpu._C", reason="the C++ extension was not built"
        )
        kernels = importlib.import_module("fastfilm.ops.launchers.cpu.kernels")
    else:
        kernels = eager
    names = {
        "pointwise": "apply_backward",
        "moments": "moments",
        "residual": "residual",
        "coefficients": "block_coefficients",
    }
    error = kernel_checks.check(kernels, family, "cpu", "float32")
    assert error is not None and error <= verdicts.TOLERANCE["float32"]
    real = getattr(kernels, names[family])
    broken = SimpleNamespace(
        **vars(kernels) | {names[family]: lambda *given: _doubled(real(*given))}
    )
    error = kernel_checks.check(broken, family, "cpu", "float32")
    assert error is not None and error > 0.1


def _doubled(found: Any) -> Any:
    if isinstance(found, Tensor):
        return 2 * found
    return tuple(None if t is None else 2 * t for t in found)


@needs_compiler
@pytest.mark.parametrize("family", verdicts.FAMILIES["cuda"])
def test_the_emulated_kernels_are_right(family: str, library: Path) -> None:
    (row,) = kernel_checks.rows([f"cuda:{family}:bfloat16"], "cpu", str(library))
    assert row["status"] == "right", row


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
