"""Smoke: checks that are wrong, die, hang or print something else are named, and the others go on."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.campaign import smoke
from benchmarks.counted import inside, kernel_checks, verdicts
from benchmarks.counted.emulation import load
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
    known = {b: set(families) for b, families in left_out.FAMILIES.items()}
    assert {b: set(families) for b, families in verdicts.FAMILIES.items()} == known
    assert left_out.SM90 == verdicts.SM90
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
    load(library).launches()
    (row,) = kernel_checks.rows([f"cuda:{family}:bfloat16"], "cpu", str(library))
    assert row["status"] == "right", row
    launched = {name for name in load(library).launches() if name.startswith(verdicts.SM90)}
    assert launched == ({family} if family.startswith(verdicts.SM90) else set())


def test_checks_by_warpgroups_are_of_every_form_that_the_kernels_take() -> None:
    forms = {
        (len(output), taps, stride, first > 0)
        for _, taps, stride, output, first in kernel_checks.SM90_SIZES
    }
    assert {form[:3] for form in forms} == {
        (dims, *rest) for dims in (2, 3) for rest in ((1, 1), (3, 1), (3, 2))
    }
    assert {(2, 3, 1, True), (3, 3, 1, True), (2, 1, 1, True)} <= forms
    every = verdicts.keys(["cuda"])
    assert "cuda:sm90_dgrad:float16" in every and "cuda:sm90_dgrad:float32" not in every


@needs_compiler
def test_checks_by_warpgroups_give_blocks_several_units_on_an_h200(library: Path) -> None:
    several, resident = set(), set()
    with kernel_checks.launchers("cuda", str(library)):
        from fastfilm.ops.launchers.cuda import plans

        for channels, taps, stride, output, _ in kernel_checks.SM90_SIZES:
            each = [(n,) * len(output) for n in (taps, stride, (taps - 1) // 2)]
            size = tuple(o * stride for o in output)
            shape = plans.Shape(torch.float16, 2, channels, size, output, *each)
            plan = plans._plan(shape, (90, 132, 232448), False, "always")
            for kernel, name in inside.KERNELS.items():
                facts = plan.facts(name)
                several |= {(kernel, len(output))} if facts["tiles_a_block"] > 1 else set()
                resident |= {(kernel, facts["resident"])} if "resident" in facts else set()
    assert several == {(kernel, dims) for kernel in inside.KERNELS for dims in (2, 3)}
    assert resident == {(kernel, kept) for kernel in ("fprop", "dgrad") for kept in (True, False)}


@needs_compiler
def test_a_check_by_warpgroups_tells_wrong_numbers_and_another_kernel(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "cuda:sm90_wgrad:float16"
    with kernel_checks.launchers("cuda", str(library)) as kernels:
        wrong = SimpleNamespace(
            reads_sources=True, wgrad=lambda *given: _doubled(kernels.wgrad(*given))
        )
        monkeypatch.setattr(kernel_checks, "SM90_SIZES", kernel_checks.SM90_SIZES[:1])
        error = kernel_checks.check(wrong, "sm90_wgrad", "cpu", "float16")
    assert error is not None and error == pytest.approx(1.0, rel=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(inside, "instruction_of", lambda *_, **__: "mma")
        (row,) = kernel_checks.rows([key], "cpu", str(library))
    assert row["status"] == "WRONG" and "multiplies by mma" in row["note"]
    with monkeypatch.context() as patch:
        patch.setattr(load(library), "architectures", "80;90")
        (row,) = kernel_checks.rows([key], "cpu", str(library))
    assert row["status"] == "skipped" and row["note"] == "there is no such kernel here"


def test_a_kernel_by_warpgroups_is_left_out_by_its_own_family() -> None:
    status = {
        "cuda:fprop:bfloat16": "right", "cuda:sm90_fprop:bfloat16": "HUNG", "cuda:sm90_fprop:float16": "right",
        "cuda:sm90_wgrad:float16": "WRONG", "triton:taps:float16": "DIED",
    }  # fmt: skip
    rows = [{"check": check, "status": s} for check, s in status.items()]
    bad = "cuda:sm90_fprop:bfloat16,cuda:sm90_wgrad:float16,triton:taps:float16"
    assert verdicts.without(rows) == bad
    with left_out.without(bad):
        refused = {
            (family, dtype)
            for family in verdicts.FAMILIES["cuda"]
            for dtype in verdicts.DTYPES
            if inside.why_left_out(family, getattr(torch, dtype))
        }
    assert refused == {("sm90_fprop", "bfloat16"), ("sm90_wgrad", "float16")}


@needs_compiler
def test_a_check_runs_its_kernels_also_where_they_are_left_out(
    library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_checks, "SM90_SIZES", kernel_checks.SM90_SIZES[:1])
    key = "cuda:sm90_wgrad:float16"
    with left_out.without(f"{key},cuda:wgrad:float16"):
        load(library).launches()
        (row,) = kernel_checks.rows([key], "cpu", str(library))
    assert row["status"] == "right" and "sm90_wgrad" in load(library).launches()


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
