"""Tuning: which tiles are tried, that only right results are timed, and what becomes an entry."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfilm
from fastfilm.__main__ import main
from fastfilm.ops import choice
from fastfilm.ops.settings import tables
from fastfilm.ops.spec import precision
from fastfilm.tuning import binary, clock, facts, measure, search, shapes, space
from fastfilm.tuning.facts import Facts
from fastfilm.tuning.search import PRUNED, SKIPPED, TIMED, WRONG, Search
from fastfilm.tuning.shapes import Shape
from fastfilm.tuning.space import Candidate

FLAT = Shape(torch.bfloat16, 16, (64, 64), 3, 1, (320, 256))
DEEP = Shape(torch.float16, 2, (33, 40), 3, 2, (9, 17, 16))
IMAGE = Shape(torch.float32, 2, (1, 8), 3, 1, (9, 10))
TINY = Shape(torch.float32, 2, (5, 6), 3, 1, (5, 6))


@pytest.mark.parametrize("shape", [FLAT, DEEP, IMAGE], ids=str)
@pytest.mark.parametrize("family", tables.FAMILIES)
@pytest.mark.parametrize("arch", [80, 90])
def test_candidates_are_different_fit_and_come_best_first(
    shape: Shape, family: str, arch: int
) -> None:
    found = space.candidates(shape, family, arch, most=12)
    assert 2 <= len(found) <= 12 and len(set(found)) == len(found)
    times = [space.estimated(shape, family, c.fields[:-2]) for c in found]
    assert times[0] == min(times)
    itemsize = shape.convolution().itemsize
    for c in found:
        *tile, warps, stages = c.fields
        rows, columns, inner = (tile[0] * tile[1], *tile[2:]) if len(tile) == 4 else tile
        assert rows * columns // (32 * warps) <= space.ACCUMULATORS[1]
        assert stages * (rows + columns) * inner * itemsize <= binary.SHARED_LIMIT[arch]
        assert family != "wgrad" or arch < 90 or rows >= 64
    assert len({c.fields[:-2] for c in found}) > 1 or shape is IMAGE


def test_an_unknown_kernel_family_is_refused() -> None:
    with pytest.raises(ValueError, match="family must be one of"):
        space.candidates(FLAT, "pool", 90)


def test_a_tile_that_wastes_half_its_channels_ranks_behind_one_that_fits() -> None:
    narrow = Shape(torch.bfloat16, 16, (64, 32), 3, 1, (320, 256))
    wide, fits = (space.estimated(narrow, "fprop", (8, 16, bn, 64)) for bn in (64, 32))
    assert wide > fits


@pytest.mark.parametrize(("tf32", "name"), [(True, "tf32"), (False, "float32")])
def test_float32_is_ranked_with_the_rate_of_its_products(tf32: bool, name: str) -> None:
    shape = Shape(torch.float32, 16, (64, 64), 3, 1, (320, 256))
    with precision.float32_products(tf32):
        assert shape.products == name
        seconds = space.estimated(shape, "fprop", (8, 16, 64, 64))
    flops = shape.convolution().flops  # whole tiles; their arithmetic binds
    assert seconds == pytest.approx(flops / (space.SHARE * space.RANKED.matrix[name]), rel=0.2)
    assert FLAT.products == "bfloat16"


def test_shapes_of_a_network_are_found_once_each_the_costliest_first() -> None:
    net = fastfilm.FiLMedUNet(1, 2, base_filters=4, depth=1, metadata_size=2)
    image, rows = torch.randn(2, 1, 16, 12), torch.eye(2)
    net(image, rows)  # its recipes are remembered
    found = shapes.of_model(net, image, rows)
    channels = {s.channels for s in found}
    assert channels == {(1, 4), (4, 4), (8, 4), (4, 2)}
    assert len(found) == len(set(found)) == 5  # 4 -> 4 on two maps
    flops = [s.convolution().flops for s in found]
    assert flops == sorted(flops, reverse=True)
    assert [s.affine for s in found if s.channels == (1, 4)] == [False]
    assert {s.output for s in found} == {(16, 12), (8, 6)}


def test_convolutions_that_no_tile_serves_are_left_out() -> None:
    base = FLAT.request()
    changes: list[dict[str, Any]] = [
        {"transposed": True}, {"groups": 2}, {"dilation": (2, 2)}, {"kernel": (5, 5)}, {"kernel": (3, 1)},
        {"stride": (3, 3)}, {"output": ()},
    ]  # fmt: skip
    assert shapes.of_request(base) == FLAT
    for change in changes:
        assert shapes.of_request(choice.Request(**(vars(base) | change))) is None


def test_a_programs_place_on_a_multiprocessor() -> None:
    assert binary.resident(registers=64, shared=0, warps=8, arch=90) == 4  # registers: 4 * 256 * 64
    assert binary.resident(registers=255, shared=100 * 1024, warps=4, arch=90) == 2  # shared memory
    assert binary.resident(registers=16, shared=0, warps=4, arch=90) == 16  # threads
    assert binary.resident(registers=255, shared=0, warps=16, arch=90) == 0


def test_the_exact_check_runs_on_a_map_that_triton_specialises_alike() -> None:
    for shape in (FLAT, DEEP, IMAGE):
        small = measure.reduced(shape)
        pairs = [(shape.batch, small.batch), *zip(shape.output, small.output, strict=True)]
        pairs += zip(shape.size, small.size, strict=True)
        for full, less in pairs:
            assert less <= full
            assert (full == 1, full % 16 == 0) == (less == 1, less % 16 == 0)


COMPILE = """
import os
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime import driver
from fastfilm.tuning import facts, space
from fastfilm.tuning.shapes import Shape

TARGET = GPUTarget("cuda", 90, 32)

class Card:
    def get_current_target(self):
        return TARGET
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

def cached():
    return {p.name for p in Path(os.environ["TRITON_CACHE_DIR"]).iterdir()}

if __name__ == "__main__":
    shape = Shape(torch.bfloat16, 16, (64, 64), 3, 1, (320, 256))
    candidate = space.Candidate("wgrad", (64, 64, 32, 8, 2))
    good = facts.facts(shape, candidate, 90)
    print("good", good.fault == "", good.programs == 9 * 48, good.matrix > 0, good.stack == 0)
    before = cached()
    driver.set_active(Card())
    kernel, launch = facts.launch_of(shape, candidate)
    kernel.warmup(*(getattr(a, "dtype", a) for a in launch.given), grid=launch.grid, **launch.named)
    print("same", cached() == before)
    rule = facts._by_rule(kernel, launch, {"num_warps": 8, "num_stages": 2})
    compiled = compile(ASTSource(kernel, *rule[:3]), target=TARGET, options=rule.options)
    print("rule", facts.read_binary(compiled.asm["cubin"], 90) == (good.registers, good.stack, good.matrix))
    bad = facts.facts(shape, space.Candidate("dgrad", (16, 16, 64, 16, 8, 2)), 90)
    print("bad", "spills" in bad.fault, bad.stack > 0)
"""


def test_static_facts_are_those_of_the_very_binary_that_a_launch_takes(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    script = tmp_path / "compiling.py"
    script.write_text(COMPILE)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.get("good") == "True True True True", done.stdout + done.stderr
    assert lines["same"] == "True"
    assert lines["rule"] == "True"
    assert lines["bad"] == "True True"


def _subject(shape: Shape = TINY) -> measure.Subject:
    pytest.importorskip("triton", reason="the package triton is not installed")
    if not choice.interpreting():
        pytest.skip("needs Triton's interpreter")
    return measure.Subject(shape, "cpu", full=False)


@pytest.mark.parametrize("family", tables.FAMILIES)
def test_a_right_candidate_passes_the_exact_check(family: str) -> None:
    fields = (64, 16, 64, 4, 2) if family == "wgrad" else (4, 8, 16, 16, 4, 2)
    assert _subject().why_wrong(Candidate(family, fields)) is None


def _slightly(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[0] *= 1.001
    return t


def _unwritten(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t[(-1,) * t.dim()] = float("nan")
    return t


@pytest.mark.parametrize("spoil", [_slightly, _unwritten])
@pytest.mark.parametrize("family", tables.FAMILIES)
def test_a_wrong_result_is_found(
    family: str, spoil: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = _subject()
    names = dict(zip(measure.NAMES[family], ("y", "stats"), strict=False))
    right = tuple(subject.exact[n].float() for n in names)
    candidate = Candidate(family, (8, 8, 16, 16, 4, 2))
    monkeypatch.setattr(facts, "call", lambda *a, **k: right)
    assert subject.why_wrong(candidate) is None
    for i in range(len(right)):
        wrong = tuple(spoil(t) if j == i else t for j, t in enumerate(right))
        monkeypatch.setattr(facts, "call", lambda *a, wrong=wrong, **k: wrong)
        reason = subject.why_wrong(candidate)
        assert reason is not None and reason.startswith("wrong")


class Compiled:
    """Compilers whose facts are known."""

    def __init__(self, faults: dict[Candidate, str]) -> None:
        self.faults = faults

    def submit(self, shape: Shape, candidate: Candidate) -> Future[Facts]:
        future: Future[Facts] = Future()
        future.set_result(Facts(registers=64, fault=self.faults.get(candidate, "")))
        return future

    def close(self) -> None:
        pass


class Told:
    """A subject that is told what is wrong, and whose calls are the seconds that they take."""

    ran: tuple[str, ...] = ()
    wrong: tuple[object, ...] = ()
    seconds: dict[object, float]

    def __init__(self, shape: Shape, device: str, full: bool = True) -> None:
        pass

    def why_wrong(self, candidate: Candidate) -> str | None:
        Told.ran = (*Told.ran, str(candidate))
        return "wrong y" if candidate in Told.wrong else None

    def why_wrong_plan(self, plan: str) -> str | None:
        return "wrong dx" if plan in Told.wrong else None

    def candidate_call(self, candidate: Candidate | None, family: str) -> Callable[[], float]:
        return lambda: Told.seconds.get(candidate or family, 2.0)

    def plan_call(self, plan: str) -> Callable[[], float]:
        return lambda: Told.seconds[plan]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[Candidate, str]]:
    """A GPU on which every candidate takes two seconds, as does the kernel with its own tile."""
    faults: dict[Candidate, str] = {}
    monkeypatch.setattr(search, "Compilers", lambda arch, processes: Compiled(faults))
    monkeypatch.setattr(search, "Subject", Told)
    monkeypatch.setattr(search.Search, "_timed", lambda self, call: call())
    monkeypatch.setattr(search, "plans", lambda s, d: ["triton/fused", "triton/composed"])
    Told.ran, Told.wrong = (), ()
    Told.seconds = {"triton/fused": 3.0, "triton/composed": 4.0}
    yield faults


def _candidates(family: str) -> list[Candidate]:
    return space.candidates(FLAT, family, 90, 4)


def _searched(**options: Any) -> tuple[dict[tables.Key, tables.Entry], Search]:
    s = Search([FLAT], "cuda", 90, most=4, **options)
    return dict(s.entries()), s


def test_the_fastest_right_tile_and_plan_become_the_entry(told: dict[Candidate, str]) -> None:
    first, second = _candidates("fprop")[1:3]
    Told.seconds |= {first: 1.0, second: 1.5, _candidates("wgrad")[0]: 1.97}
    entries, s = _searched()
    entry = entries[FLAT.key]
    # a gain of 1.5 % over the kernel's own tile is noise
    assert entry == (
        "triton/fused",
        {"fprop": first.fields},
        {"triton/fused": 3.0, "triton/composed": 4.0},
    )
    assert {o.status for o in s.outcomes} == {TIMED}


def test_the_time_of_a_wrong_candidate_or_plan_never_counts(told: dict[Candidate, str]) -> None:
    fast, right = _candidates("dgrad")[:2]
    Told.seconds |= {fast: 0.1, right: 1.0}
    Told.wrong = (fast, "triton/fused")
    entries, s = _searched()
    assert entries[FLAT.key] == (
        "triton/composed",
        {"dgrad": right.fields},
        {"triton/composed": 4.0},
    )
    status = {o.what: o for o in s.outcomes}
    assert status[str(fast)].status == WRONG and status[str(fast)].seconds is None


def test_a_candidate_with_a_static_fault_is_never_run(told: dict[Candidate, str]) -> None:
    spilling = _candidates("fprop")[0]
    told[spilling] = "spills 8 bytes"
    Told.seconds[spilling] = 0.1
    entries, s = _searched()
    assert entries[FLAT.key].tiles == {}
    assert str(spilling) not in Told.ran and len(Told.ran) == 11
    assert [o.reason for o in s.outcomes if o.status == PRUNED] == ["spills 8 bytes"]


def test_a_candidate_that_the_model_gives_twice_the_best_time_is_never_run(
    told: dict[Candidate, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best, slow = _candidates("wgrad")[:2]
    times = {best: 1.0, slow: 2.1}
    monkeypatch.setattr(search, "predicted", lambda shape, c, found: times.get(c, 1.9))
    _, s = _searched()
    assert str(slow) not in Told.ran and str(best) in Told.ran
    (pruned,) = [o for o in s.outcomes if o.status == PRUNED]
    assert pruned.what == str(slow) and "2.1 times the best estimate" in pruned.reason
    order = [r for r in Told.ran if r.startswith("wgrad")]
    assert order[0] == str(best)


def test_waves_that_do_not_fill_the_gpu_cost_what_they_cost() -> None:
    candidate = Candidate("fprop", (8, 16, 64, 64, 8, 2))
    even = Facts(programs=132 * 4, resident=2)
    ragged = Facts(programs=132 * 4 + 1, resident=2)
    seconds = [facts.predicted(FLAT, candidate, f) for f in (even, ragged)]
    assert seconds[1] / seconds[0] == pytest.approx(3 / (529 / 264), rel=1e-6)


def test_buckets_that_are_known_already_are_left_out(told: dict[Candidate, str]) -> None:
    entries, s = _searched(known=frozenset([FLAT.key]))
    assert not entries and not s.outcomes


def test_when_the_time_is_over_nothing_more_is_started(told: dict[Candidate, str]) -> None:
    entries, s = _searched(seconds=0.0)
    assert not entries and Told.ran == ()
    assert [o.status for o in s.outcomes] == [SKIPPED]


def test_shapes_of_one_bucket_are_tuned_once(told: dict[Candidate, str]) -> None:
    close = Shape(FLAT.dtype, FLAT.batch, FLAT.channels, 3, 1, (318, 250))
    assert close.key == FLAT.key
    s = Search([FLAT, close], "cuda", 90, most=2)
    assert len(list(s.entries())) == 1


def test_each_entry_is_on_disk_before_the_next_shape(
    told: dict[Candidate, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sm_90.json"
    other = Shape(torch.bfloat16, 2, (32, 32), 3, 1, (64, 64))

    def plans(shape: Shape, device: str) -> list[str]:
        if shape == other:
            raise KeyboardInterrupt
        return ["triton/fused"]

    monkeypatch.setattr(search, "plans", plans)
    with pytest.raises(KeyboardInterrupt):
        search.save(Search([FLAT, other], "cuda", 90, most=2), path)
    assert set(tables.read(path).entries) == {FLAT.key}


@pytest.mark.skipif(os.environ.get("FASTFILM_SLOW_TESTS") != "1", reason="FASTFILM_SLOW_TESTS=1")
def test_a_search_on_interpreted_kernels_ends_with_an_entry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = _subject()
    assert subject.tensors is None
    monkeypatch.setattr(search, "Compilers", lambda arch, processes: Compiled({}))
    monkeypatch.setattr(search, "median_seconds", partial(clock.median_seconds, repeats=1))
    s = Search([TINY], "cpu", 90, most=2, timed=True)
    ((key, entry),) = s.entries()
    assert key == TINY.key and set(entry.seconds) >= {"triton/fused", "triton/composed"}
    assert {o.status for o in s.outcomes} == {TIMED}


def test_a_layer_without_an_input_gradient_has_no_dgrad_to_tune(told: dict[Candidate, str]) -> None:
    s = Search([IMAGE], "cuda", 90, most=2)
    list(s.entries())
    assert not any(o.what.startswith("dgrad") for o in s.outcomes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="has none"):
        search.tune(lambda: None)


@pytest.mark.parametrize("argv", [["--size", "3"], ["--minutes", "0"], ["--batch", "-1"]])
def test_wrong_arguments_of_the_command_are_named(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tune", *argv]) == 2
    assert f"argument {argv[0]}: must be" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_a_small_network_fills_a_table(tmp_path: Path) -> None:
    net = fastfilm.FiLMedUNet(1, 1, base_filters=16, depth=1, metadata_size=2).cuda().bfloat16()
    image = torch.randn(2, 1, 64, 64, device="cuda", dtype=torch.bfloat16)
    rows = torch.eye(2, device="cuda", dtype=torch.bfloat16)
    table = search.tune(net, image, rows, minutes=1.0, path=tmp_path / "t.json")
    assert table.entries and tables.read(tmp_path / "t.json") == table
    assert all(e.plan in e.seconds for e in table.entries.values())
