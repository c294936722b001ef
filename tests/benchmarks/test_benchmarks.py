"""The benchmark command: what it times, what it lets through, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    "suite", "case", "provider", "mode", "dtype", "device", "median_s", "p20_s", "p80_s", "tflops",
    "gbps", "floor_s", "fraction_of_floor", "peak_bytes", "saved_bytes", "error", "eager_error",
    "status", "ratio",
}  # fmt: skip


def _load_run():
    spec = importlib.util.spec_from_file_location("_bench_run", ROOT / "benchmarks" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.load_package()
    return module


RUN = _load_run()

from benchmarks import cli  # noqa: E402
from benchmarks.counted import roofline  # noqa: E402
from benchmarks.measure import harness, machine, record, table, volume  # noqa: E402
from benchmarks.measure.session import Case, Provider, Session  # noqa: E402
from benchmarks.subjects import blocks, networks  # noqa: E402
from benchmarks.suites import peers  # noqa: E402

CEILINGS = roofline.Ceilings(bandwidth=1e9, matrix={"float32": 1e12, "bfloat16": 4e12})


class FakeClock:
    """Each call takes what its function returns; a drift slows all calls down with time."""

    def __init__(self, drift: float = 0.0) -> None:
        self.t, self.drift, self.order = 0.0, drift, []

    def time(self, call, calls):
        name, seconds = call()
        seconds *= 1 + self.drift * self.t
        self.order.append(name)
        self.t += seconds * calls
        return seconds

    def now(self):
        return self.t


def _session(path=None, seconds=None, clock=None, **options):
    values = {
        "device": "cpu",
        "dtypes": ["float32"],
        "quick": True,
        "effort": harness.Effort(3, 3, 0.0, 0.0),
        "budget": harness.Budget(seconds),
        "record": record.Record({"device": "cpu"}, path),
        "clock": clock or harness.HostClock(),
        "ceilings": CEILINGS,
        "verbose": False,
    }
    return Session(**(values | options))


def test_functions_take_turns_and_warm_up_is_not_in_the_figures():
    clock = FakeClock()
    first = iter([9.0, 9.0])
    functions = {
        "a": lambda: ("a", next(first, 1.0)),
        "b": lambda: ("b", 2.0),
    }
    effort = harness.Effort(min_rounds=4, max_rounds=4, seconds=0.0, window=0.0)
    times = harness.paired(functions, clock, effort, warmup=2)
    assert times == {"a": [1.0] * 4, "b": [2.0] * 4}
    assert clock.order[4:] == ["a", "b", "b", "a"] * 2


def test_a_drift_of_the_machine_leaves_the_paired_ratio_alone():
    clock = FakeClock(drift=0.05)
    functions = {"a": lambda: ("a", 2.0), "b": lambda: ("b", 1.0)}
    effort = harness.Effort(min_rounds=20, max_rounds=20, seconds=0.0, window=0.0)
    times = harness.paired(functions, clock, effort)
    assert times["a"][-1] > 3 * times["a"][0]
    assert harness.paired_ratio(times["a"], times["b"]) == pytest.approx(2.0, rel=0.1)


def test_short_calls_are_repeated_and_rounds_stop_at_the_time_asked_for():
    clock = FakeClock()
    effort = harness.Effort(min_rounds=2, max_rounds=50, seconds=1.0, window=0.1)
    times = harness.paired({"a": lambda: ("a", 0.01)}, clock, effort)
    assert len(times["a"]) == 10  # ten calls of 10 ms a region, ten regions a second


def test_quantiles_interpolate():
    assert harness.quantile([4.0, 1.0, 3.0, 2.0, 5.0], 0.2) == pytest.approx(1.8)
    assert harness.quantile([7.0], 0.8) == 7.0


def test_a_time_limit_ends_a_slow_step():
    with (
        pytest.raises(harness.TookTooLong, match="compiling took longer"),
        harness.time_limit(0.05, "compiling"),
    ):
        time.sleep(5)


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    weight = torch.randn(4, 3, requires_grad=True)
    x = torch.randn(5, 3)

    def forward():
        y = x @ weight.T  # keeps x; the weight is a parameter
        return torch.exp(y) * torch.exp(y)[:, :4]  # keeps each exp's output once

    assert harness.saved_bytes(forward, [weight]) == x.nbytes + 2 * (5 * 4 * 4)


def test_counting_saved_bytes_leaves_no_graph_behind():
    weight = torch.randn(64, 64, requires_grad=True)
    watched = []

    def forward():
        out = torch.exp(torch.randn(8, 64) @ weight)  # exp keeps its own output
        watched.append(weakref.ref(out))
        return out

    harness.saved_bytes(forward, [weight])
    assert watched[0]() is None


def test_floor_of_a_layer_is_pinned():
    layer = roofline.Layer(32, 64, (8, 16), kernel=3)
    half = roofline.work([layer], 2, "bfloat16", "forward", CEILINGS)
    assert half.flops == 2 * 2 * 128 * 32 * 64 * 9
    assert half.bytes == 2 * (2 * 128 * (32 + 64) + 32 * 64 * 9)
    one = roofline.work([layer], 2, "float32", "forward", CEILINGS)
    assert one.bytes == 172032 and one.flops == 9437184
    assert one.floor_s == pytest.approx(172032 / 1e9)  # bandwidth-bound: 172 µs against 9 µs
    step = roofline.work([layer], 2, "float32", "training", CEILINGS)
    assert step.floor_s == pytest.approx(3 * one.floor_s)
    first = roofline.Layer(32, 64, (8, 16), kernel=3, input_grad=False)
    assert roofline.work([first], 2, "float32", "training", CEILINGS).flops == 2 * one.flops


def test_ceilings_of_another_run_are_taken_on_the_same_machine_only(tmp_path):
    about = {"device": "cuda", "device_name": "Card", "threads": 2, "torch": "2"}
    ceilings = roofline.Ceilings(1e12, {"float32": 5e13, "bfloat16": 7e14}, 3e12, 2e-6, 132, 80)
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"machine": about | machine.as_json(ceilings), "rows": []}))
    found = machine.known_ceilings(str(path), about, ["bfloat16"])
    assert (found.bandwidth, found.l2, found.launch, found.processors) == pytest.approx(
        (1e12, 3e12, 2e-6, 132)
    )
    assert found.matrix == pytest.approx(ceilings.matrix)
    assert found.arch == 80
    assert machine.known_ceilings(str(path), about | {"device_name": "Other"}, ["bfloat16"]) is None
    assert machine.known_ceilings(str(path), about, ["float16"]) is None
    assert machine.known_ceilings(str(tmp_path / "none.json"), about, ["float32"]) is None


def test_strided_and_transposed_layers_have_the_sizes_of_pytorch():
    for layer in (
        roofline.Layer(3, 5, (9, 8), stride=2),
        roofline.Layer(3, 5, (4, 5, 6), kernel=2, stride=2, transposed=True),
        roofline.Layer(4, 2, (5, 5, 5), kernel=1),
    ):
        t = blocks.make(blocks.Block(layer, 2), "cpu", torch.float32)
        y = blocks.convolve(layer, t.x, t.weight)
        assert y.shape == (2, layer.cout, *layer.output) == t.upstream.shape


@pytest.mark.parametrize("index", range(len(networks.NETWORKS)))
def test_layer_tables_are_those_of_the_networks(index):
    full = networks.NETWORKS[index]
    net = full.shrunk(16)
    seen = []

    def note(module, inputs, output):
        seen.append((module.in_channels, module.out_channels, tuple(inputs[0].shape[2:])))

    kinds = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose3d)
    with FakeTensorMode():  # shapes only
        model = net.build().eval()
        for module in model.modules():
            if isinstance(module, kinds):
                module.register_forward_hook(note)
        model(torch.empty(1, net.channels, *net.size), torch.empty(1, 3))
    table = [(layer.cin, layer.cout, layer.size) for layer in net.layers().elements()]
    assert sorted(seen) == sorted(table)
    assert len(full.layers()) == len(net.layers())


def test_the_ranking_counts_a_shared_layer_for_each_network():
    order = peers.ranked(list(networks.NETWORKS))
    shared = [counts for _, _, counts in order if len(counts) > 1]
    assert shared and all(sum(c.values()) >= 2 for c in shared)


def test_a_wrong_provider_prints_failed_instead_of_a_speed_up(tmp_path):
    session = _session(tmp_path / "out.json")
    x = torch.randn(64)
    providers = {
        "eager": Provider(lambda: [x.exp()]),
        "eager-channels-last": Provider(lambda: [x.exp()]),
        "paper": Provider(lambda: [x.exp() * 1.01]),
        "fastfilm-right": Provider(lambda: [x.exp()]),
    }
    case = Case("ops", "exp", "forward", "float32")
    session.measure(case, providers, lambda: [x.double().exp()])
    rows = {r.provider: r for r in session.record.rows}
    assert rows["fastfilm-right"].status == "ok" and rows["fastfilm-right"].ratio > 0
    assert rows["paper"].status == "FAILED" and not session.record.failed  # a peer's own affair
    providers["fastfilm-wrong"] = Provider(lambda: [x.exp() * 1.01])
    session.measure(case, providers, lambda: [x.double().exp()])
    wrong = session.record.rows[-1]
    assert wrong.status == "FAILED" and wrong.ratio is None and session.record.failed
    line = next(s for s in table.table([wrong]).splitlines() if s.startswith("fastfilm-wrong"))
    assert "FAILED" in line and "x " not in line.split("FAILED")[0]


def test_a_wrong_eager_layout_is_neither_baseline_nor_yardstick():
    clock = FakeClock()
    x = torch.randn(64)
    session = _session(clock=clock)
    seconds = {"eager": 2.0, "eager-channels-last": 1.0, "fastfilm-a": 1.0}
    results = {"eager": x, "eager-channels-last": 2 * x, "fastfilm-a": x * (1 + 1e-3)}

    providers = {
        name: Provider(
            lambda name=name: (name, seconds[name]), check=lambda name=name: [results[name]]
        )
        for name in seconds
    }
    session.measure(Case("ops", "c", "forward", "float32"), providers, lambda: [x.double()])
    rows = {r.provider: r for r in session.record.rows}
    assert rows["eager-channels-last"].status == "FAILED" and rows["eager"].ratio == 1.0
    assert rows["eager-channels-last"].ratio is None
    assert rows["fastfilm-a"].status == "FAILED" and rows["fastfilm-a"].eager_error == 0.0


def test_nan_and_a_wrong_shape_never_pass():
    good = torch.ones(3)
    assert math.isnan(record.relative_error([good * math.nan], [good]))
    assert math.isnan(record.relative_error([good[:2]], [good]))
    assert not record.error_passes(math.nan, 1.0, "float32")
    assert record.error_passes(1.5e-3 + 0.0078, 1e-3, "bfloat16")
    assert not record.error_passes(1.6e-3 + 0.0079, 1e-3, "bfloat16")


def test_a_crash_fails_ours_and_skips_a_peer():
    session = _session()

    def crash():
        raise RuntimeError("out of registers\nand more")

    def refuse():
        raise NotImplementedError("groups must be 1")

    providers = {
        "eager": Provider(lambda: [torch.ones(2)]),
        "paper": Provider(crash),
        "fastfilm-a": Provider(crash),
        "fastfilm-b": Provider(refuse),
    }
    session.measure(Case("ops", "c", "forward", "float32"), providers)
    status = {r.provider: (r.status, r.note) for r in session.record.rows}
    assert status["paper"] == ("skipped", "out of registers")
    assert status["fastfilm-a"] == ("FAILED", "out of registers")
    assert status["fastfilm-b"] == ("skipped", "groups must be 1")
    assert session.record.failed


def test_the_file_is_written_after_each_row_and_has_the_documented_keys(tmp_path):
    path = tmp_path / "rows.json"
    session = _session(path)
    counts = []

    def peek():
        counts.append(len(json.loads(path.read_text())["rows"]) if path.exists() else 0)
        return [torch.ones(2)]

    for i in range(2):
        session.measure(Case("ops", f"c{i}", "forward", "float32"), {"eager": Provider(peek)})
    assert counts[0] == 0 and counts[-1] == 1
    data = json.loads(path.read_text())
    assert set(data) == {"machine", "rows"} and len(data["rows"]) == 2
    assert all(set(row) >= FIELDS for row in data["rows"])


def test_json_holds_no_nan(tmp_path):
    row = record.Row("ops", "c", "eager", "forward", "float32", "cpu", error=math.nan)
    assert row.as_json()["error"] is None


def test_no_row_is_started_when_the_budget_is_used_up():
    now = iter([0.0, 5.0, 20.0, 20.0])
    budget = harness.Budget(10.0, lambda: next(now))
    assert not budget.spent() and budget.spent()
    session = _session(seconds=0.0)
    called = []
    session.measure(
        Case("ops", "c", "forward", "float32"), {"eager": Provider(lambda: called.append(1) or [])}
    )
    assert not called
    (row,) = session.record.rows
    assert (row.status, row.provider, row.note) == ("skipped", "all", "no time left")


def test_a_skip_is_told_once_a_suite():
    session = _session()
    for i in range(3):
        session.skip(Case("ops", f"c{i}", "forward", "float32"), "compile", "no compiler")
    assert len(session.record.rows) == 1


@pytest.mark.parametrize("order", ["conv-act-norm-film", "conv-norm-act-film"])
@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_the_plain_block_is_the_reference(norm, order):
    block = blocks.Block(roofline.Layer(3, 8, (5, 6)), 2, norm, "leaky_relu", order)
    t = blocks.make(block, "cpu", torch.float64).to(torch.float64)
    expected = blocks.results(partial(blocks.definition, block), t, "forward+backward")
    for expanded in (False, True):
        plain = partial(blocks.eager, block, expanded=expanded)
        got = blocks.results(plain, t, "forward+backward")
        assert record.relative_error(got, expected) < 1e-12


def _nifti(path, array):
    nibabel = pytest.importorskip("nibabel")
    nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), path)
    return str(path)


@pytest.mark.parametrize("problem", ["missing", "unreadable", "2D", "4D", "constant", "NaN"])
def test_a_bad_volume_is_one_readable_line_and_status_2(tmp_path, capsys, problem):
    path = tmp_path / "v.nii.gz"
    values = np.random.default_rng(0).normal(size=(8, 8, 8))
    if problem == "unreadable":
        path.write_bytes(b"not an image")
    elif problem == "2D":
        _nifti(path, values[0])
    elif problem == "4D":
        _nifti(path, np.stack([values, values], -1))
    elif problem == "constant":
        _nifti(path, np.ones((8, 8, 8)))
    elif problem == "NaN":
        values[0, 0, 0] = np.nan
        _nifti(path, values)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--suite", "model", "--volume", str(path), "--json", str(tmp_path / "o.json")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and "--volume" in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--dtype", "float8"],
        ["--suite", "nothing"],
        ["--minutes", "-1"],
        ["--json", "no/such/folder/o.json"],
        ["--dtype", "tf32", "--device", "cpu"],
    ],
)
def test_a_wrong_argument_is_one_readable_line_and_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1


def test_patches_are_cut_around_the_centre():
    voxels = np.zeros((12, 12, 6), np.float32)
    voxels[4:8, 4:8, 2:4] = 1.0
    batch = volume.slices(voxels, 2, (4, 4))
    assert batch.shape == (2, 1, 4, 4) and batch.std() == 0 and batch.mean() > 0
    assert volume.slices(voxels, 8, (16, 16)).shape == (8, 1, 16, 16)
    assert volume.patches(voxels, 2, (8, 8, 8)).shape == (2, 1, 8, 8, 8)


def test_a_suite_runs_from_the_command_line_to_its_files(tmp_path, monkeypatch, capsys):
    small = blocks.Block(roofline.Layer(2, 4, (8, 8)), 2)
    monkeypatch.setattr("benchmarks.suites.ops.cases", lambda session: [small])
    monkeypatch.setattr("benchmarks.measure.machine.ceilings", lambda *_: CEILINGS)
    out, picture = tmp_path / "o.json", tmp_path / "o.png"
    arguments = ["--suite", "ops", "--quick", "--device", "cpu", "--dtype", "float32"]
    status = cli.main([*arguments, "--json", str(out), "--plot", str(picture)])
    data = json.loads(out.read_text())
    ours = [r for r in data["rows"] if r["provider"].startswith("fastfilm")]
    modes = {"forward", "forward+backward", "inference"}
    assert status == 0 and {r["mode"] for r in data["rows"]} == modes
    assert any(r["status"] == "ok" and r["ratio"] for r in ours)
    assert data["machine"]["torch"] == torch.__version__ and data["machine"]["copy_gbps"] == 1.0
    text = capsys.readouterr().out
    assert "vs eager" in text and "copy" in text
    assert "matplotlib" in text or picture.stat().st_size > 0
    assert "benchmarks" in sys.modules


def test_the_baseline_is_the_layout_that_wins_most_rounds():
    times = {"a": [1.0, 9.0, 9.0, 1.0, 9.0], "b": [1.1, 8.0, 8.0, 1.1, 8.0], "c": []}
    assert harness.best(times, ["a", "b", "c"]) == "b"
    assert harness.best(times, ["c"]) is None


def test_the_networks_agree_with_eager_in_output_and_gradient(tmp_path, monkeypatch):
    pytest.importorskip("nibabel")
    tiny = [
        replace(net, batch=2, size=(16,) * net.dims, widths=(4, 8)) for net in networks.NETWORKS[:2]
    ]
    monkeypatch.setattr("benchmarks.suites.model.networks", lambda session: tiny)
    monkeypatch.setattr("benchmarks.measure.machine.ceilings", lambda *_: CEILINGS)
    out = tmp_path / "o.json"
    arguments = ["--suite", "model", "--quick", "--device", "cpu", "--dtype", "float32"]
    assert cli.main([*arguments, "--json", str(out), "--plot", str(tmp_path / "o.png")]) == 0
    rows = json.loads(out.read_text())["rows"]
    ours = [r for r in rows if r["provider"].startswith("fastfilm") and r["status"] == "ok"]
    assert len(ours) >= 4 and all(r["max_abs_diff"] < 1e-3 for r in ours)
    assert all(r["grad_error"] < 0.05 for r in ours if r["mode"] == "training")
