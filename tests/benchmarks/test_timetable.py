"""A run that ends in time: what comes first, what is left out, and that it is named."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

# importing it makes the folder benchmarks a package
from tests.benchmarks.test_benchmarks import CEILINGS, FakeClock, _session  # isort: skip

from benchmarks import cli
from benchmarks.counted import roofline
from benchmarks.counted.machine_code import triton_binaries
from benchmarks.measure import graphs, harness, providers, record, table
from benchmarks.measure.record import NO_TIME
from benchmarks.measure.session import Case, Provider
from benchmarks.subjects import blocks, networks
from benchmarks.subjects.step import Step
from benchmarks.suites import converted, memory, model, ops, static, timetable

CASE = Case("ops", "c", "forward", "float32")
EFFORT = harness.Effort(min_rounds=4, max_rounds=4, seconds=0.0, window=0.0)
TINY = replace(networks.NETWORKS[0], batch=2, size=(16, 16), widths=(4, 8))


class Time(FakeClock):
    """A fake clock whose calls may also be made directly, a second each."""

    def tick(self, seconds: float = 1.0) -> list[torch.Tensor]:
        self.t += seconds
        return [torch.ones(2)]


def test_no_region_starts_after_the_end_and_only_whole_rounds_count():
    clock = FakeClock()
    budget = harness.Budget(7.5, clock.now)
    functions = {"a": lambda: ("a", 1.0), "b": lambda: ("b", 1.0)}
    times = harness.paired(functions, clock, EFFORT, warmup=1, budget=budget)
    # two warm-up calls, two whole rounds, and a third that is cut after both are begun by 7.5 s
    assert clock.t == 8.0 and times == {"a": [1.0] * 3, "b": [1.0] * 3}
    clock, times = FakeClock(), None
    budget = harness.Budget(4.5, clock.now)
    times = harness.paired(functions, clock, EFFORT, warmup=1, budget=budget)
    assert clock.t == 5.0 and times == {"a": [1.0], "b": [1.0]}
    assert harness.paired(functions, clock, EFFORT, budget=budget) == {"a": [], "b": []}
    assert clock.t == 5.0


def test_the_clocks_own_time_counts_when_short_calls_are_repeated():
    class Slow(FakeClock):
        def time(self, call, calls):
            self.t += 0.2e-3 * calls
            return super().time(call, calls)

    calls = harness.calls_a_region(lambda: ("a", 5e-6), Slow(), 2e-3)
    assert calls == 10  # 400 without the flush, which would make a region of 80 ms


def test_a_provider_that_there_is_no_time_for_is_named_and_not_called():
    clock = Time()
    budget = harness.Budget(2.5, clock.now)
    session = _session(clock=clock, budget=budget, end=harness.Budget(100.0, clock.now))
    called = []

    def provider(name):
        def check():
            called.append(name)
            return clock.tick()

        return Provider(lambda: (name, 1.0), check=check)

    names = ("eager", "eager-channels-last", "fastfilm", "paper")
    session.measure(CASE, {name: provider(name) for name in names})
    rows = {r.provider: r for r in session.record.rows}
    assert called == ["eager", "eager-channels-last", "fastfilm"]
    assert rows["fastfilm"].ratio == 1.0 and rows["paper"].status == "skipped"
    assert rows["paper"].note.startswith(NO_TIME) and not session.record.failed


def test_without_one_layout_of_eager_there_is_no_ratio():
    clock = Time()
    budget = harness.Budget(0.5, clock.now)
    session = _session(clock=clock, budget=budget, end=harness.Budget(100.0, clock.now))
    eager = Provider(lambda: ("eager", 1.0), check=clock.tick)
    session.measure(CASE, {"eager": eager, "eager-channels-last": eager})
    rows = {r.provider: r for r in session.record.rows}
    assert rows["eager"].median_s == 1.0 and rows["eager"].ratio is None
    assert "no ratio without eager-channels-last" in rows["eager"].note


def test_a_first_call_ends_at_its_bound():
    def wrapped():
        try:
            time.sleep(30)
        except Exception as error:
            raise RuntimeError(f"in the compiler: {error}") from error

    session = _session(budget=still(0.2))
    slow = Provider(lambda: time.sleep(30))
    session.measure(CASE, {"fastfilm": slow, "fastfilm-triton": Provider(wrapped)})
    for row in session.record.rows:
        assert row.status == "skipped" and row.note.startswith(NO_TIME)
    assert len(session.record.rows) == 2 and not session.record.failed


def test_an_import_is_never_cut_in_half(monkeypatch, tmp_path):
    text = "import time\nfor _ in range(200):\n    time.sleep(0.01)\nwhole = True\n"
    (tmp_path / "slow_to_import.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(harness.TookTooLong), harness.time_limit(0.05, "the import"):
        import slow_to_import

        time.sleep(30)
    assert slow_to_import.whole


def test_a_reference_that_takes_too_long_is_given_up(monkeypatch):
    session = _session(budget=still(10.0))
    monkeypatch.setattr("benchmarks.measure.session.REFERENCE_SHARE", 0.01)
    session.measure(CASE, {"fastfilm": Provider(lambda: [torch.ones(2)])}, lambda: time.sleep(30))
    (row,) = session.record.rows
    assert row.median_s and row.error is None and row.note.startswith("not checked")


def test_cudnn_does_not_search_for_the_reference(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    def reference():
        seen.append(torch.backends.cudnn.benchmark)
        return [torch.ones(2)]

    _session().measure(CASE, {"eager": Provider(lambda: [torch.ones(2)])}, reference)
    assert seen == [False] and torch.backends.cudnn.benchmark


def test_a_baseline_timed_again_has_no_second_row():
    clock = FakeClock()
    session = _session(clock=clock)
    x = [torch.ones(2)]
    eager = Provider(lambda: ("eager", 2.0), check=lambda: x)
    other = Provider(lambda: ("compile", 1.0), check=lambda: x)
    session.measure(CASE, {"eager": eager, "compile": other}, beside={"eager"})
    (row,) = session.record.rows
    assert row.provider == "compile" and row.ratio == 2.0


def test_parts_come_in_order_each_within_its_share(monkeypatch):
    clock = Time()
    session = _session(clock=clock, budget=harness.Budget(100.0, clock.now), dtypes=["a", "b"])
    log = []

    def part(session):
        log.append((session.dtypes, round(session.budget.left()), round(session.end.left())))
        clock.t += 30.0

    monkeypatch.setitem(sys.modules, "benchmarks.suites.fake", SimpleNamespace(part=part))
    parts = [
        timetable.Part("fake", "part", 0.5, "first"),
        timetable.Part("fake", "part", 0.6, "rest"),
        timetable.Part("fake", "part", 1.0),
    ]
    waiting = []
    timetable.run(session, 100.0, waiting, parts)
    assert log == [(["a"], 50, 100), (["b"], 30, 70), (["a", "b"], 40, 40)]
    assert not waiting and session.dtypes == ["a", "b"] and session.budget.left() == 10.0


def test_a_part_that_fails_is_named_and_the_next_one_runs(monkeypatch, capsys):
    def fails(session):
        raise RuntimeError("out of memory")

    called = []
    fake = SimpleNamespace(fails=fails, works=called.append)
    monkeypatch.setitem(sys.modules, "benchmarks.suites.fake", fake)
    session = _session()
    parts = [timetable.Part("fake", "fails", 0.5), timetable.Part("fake", "works", 1.0)]
    timetable.run(session, None, [], parts)
    (row,) = session.record.rows
    assert (row.status, row.note) == ("FAILED", "out of memory") and called == [session]
    assert session.record.failed and "RuntimeError" in capsys.readouterr().err


def test_the_most_telling_parts_come_first():
    order = [(p.suite, p.what, p.dtypes) for p in timetable.PARTS]
    assert order[0] == ("model", "plain", "first")
    assert [s for s, what, d in order if d != "rest" and what != "graphs"] == [
        "model", "model", "memory", "ops", "ops",
    ]  # fmt: skip
    assert [p.until for p in timetable.PARTS] == sorted(p.until for p in timetable.PARTS)
    # every part of a suite's own run is there, for all dtypes
    for suite, what in (("model", "plain"), ("model", "compiled"), ("ops", "plain")):
        dtypes = {d for s, w, d in order if (s, w) == (suite, what)}
        assert dtypes == {"first", "rest"}


def still(seconds):
    """A budget of which ``seconds`` are left for ever."""
    return harness.Budget(seconds, lambda: 0.0)


def _refuse(*args, **kwargs):
    raise AssertionError("called after the end")


@pytest.mark.parametrize("what", ["plain", "graphs", "compiled"])
def test_networks_after_the_end_are_named_and_not_built(monkeypatch, what):
    monkeypatch.setattr(model, "subject", _refuse)
    monkeypatch.setattr(providers, "compiled", _refuse)
    session = _session(seconds=0.0, dtypes=["float32", "bfloat16"])
    getattr(model, what)(session)
    rows = session.record.rows
    assert len(rows) == 8 and {r.status for r in rows} == {"skipped"}
    assert len({(r.case, r.mode, r.dtype) for r in rows}) == 8
    assert all(r.note.startswith(NO_TIME) for r in rows)


def test_blocks_and_counts_after_the_end_are_named(monkeypatch):
    monkeypatch.setattr(blocks, "make", _refuse)
    monkeypatch.setattr(memory, "count", _refuse)
    session = _session(seconds=0.0)
    ops.run(session)
    memory.run(session)
    named = table.left_out(session.record.rows)
    assert named == (
        "no time left for: ops float32: 11 cases; memory float32: FiLMedUNet 2D 320×256 b1 training"
    )


def test_what_ran_is_in_the_table_and_what_did_not_is_named():
    row = record.Row("ops", "c", "eager", "forward", "float32", "cpu")
    rows = [row, replace(row, provider="paper", status="skipped", note=NO_TIME)]
    assert "eager" in table.table(rows) and "paper" not in table.table(rows)
    assert table.left_out(rows) == "no time left for: ops float32: paper in c forward"
    rows += [replace(rows[1], provider="compile"), replace(rows[1], case="d", provider="all")]
    assert table.left_out(rows).endswith("paper, compile in c forward; ops float32: d forward")
    assert table.left_out([row, replace(row, status="skipped", note="no compiler")]) == ""


def test_compiling_is_not_started_without_time_for_it(monkeypatch):
    monkeypatch.setattr(providers, "compiled", _refuse)
    monkeypatch.setattr(providers, "why_not_compile", lambda device, quick: None)
    session = _session(budget=still(24.0))
    skipped = model.compile_into(session, {}, _refuse, None)
    assert skipped == [("compile", NO_TIME)]
    assert _session(budget=still(60.0)).why_not("compile") is None
    assert "left out" in _session(compile_kinds=()).why_not("compile")


def test_compiling_cut_by_the_end_says_so(monkeypatch):
    monkeypatch.setattr(providers, "compiled", lambda *a: (None, "compiling took longer than 30 s"))
    monkeypatch.setattr(providers, "why_not_compile", lambda device, quick: None)
    make = lambda: SimpleNamespace(model=None, call_by=None)  # noqa: E731
    session = _session(budget=still(30.0), compile_seconds=60.0)
    ((_, reason),) = model.compile_into(session, {}, make, None)
    assert reason.startswith(NO_TIME) and not session.slow_to_compile
    session = _session(budget=still(90.0), compile_seconds=60.0)
    ((_, reason),) = model.compile_into(session, {}, make, None)
    assert not reason.startswith(NO_TIME) and session.slow_to_compile == {"compile"}


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", False), ("tf32", True)])
def test_float32_is_compiled_without_tf32(monkeypatch, dtype, allowed):
    seen = []

    def compiled(*args):
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return None, "not now"

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(providers, "compiled", compiled)
    monkeypatch.setattr(providers, "why_not_compile", lambda device, quick: None)
    monkeypatch.setattr(model, "networks", lambda session: [TINY])
    small = blocks.Block(roofline.Layer(2, 4, (8, 8)), 2)
    monkeypatch.setattr(ops, "cases", lambda session: [small])
    rates = {"float32": 1e12, "tf32": 1e12}
    session = _session(dtypes=[dtype], ceilings=replace(CEILINGS, matrix=rates))
    model.compiled(session)
    ops.compiled(session)
    assert set(seen) == {(allowed, allowed)} and len(seen) == 4


def test_the_static_suite_needs_a_minute(monkeypatch):
    built = []
    monkeypatch.setattr(static, "run", lambda session, quick: built.append(quick))
    args = cli.parser().parse_args([])
    session = _session(seconds=10.0)
    cli.static_last(session, args, "cuda", time.monotonic() - 91.0)
    (row,) = session.record.rows
    assert not built and (row.suite, row.note) == ("static", NO_TIME)
    cli.static_last(session, args, "cuda", time.monotonic() - 30.0)
    cli.static_last(session, args, "cpu", time.monotonic() - 60.0)
    assert built == [True, True] and len(session.record.rows) == 1


def _sleep(build):
    time.sleep(600)


def test_no_process_of_the_static_suite_outlives_its_bound(monkeypatch):
    monkeypatch.setattr(triton_binaries, "compile_one", _sleep)
    monkeypatch.setattr(triton_binaries, "builds", lambda quick, archs: [1, 2, 3])
    with pytest.raises(harness.TookTooLong), harness.time_limit(0.5, "building"):
        triton_binaries.run_static(True)
    end = time.monotonic() + 30
    # asked again and again: the pool's own thread may be about to note that it has ended
    while alive := [c for c in multiprocessing.active_children() if c.is_alive()]:
        assert time.monotonic() < end, alive
        time.sleep(0.01)


def test_both_modes_have_a_floor(monkeypatch):
    monkeypatch.setattr(model, "networks", lambda session: [TINY])
    session = _session()
    model.plain(session)
    floors = {r.mode: r.floor_s for r in session.record.rows}
    assert floors["training"] > 2 * floors["inference"] > 0


def test_a_run_without_time_names_everything(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timetable, "ROWS_END", {"cpu": 0.0})
    monkeypatch.setattr(timetable, "END", {"cpu": 0.0})
    monkeypatch.setattr("benchmarks.measure.machine.ceilings", lambda *_: CEILINGS)
    out = tmp_path / "o.json"
    plot = str(tmp_path / "o.png")
    assert cli.main(["--device", "cpu", "--json", str(out), "--plot", plot]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {r["suite"] for r in rows} == {"model", "ops", "memory", "static"}
    assert {r["status"] for r in rows} == {"skipped"}
    said = capsys.readouterr().out
    last = said.strip().splitlines()[-1]
    assert last.startswith("no time left for: model float32: 4 cases;") and "static" in last
    assert "\nNothing was timed on" in said and "\nNext: give the run more time" in said


def test_the_watchdog_writes_what_there_is_and_ends_the_process():
    gone = threading.Event()
    log = []

    def leave(status):
        log.append(status)
        gone.set()

    timetable.Watchdog(0.01, lambda: log.append("finish"), leave)
    assert gone.wait(30) and log == ["finish", 1]
    stopped = timetable.Watchdog(1e6, _refuse, leave)
    stopped.cancel()
    stopped.timer.join(30)
    assert not stopped.timer.is_alive() and log == ["finish", 1]


def test_what_the_watchdog_ends_is_named():
    session = _session(dtypes=["bfloat16", "float32"])
    session.running = replace(CASE, suite="model"), "fastfilm"
    timetable.cut(session, [timetable.Part("ops", "plain", 1.0, "first")])
    assert table.left_out(session.record.rows) == (
        "no time left for: model float32: fastfilm in c forward; ops bfloat16: all plain"
    )


def _step(mode="training"):
    torch.manual_seed(0)
    batch = torch.randn(2, 1, 16, 16), model.one_hot(2, "cpu"), torch.randn(2, 1, 16, 16)
    return Step(TINY.build(), *batch, mode=mode, dtype="float32", layout="channels-last"), batch


def test_a_network_is_checked_on_a_small_batch_where_float64_is_slow():
    assert roofline.check_is_small("cuda", "float32") and roofline.check_is_small("cuda", "tf32")
    assert not roofline.check_is_small("cuda", "bfloat16")
    assert not roofline.check_is_small("cpu", "float32")
    step, batch = _step()
    small = batch[0][:1, :, :8, :8], batch[1][:1], batch[2][:1, :, :8, :8]
    names = [n for n, _ in step.model.named_parameters()]
    provider = step.provider(names, small, "on a small batch")
    assert provider.note == "on a small batch" and provider.call()[0].shape == (2, 1, 16, 16)
    expected = Step(
        step.model, *small, mode="training", dtype="float32", layout="channels-last"
    ).named_results(names)
    assert record.relative_error(provider.check(), expected) == 0.0


def test_without_a_gpu_graphs_are_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(model, "networks", lambda session: [TINY])
    session = _session(graphs=True)
    model.graphs(session)
    rows = session.record.rows
    assert {r.provider for r in rows} == {"eager-channels-last-graph", "fastfilm-graph"}
    assert all(r.status == "skipped" and "need a CUDA device" in r.note for r in rows)
    assert all(r.median_s is None for r in rows)


def test_a_replayed_step_is_measured_beside_eager_and_checked(monkeypatch):
    monkeypatch.setattr(model, "networks", lambda session: [TINY])
    replays = []

    def capture(call):
        result = call()

        def replay():
            replays.append(1)

        return graphs.Captured(replay, result)

    monkeypatch.setattr("benchmarks.subjects.step.capture", capture)
    session = _session(graphs=True)
    model.graphs(session)
    rows = session.record.rows
    assert len(rows) == 4 and {r.status for r in rows} == {"ok"} and replays
    assert {r.provider for r in rows} == {"eager-channels-last-graph", "fastfilm-graph"}
    assert all(r.ratio and r.error < 1e-5 for r in rows)
    step, _ = _step()
    assert step.captured([n for n, _ in step.model.named_parameters()]).memory is step


def test_a_replay_that_gives_something_else_fails(monkeypatch):
    monkeypatch.setattr(model, "networks", lambda session: [TINY])

    def capture(call):
        return graphs.Captured(lambda: None, [2 * t for t in call()])

    monkeypatch.setattr("benchmarks.subjects.step.capture", capture)
    session = _session(graphs=True)
    model.graphs(session)
    assert {r.status for r in session.record.rows} == {"FAILED"}


@pytest.fixture
def cuda(monkeypatch):
    """Stand-ins for CUDA's streams and graphs; the log of what is done with them."""
    log = SimpleNamespace(stream="main", captures=0, calls=[], state="fresh", ended=0)

    @contextlib.contextmanager
    def stream(side):
        before, log.stream = log.stream, "side"
        yield
        log.stream = before

    class Graph:
        """As PyTorch's: its exit raises an error of its own and then leaves the stream as it is."""

        def __init__(self, graph, pool, stream):
            assert pool == (0, 7)

        def __enter__(self):
            log.stream, log.state, log.captures = "side", "capturing", log.captures + 1

        def __exit__(self, kind, error, trace):
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")
            log.stream, log.state = "main", "fresh"

    waiting = SimpleNamespace(wait_stream=lambda other: None)
    generator = SimpleNamespace(
        clone_state=lambda: "fresh", graphsafe_set_state=lambda s: setattr(log, "state", s)
    )
    names = {
        "is_available": lambda: True,
        "current_stream": lambda: waiting,
        "set_stream": lambda s: setattr(log, "stream", "main" if s is waiting else "?"),
        "Stream": lambda: waiting,
        "stream": stream,
        "graph": Graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: log.calls.append("replay")),
        "graph_pool_handle": lambda: (0, 7),
        "current_device": lambda: 0,
        "default_generators": [generator],
        "synchronize": lambda: None,
    }
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    end = lambda device, pool: setattr(log, "ended", log.ended + 1)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return log


def test_a_call_is_captured_behind_its_warm_up(cuda):
    found = graphs.capture(lambda: cuda.calls.append(cuda.state))
    assert cuda.calls == ["fresh"] * graphs.WARM_UP + ["capturing"] and cuda.stream == "main"
    found.replay()
    assert cuda.calls[-1] == "replay" and cuda.ended == 0


def test_a_failed_capture_names_its_own_error_and_leaves_the_device_as_it_was(cuda):
    def call():
        if cuda.state == "capturing":
            raise RuntimeError("warm the network up first\nand more")

    with pytest.raises(graphs.CaptureFailed, match=r"^warm the network up first$"):
        graphs.capture(call)
    assert (cuda.stream, cuda.state, cuda.ended) == ("main", "fresh", 1)


@pytest.mark.parametrize("suite", [model, converted], ids=["model", "converted"])
def test_results_are_compared_on_the_small_batch_and_the_note_says_so(monkeypatch, suite):
    sizes, whole = [], model.truth

    def truth(network, batch, *args):
        sizes.append(tuple(batch[0].shape))
        return whole(network, batch, *args)

    volume = replace(
        TINY, kind="dynunet", size=(16, 16, 16), channels=4, classes=4, widths=(4, 8, 16)
    )
    monkeypatch.setattr(suite, "check_is_small", lambda device, dtype: True)
    monkeypatch.setattr(suite, "networks", lambda session: [TINY if suite is model else volume])
    monkeypatch.setattr(suite, "truth", truth)
    session = _session()
    (model.plain if suite is model else converted.run)(session)
    assert set(sizes) == {(1, 1, 8, 8) if suite is model else (1, 4, 8, 8, 8)}
    ours = [r for r in session.record.rows if r.provider.startswith("fastfilm") and r.ratio]
    assert ours and all("half the size" in r.note and r.error < 1e-4 for r in ours)
