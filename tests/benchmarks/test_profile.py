"""The suite ``profile``: what is read from ncu's output, and what it is asked for."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.counted.roofline import Ceilings
from benchmarks.measure.harness import QUICK, Budget, HostClock
from benchmarks.measure.record import SKIPPED, Record
from benchmarks.measure.session import Session
from benchmarks.suites import profile
from fastfilm.ops.settings import left_out

CONVOLVE = "void fastfilm::cuda::entry<fastfilm::cuda::Convolve<fastfilm::cuda::BFloat16, 64, 32, "
FPROP = (
    CONVOLVE + "fastfilm::cuda::Activated, fastfilm::cuda::(anonymous namespace)::ForwardEpilogue,"
    " fastfilm::cuda::NoCompanion> >(T1::Params)"
)
DGRAD = (
    CONVOLVE
    + "fastfilm::cuda::RawGradient, fastfilm::cuda::BackwardEpilogue, fastfilm::cuda::NoCompanion> >(T1::Params)"
)
WGRAD = (
    "void fastfilm::cuda::entry<fastfilm::cuda::(anonymous namespace)::Wgrad<fastfilm::cuda::BFloat16, 64, 64> >"
    "(fastfilm::cuda::(anonymous namespace)::Wgrad<fastfilm::cuda::BFloat16, 64, 64>::Params)"
)
SM90 = [
    "void fastfilm::cuda::entry<fastfilm::cuda::sm90::Convolve<fastfilm::cuda::BFloat16,"
    " fastfilm::cuda::sm90::ActivatedPlanes, fastfilm::cuda::sm90::(anonymous namespace)::ForwardEpilogue> >"
    "(T1::Params)",
    "void fastfilm::cuda::entry<fastfilm::cuda::sm90::Convolve<fastfilm::cuda::BFloat16,"
    " fastfilm::cuda::sm90::GradientPlanes, fastfilm::cuda::sm90::(anonymous namespace)::BackwardEpilogue> >"
    "(T1::Params)",
    "void fastfilm::cuda::entry<fastfilm::cuda::sm90::(anonymous namespace)::Wgrad<fastfilm::cuda::BFloat16, 64> >"
    "(fastfilm::cuda::sm90::(anonymous namespace)::Wgrad<fastfilm::cuda::BFloat16, 64>::Params)",
]
SHORT = {
    "void entry<Convolve<BFloat16, 64, 64, Activated, unnamed>::ForwardEpilogue, NoCompanion>>(Params)": "fprop",
    "void entry<Convolve<BFloat16, 64, 64, RawGradient, BackwardEpilogue, NoCompanion>>(Params)": "dgrad",
    "void entry<unnamed>::Wgrad<BFloat16, 64, 64>>(Params)": "wgrad",
    "void entry<Convolve<BFloat16, ActivatedPlanes, unnamed>::ForwardEpilogue>>(Params)": "sm90_fprop",
    "void entry<Convolve<BFloat16, GradientPlanes, unnamed>::BackwardEpilogue>>(Params)": "sm90_dgrad",
    "void entry<unnamed>::Wgrad<BFloat16, 64>>(Params)": "sm90_wgrad",
}
"""As ncu writes names on an H200: without namespaces."""
HEAD = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",'
    '"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type",'
    '"Rule Description","Estimated Speedup Type","Estimated Speedup"'
)
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


def line(launch: int, kernel: str, section: str, metric: str, unit: str, value: str) -> str:
    cells = (
        launch,
        7,
        "python3.12",
        "127.0.0.1",
        kernel,
        1,
        7,
        "(256, 1, 1)",
        "(264, 1, 1)",
        0,
        "9.0",
    )
    return ",".join(f'"{c}"' for c in (*cells, section, metric, unit, value, *("",) * 5))


CANNED = "\n".join(
    [
        "NVIDIA H100, 16 threads of 16 cores",
        "==PROF== Connected to process 7 (/usr/bin/python3.12)",
        '==PROF== Profiling "entry" - 0: 0%....50%....100% - 19 passes',
        HEAD,
        line(0, FPROP, "GPU Speed Of Light Throughput", "gpu__time_duration.sum", "us", "1,234.50"),
        line(0, FPROP, "GPU Speed Of Light Throughput",
             "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "23.61"),
        line(0, FPROP, "Launch Statistics", "launch__registers_per_thread", "register/thread", "255"),
        line(0, FPROP, "Launch Statistics", "launch__grid_size", "", "264"),
        line(0, FPROP, "Warp State Statistics", STALLED.format("long_scoreboard"), "inst", "4.00"),
        line(0, FPROP, "Warp State Statistics", STALLED.format("barrier"), "inst", "2.50"),
        line(0, FPROP, "Warp State Statistics", STALLED.format("selected"), "inst", "3.00"),
        line(0, FPROP, "Warp State Statistics", STALLED.format("math_pipe_throttle"), "inst", "0.30"),
        line(0, FPROP, "Warp State Statistics", STALLED.format("wait"), "inst", "2.20"),
        f'"0","7","python3.12","127.0.0.1","{FPROP}","1","7","(256, 1, 1)","(264, 1, 1)","0","9.0",'
        '"WarpStateStats","","","","CPIStall","OPT","On average, 4.0 cycles, ""stalled"".","global","40"',
        line(0, FPROP, "Command line profiler metrics", "dram__bytes.sum", "Mbyte", "2.5"),
        line(0, FPROP, "Command line profiler metrics",
             "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "%", "31.20"),
        line(0, FPROP, "Command line profiler metrics",
             "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "", "12,345"),
        line(1, WGRAD, "GPU Speed Of Light Throughput", "gpu__time_duration.sum", "ms", "1.5"),
        line(1, WGRAD, "Command line profiler metrics", "dram__bytes.sum", "", "n/a"),
        line(1, WGRAD, "Command line profiler metrics",
             "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum", "", "250"),
        line(1, WGRAD, "Command line profiler metrics",
             "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum", "", "1,000"),
    ]
)  # fmt: skip


def session_of(tmp_path: Path | None = None, device: str = "cpu") -> Session:
    record = Record({}, None if tmp_path is None else tmp_path / "profile.json")
    options: dict[str, Any] = {"quick": True, "effort": QUICK, "budget": Budget(None)}
    options |= {"record": record, "clock": HostClock(), "ceilings": Ceilings(1.0, {"float32": 1.0})}
    return Session(device, ["float32"], verbose=False, **options)


def test_counters_are_read_in_si_units_and_the_stalls_ranked() -> None:
    first, second = profile.read_csv(CANNED)
    assert first[0] == FPROP
    stalls = first[1].pop("stalls")
    assert first[1] == pytest.approx(
        {"time": 1.2345e-3, "registers": 255.0, "dram_percent": 23.61, "dram_bytes": 2.5e6,
         "tensor_percent": 31.2, "bank_conflicts": 12345.0}
    )  # fmt: skip
    assert list(stalls.items()) == [("long_scoreboard", 0.333), ("barrier", 0.208), ("wait", 0.183)]
    conflicts = {"bank_conflicts": 250.0, "shared_wavefronts": 1000.0, "conflict_percent": 25.0}
    assert second == (WGRAD, {"time": 1.5e-3, **conflicts})
    assert profile.read_csv("==ERROR== no permission\n") == []


def test_kernels_are_told_apart_by_their_names() -> None:
    found = [profile.kernel_of(name) for name in (FPROP, DGRAD, WGRAD)]
    assert found == list(profile.KERNELS)
    assert [profile.kernel_of(name) for name in SM90] == [f"sm90_{k}" for k in profile.KERNELS]
    assert {name: profile.kernel_of(name) for name in SHORT} == SHORT


def test_each_kind_of_kernels_is_counted_for_itself_by_its_own_route(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = tuple(profile.KERNELS)
    monkeypatch.setattr(profile.inside, "instructions", lambda dtype: ("mma",))
    assert profile.kinds("bfloat16") == [plain]
    assert profile.launched_by("dgrad", "bfloat16") == ("input gradient", "cuda/fused")
    monkeypatch.setattr(profile.inside, "instructions", lambda dtype: ("wgmma", "mma"))
    with left_out.without("cuda:sm90_wgrad:bfloat16"):
        assert profile.kinds("bfloat16") == [("sm90_fprop", "sm90_dgrad"), plain]
    assert profile.launched_by("sm90_dgrad", "bfloat16") == ("input gradient", "cuda-wgmma")
    assert profile.launched_by("dgrad", "bfloat16") == ("input gradient", "cuda-mma")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(profile, "counters", lambda session, names, dtype: asked.append(names))
    monkeypatch.setattr(profile, "stages", lambda session, dtype: None)
    profile.run(session_of())
    assert asked == [("sm90_fprop", "sm90_dgrad", "sm90_wgrad"), plain]  # float32 has none left out


def test_ncu_is_asked_for_a_launch_of_each_kernel_and_leaves_the_clocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        asked.append(command)
        assert options["timeout"] <= 45
        return SimpleNamespace(stdout=CANNED, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    text, found, reason = profile.under_ncu(tuple(profile.KERNELS), "bfloat16")
    assert text == CANNED and len(found) == 2 and reason is None
    (command,) = asked
    options = dict(pairwise(command))
    assert options["--clock-control"] == "none"
    assert options["--launch-count"] == "3" and options["--one"] == "fprop,dgrad,wgrad"
    assert {c for o, c in pairwise(command) if o == "--section"} == set(profile.SECTIONS)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("==PROF== x\n==ERROR== ERR_NVGPUCTRPERM no permission\n", "ERR_NVGPUCTRPERM"),
        ("", "no output"),
    ],
)
def test_counters_that_cannot_be_read_are_one_skipped_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, output: str, said: str
) -> None:
    monkeypatch.setattr(profile, "why_not_ncu", lambda device: None)
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=output, stderr="")
    )
    session = session_of(tmp_path)
    profile.counters(session, ("fprop",), "float32")
    (row,) = session.record.rows
    assert row.status == SKIPPED and said in row.note


def test_rows_name_the_file_that_keeps_the_whole_output(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(profile, "why_not_ncu", lambda device: None)
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=CANNED, stderr="")
    )
    session = session_of(tmp_path)
    profile.counters(session, ("fprop", "wgrad"), "float32")
    assert [r.note for r in session.record.rows] == ["fprop", "wgrad"]
    name = session.record.rows[0].extra["text"]
    assert (tmp_path / name).read_text(encoding="utf-8") == CANNED


def test_without_a_gpu_one_row_says_so_and_stages_are_left_out_one_by_one() -> None:
    session = session_of()
    profile.run(session)
    skipped = [r for r in session.record.rows if r.status == SKIPPED]
    assert [r.note for r in skipped] == ["no GPU: no hardware counters"]
    variants = [r.extra.get("variant") for r in session.record.rows if r.provider == "fastfilm"]
    assert variants == [
        None, "without prologue", "without moments", "without film", "without prologue, moments, film",
    ]  # fmt: skip
