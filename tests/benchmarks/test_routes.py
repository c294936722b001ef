"""The suite ``routes``: what each direction runs, what a wrong kernel costs, and what is counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.counted import emulation, inside, traffic, verdicts
from benchmarks.counted.roofline import Ceilings
from benchmarks.measure.harness import QUICK, Budget, HostClock
from benchmarks.measure.record import FAILED, OK, SKIPPED, Record
from benchmarks.measure.session import Session
from benchmarks.subjects.layers import LayerStep, steady
from benchmarks.suites import routes
from fastfilm.ops.settings import left_out
from tests.support import emulated
from tests.support.emulated import extension, library

__all__ = ["extension", "library"]

needs_compiler = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")
PLAIN, JOINED, VOLUME = (routes.SUBJECTS[i].tiny() for i in (0, 1, 2))
DTYPE = "float16"
"""Triton's interpreter rounds to bfloat16 by cutting digits off."""


@pytest.fixture
def cuda(extension: ModuleType) -> Iterator[Any]:
    with emulation.serving(extension) as launchers:
        yield launchers


def session_of(**options: Any) -> Session:
    usual: dict[str, Any] = {"quick": True, "effort": QUICK, "budget": Budget(None)}
    ceilings = Ceilings(1e9, {DTYPE: 1e12})
    usual |= {"record": Record({}), "clock": HostClock(), "ceilings": ceilings, "verbose": False}
    return Session("cpu", [DTYPE], **(usual | options))


def launched(subject: routes.Subject, route: str, direction: str) -> set[str]:
    """The convolutions and passes over maps that a direction's timed call launches."""
    step = routes.step_of(subject, "cpu", DTYPE, route, routes.DIRECTIONS[direction])
    with traffic.counted() as before:
        out = step.forward()
    with traffic.counted() as found:
        step.gradients(out)
    launches = before if direction == "forward" else found
    return {k.name for k in launches if k.owner != "aten" or "convolution" in k.name} - {
        "block_coefficients",
        "block_coefficients_backward",
        "why_not",
    }


@needs_compiler
@pytest.mark.parametrize(
    ("route", "direction", "expected"),
    [
        ("cuda/fused", "forward", {"fprop"}),
        ("cuda/fused", "input gradient", {"dgrad"}),
        ("cuda/fused", "weight gradient", {"wgrad"}),
        ("cuda/fused", "both gradients", {"dgrad", "wgrad"}),
    ],
)
def test_a_direction_launches_its_own_convolution_alone(
    cuda: Any, route: str, direction: str, expected: set[str]
) -> None:
    assert launched(PLAIN, route, direction) == expected
    # the gradient of the resized half is led back by a pass of its own
    led = {"gather_backward"} if direction in ("input gradient", "both gradients") else set()
    # it is written in front of a kernel that reads it
    led |= {"gather"}
    assert launched(JOINED, route, direction) == expected | led


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("forward", {"apply", "convolution", "moments"}),
        ("input gradient", {"moments_backward", "apply", "convolution_dgrad", "apply_backward"}),
        ("weight gradient", {"moments_backward", "apply", "convolution_wgrad"}),
    ],
)
def test_the_composed_route_is_the_vendors_convolution_with_our_passes(
    direction: str, expected: set[str]
) -> None:
    assert launched(PLAIN, "triton/composed", direction) == expected


@needs_compiler
@pytest.mark.parametrize("subject", [PLAIN, JOINED, VOLUME], ids=lambda s: s.name)
def test_a_layer_gets_a_row_of_each_route_and_direction(
    cuda: Any, subject: routes.Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    session = session_of()
    routes.measure(session, subject, DTYPE, ["cuda/fused"])
    rows = session.record.rows
    assert [(r.status, r.note) for r in rows] == [(OK, "")] * len(rows)
    assert len(rows) == 8
    for row in rows:
        assert row.median_s and row.tflops and row.gbps and row.fraction_of_floor and row.ratio
        assert row.provider == "vendor" or row.error is not None
    shown = capsys.readouterr().out
    assert subject.name in shown and "weight gradient" in shown


@needs_compiler
def test_a_wrong_kernel_has_a_failed_row_without_a_time_and_the_others_go_on(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cuda.wgrad

    def wrong(*args: Any) -> Any:
        dweight, dpre = right(*args)
        return dweight * 1.01, dpre

    def broken(*args: Any) -> Any:
        raise RuntimeError("dgrad: no")

    monkeypatch.setattr(cuda, "wgrad", wrong)
    monkeypatch.setattr(cuda, "dgrad", broken)
    session = session_of()
    routes.measure(session, PLAIN, DTYPE, ["cuda/fused"])
    rows = {(r.mode, r.provider): r for r in session.record.rows}
    weight = rows["weight gradient", "fastfilm-cuda/fused"]
    assert weight.status == FAILED and weight.median_s is None
    assert weight.note.startswith("wrong gradient of weight")
    assert rows["input gradient", "fastfilm-cuda/fused"].note == "dgrad: no"
    assert rows["forward", "fastfilm-cuda/fused"].status == OK
    assert session.record.failed


def kernels_of(extension: ModuleType, route: str, direction: str) -> tuple[set[str], set[str]]:
    """The CUDA convolutions that run in the forward pass and in the gradients of a direction's step."""
    step = routes.step_of(PLAIN, "cpu", DTYPE, route, routes.DIRECTIONS[direction])
    extension.launches()
    out = step.forward()
    before = set(extension.launches())
    step.gradients(out)
    families = {f"{kind}{k}" for kind in ("", verdicts.SM90) for k in inside.KERNELS}
    return before & families, set(extension.launches()) & families


@needs_compiler
def test_each_kind_of_cuda_convolutions_is_a_route_whose_own_kernels_run(
    cuda: Any, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = routes.KINDS
    assert routes.routes("cpu", DTYPE)[0][-2:] == [old, new]
    assert kernels_of(extension, new, "forward")[0] == {"sm90_fprop"}
    # a fault of the one kernel is not the other's
    assert kernels_of(extension, new, "input gradient") == ({"fprop"}, {"sm90_dgrad"})
    assert kernels_of(extension, new, "both gradients")[1] == {"sm90_dgrad", "sm90_wgrad"}
    assert kernels_of(extension, old, "both gradients") == ({"fprop"}, {"dgrad", "wgrad"})
    # one kind only: one row
    assert routes.OURS in routes.routes("cpu", "float32")[0]
    monkeypatch.setattr(extension, "architectures", "80")
    usable, _ = routes.routes("cpu", DTYPE)
    assert routes.OURS in usable and not {old, new} & {*usable}


@needs_compiler
def test_a_layer_has_a_row_of_each_kind_unless_its_kernel_is_left_out_or_takes_it_not(
    cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    by = inside.instruction_of

    def without_wgrad(kernel: str, *given: Any, **named: Any) -> str:
        return "mma" if kernel == "wgrad" else by(kernel, *given, **named)

    monkeypatch.setattr(inside, "instruction_of", without_wgrad)
    session = session_of()
    with left_out.without(f"cuda:sm90_dgrad:{DTYPE},cuda:sm90_fprop:bfloat16"):
        routes.measure(session, PLAIN, DTYPE, [*routes.KINDS])
    rows = {(r.mode, r.provider): r for r in session.record.rows}
    new = {mode: rows[mode, "fastfilm-cuda-wgmma"] for mode in routes.DIRECTIONS}
    assert new["forward"].status == OK and new["forward"].ratio
    assert new["forward"].extra["chosen"] in (True, False)
    said = {mode: row.note for mode, row in new.items() if row.status == SKIPPED}
    left = f"cuda:sm90_dgrad:{DTYPE} is left out by FASTFILM_WITHOUT"
    assert said == {
        "input gradient": left, "both gradients": left, "weight gradient": "no wgrad by wgmma takes this layer",
    }  # fmt: skip
    assert all(row.median_s is None for mode, row in new.items() if mode in said)
    assert {rows[mode, "fastfilm-cuda-mma"].status for mode in routes.DIRECTIONS} == {OK}
    assert not session.record.failed


def test_what_finds_no_time_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    session = session_of(budget=Budget(0.0), quick=False)
    routes.run(session)
    rows = [r for r in session.record.rows if r.note == routes.NO_TIME]
    assert len(rows) == len(routes.SUBJECTS) == 10
    assert {r.status for r in rows} == {SKIPPED}
    assert capsys.readouterr().out.count(routes.NO_TIME) == 10


def test_work_counts_each_map_once_and_a_resized_one_at_its_own_size() -> None:
    ceilings = Ceilings(1e12, {"bfloat16": 1e15})
    plain, both = (
        routes.work_of(routes.SUBJECTS[0], d, "bfloat16", ceilings)
        for d in ("input gradient", "both gradients")
    )
    flops, image, weight = 2 * 16 * 256**2 * 64 * 64 * 9, 2 * 16 * 256**2 * 64, 2 * 64 * 64 * 9
    assert (plain.flops, plain.bytes) == (flops, 2 * image + weight)
    assert (both.flops, both.bytes) == (2 * flops, 3 * image + 2 * weight)
    assert plain.floor_s == max(plain.bytes / 1e12, flops / 1e15)
    joined = routes.work_of(routes.SUBJECTS[1], "forward", "bfloat16", ceilings)
    places = 16 * 320 * 256
    assert joined.bytes == 2 * (places * (128 // 4 + 64 + 64) + 192 * 64 * 9)


def test_the_first_layers_decide_and_the_image_needs_no_gradient() -> None:
    names = [s.name for s in routes.SUBJECTS]
    assert names[:2] == ["64→64 3² @ 256×256 b16", "(128⇑, 64)→64 3² @ 320×256 b16"]
    assert names[2:4] == ["32→32 3³ @ 128×128×128 b2", "(64⇑, 32)→32 3³ @ 128×128×128 b2"]
    assert len(set(names)) == 10
    assert [s.block.layer.cin for s in routes.SUBJECTS if not s.block.layer.input_grad] == [1]
    assert {(s.dims, s.block.norm) for s in routes.SUBJECTS} == {(2, "batch"), (3, "instance")}


def test_a_layer_is_cut_down_with_its_halves() -> None:
    crop = routes.SUBJECTS[1].sized(64)
    assert crop.block.layer.size == (64, 64) and crop.block.batch == 16
    assert (JOINED.resized, JOINED.block.layer.cin) == (16, 24)
    step = LayerStep(JOINED.block, "cpu", "float32", "training", resized=JOINED.resized)
    assert [tuple(raw.shape) for raw in step.raws] == [(1, 16, 4, 4), (1, 8, 8, 8)]


def test_only_what_is_wanted_is_differentiated() -> None:
    block = replace(PLAIN.block, norm="instance")
    for wanted, count in ((("input",), 2), (("weight",), 2), (("input", "weight", "tail"), 8)):
        step = LayerStep(block, "cpu", "float32", "training", wanted=wanted)
        assert len(step.leaves) == count
        first, second = (step.gradients(out) for out in [step.forward()] for _ in range(2))
        pairs = zip(first, second, strict=True)
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def test_a_steady_call_takes_what_was_made_before_it() -> None:
    call, how = steady(lambda x: x + 1, "cpu", before=lambda: 2)
    assert (call(), how) == (3, "call")


def test_where_no_route_runs_the_cpus_own_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes.inside, "why_not", lambda route, device, dtype: f"no {route}")
    usable, missing = routes.routes("cpu", "float32")
    assert usable == ["cpu/composed"]
    assert missing["cuda/fused"] == "no cuda/fused" and set(missing) == set(routes.ROUTES)
