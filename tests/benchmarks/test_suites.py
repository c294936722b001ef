"""Single suites and pages of the benchmarks: counts that may not grow, layers, growth, folded weights, gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.campaign import gaps, targets
from benchmarks.counted.roofline import Ceilings, Layer
from benchmarks.measure.harness import QUICK, Budget, HostClock
from benchmarks.measure.record import Record
from benchmarks.measure.session import Session
from benchmarks.subjects import layers
from benchmarks.subjects.blocks import Block
from benchmarks.suites import gate, scaling, tails

ROOT = Path(__file__).resolve().parents[2]


def test_growth_exponent_is_the_slope_of_logarithms() -> None:
    assert scaling.slope([(10, 2.0), (100, 20.0), (1000, 200.0)]) == pytest.approx(1.0)
    assert scaling.slope([(10, 1.0), (100, 100.0)]) == pytest.approx(2.0)
    assert scaling.slope([(10, 1.0), (10, 2.0)]) is None


def test_a_layer_is_the_block_that_it_stands_for_and_stages_can_be_left_out() -> None:
    block = Block(Layer(3, 4, (6, 5)), 2, "batch", "relu")
    whole = layers.LayerStep(block, "cpu", "float32", "training")
    # raw map and what is pending on it; gradients of x, four weights and biases, γ, β, x's coefficients
    assert len(whole()) == 2 + 8
    counts = {s: sum(t is not None for t in layers.LayerStep(block, "cpu", "float32", "training", without=(s,))())
              for s in layers.STAGES}  # fmt: skip
    assert counts == {"prologue": 9, "moments": 8, "film": 8}
    with pytest.raises(ValueError, match="without must be of"):
        layers.LayerStep(block, "cpu", "float32", "training", without=("pooling",))


def session_of(**options: Any) -> Session:
    usual = {"quick": True, "effort": QUICK, "budget": Budget(None), "clock": HostClock()}
    ceilings = Ceilings(1.0, {"float32": 1.0})
    usual |= {"record": Record({}), "ceilings": ceilings, "verbose": False}
    return Session("cpu", ["float32"], **(usual | options))


@pytest.mark.parametrize(
    ("value", "allowed", "status"),
    [
        (10.0, 0.0, "ok"),
        (10.1, 0.0, "FAILED"),
        (10.9, 0.1, "ok"),
        (11.1, 0.1, "FAILED"),
        (9.0, 0.0, "ok"),
    ],
)
def test_a_count_that_has_grown_fails_the_gate(value: float, allowed: float, status: str) -> None:
    session = session_of()
    session.record.add(gate.judged(session, gate.Figure("maps moved", value, allowed), 10.0))
    assert session.record.rows[0].status == status
    assert session.record.failed == (status == "FAILED")
    assert ("better" in session.record.rows[0].note) == (value < 10)


def test_new_figures_pass_the_gate_and_are_written_down_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BASELINE", tmp_path / "gate.json")
    (tmp_path / "gate.json").write_text('{"figures": {"other": 3.0, "grown": 1.0}}')
    found = [gate.Figure("new", 2.0), gate.Figure("grown", 5.0)]
    monkeypatch.setattr(gate, "figures", lambda static: iter(found))
    session = session_of()
    gate.run(session)
    assert [r.status for r in session.record.rows] == ["ok", "FAILED"]
    gate.run(session_of(update_gate=True))
    known = json.loads((tmp_path / "gate.json").read_text())["figures"]
    assert known == {"other": 3.0, "grown": 5.0, "new": 2.0}


def test_function_calls_are_counted_without_those_of_the_first_call() -> None:
    done = []

    def inner() -> None:
        pass

    def outer() -> None:
        if not done:
            done.append(1)
            inner()
        inner()

    assert gate.calls_of(outer) == 2


def test_the_committed_counts_cover_every_plan_and_allow_no_spill() -> None:
    known = json.loads(gate.BASELINE.read_text(encoding="utf-8"))["figures"]
    for name, route in gate.PLANS:
        said = name if route is None else f"{name}/{route}"
        assert f"{said}: maps moved a convolution, forward" in known
        assert f"{said}: bytes kept" in known
    stacks = {k: v for k, v in known.items() if k.startswith("stack bytes")}
    assert len(stacks) > 40 and not any(stacks.values())


def test_norm_and_film_fold_into_the_weights_of_one_convolution() -> None:
    layer = Layer(3, 5, (6, 7))
    inputs = tails.make(layer.size, "cpu", torch.float64, layer)
    kernel, bias = tails.folded(inputs)
    one = torch.relu(torch.nn.functional.conv2d(inputs["y"], kernel, bias, padding=1))
    torch.testing.assert_close(one, tails.eager_block(layer, inputs))
    torch.testing.assert_close(tails.our_block(layer, inputs), tails.eager_block(layer, inputs))


def test_gaps_list_what_falls_short_of_a_measurement_on_a_gpu() -> None:
    committed = (ROOT / "benchmarks" / "results" / "GAPS.md").read_text(encoding="utf-8")
    file = ROOT / "benchmarks" / "results" / "gpu-h200.json"
    assert committed == gaps.text(json.loads(file.read_text(encoding="utf-8")))
    none = gaps.text(None)
    assert "no target has been measured" in none
    usual = {"step": "model", "suite": "model", "case": targets.FLAT, "mode": "training"}
    usual |= {"dtype": "bfloat16", "status": "ok", "note": ""}
    rows = [{**usual, "provider": "eager-channels-last", "median_s": 6.0}]
    rows += [{**usual, "provider": "fastfilm", "median_s": 1.0, "fraction_of_floor": 0.5}]
    machine = {"copy_gbps": 4000.0, "l2_gbps": 6000.0, "launch_us": 3.0, "processors": 132}
    found = {"about": {"device": "cuda"}, "machine": machine, "rows": rows}
    machine |= {"matrix_tflops": {"bfloat16": 700.0}}  # type: ignore[dict-item]
    text = gaps.text(found)
    reached = "FiLMedUNet 2D, training step against eager AMP channels-last"
    assert reached not in text and "no target has been measured" not in text
    assert "FiLMedUNet 2D, training step, of the roofline floor | ≥ 60 % | 50 % |" in text
    assert gaps.text(found | {"about": {"device": "cpu"}}) == none  # no measurement
    graph = [{**usual, "provider": "fastfilm-graph", "median_s": 0.5}]
    text = gaps.text(found | {"rows": [*rows, *graph]})
    assert "| the host: 1e+03 ms, 500 ms from a CUDA graph | less Python" in text
    # what would move a network that multiplies: first the measurement, then what it said
    assert gaps.UNMEASURED in text
    layer = {"suite": "routes", "dtype": "bfloat16", "status": "ok", "mode": "forward"}
    for seconds, said in ((0.5, "in 2 of 2: `fastfilm tune`"), (4.0, "in 1 of 2; B, forward is")):
        measured = [
            {**layer, "case": case, "provider": provider, "median_s": s}
            for case, new in (("A", 1.0), ("B", seconds))
            for provider, s in ((targets.NEW, new), (targets.VENDOR, 2.0))
        ]
        text = gaps.text(found | {"rows": [*rows, *measured]})
        assert said in text and gaps.UNMEASURED not in text
