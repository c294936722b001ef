"""The campaign: its order, its bounds, what survives a kill, and what its report says."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if "benchmarks" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "_run_for_campaign", ROOT / "benchmarks" / "run.py"
    )
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

from benchmarks import cli, layers  # noqa: E402
from benchmarks.blocks import Block  # noqa: E402
from benchmarks.campaign import (  # noqa: E402
    gaps,
    plots,
    report,
    results,
    runner,
    steps,
    targets,
)
from benchmarks.campaign.steps import Step  # noqa: E402
from benchmarks.harness import QUICK, Budget, HostClock  # noqa: E402
from benchmarks.record import Record  # noqa: E402
from benchmarks.roofline import Ceilings, Layer  # noqa: E402
from benchmarks.session import Session  # noqa: E402
from benchmarks.suites import frozen, gate, profile, scaling  # noqa: E402


def script(name: str, code: str, seconds: float = 30.0, **options: Any) -> Step:
    return Step(name, "a test", (sys.executable, "-c", code), seconds, least=1.0, **options)


def writing(name: str, row: str = "", then: str = "", **options: Any) -> Step:
    code = f"import json; rows = {{'machine': {{'device_name': 'Card'}}, 'rows': [{row}]}};"
    code += (
        f" file = open(r'{{out}}/steps/{name}.json', 'w'); json.dump(rows, file); file.close()"
        + then
    )
    return script(name, code, rows=True, **options)


def state(out: Path) -> dict[str, str]:
    return {
        n: d["status"] for n, d in json.loads((out / "campaign.json").read_text())["steps"].items()
    }


def run(out: Path, wanted: list[Step], seconds: float = 60.0, again: tuple[str, ...] = ()) -> int:
    return runner.main(out, "cpu", seconds, again, wanted)


def test_steps_run_in_their_order_and_a_failure_is_reported(tmp_path: Path) -> None:
    wanted = [
        script("a", "print('fine')"),
        script("b", "raise SystemExit('no luck')"),
        script("c", ""),
    ]
    assert run(tmp_path, wanted) == 1
    assert state(tmp_path) == {"a": "ok", "b": "FAILED", "c": "ok"}
    assert "fine" in (tmp_path / "logs" / "a.log").read_text()
    assert "no luck" in (tmp_path / "report.md").read_text()


def test_a_step_without_what_it_needs_is_not_started(tmp_path: Path) -> None:
    wanted = [
        script("build", "raise SystemExit(3)"),
        script("x", "", after=("build",)),
        script("y", ""),
    ]
    # a build that fails is tried once more, apart; that is no step of this test
    code = runner.main(
        tmp_path, "cpu", 60.0, (), [script("first", "raise SystemExit(3)"), *wanted[2:]]
    )
    assert code == 1 and state(tmp_path) == {"first": "FAILED", "y": "ok"}
    x = script("x", "", after=("first",))
    run(tmp_path, [x])
    assert state(tmp_path)["x"] == "skipped"


@pytest.mark.parametrize("builds", [True, False])
def test_where_pip_cannot_install_the_package_is_put_into_the_campaigns_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: bool
) -> None:
    def run_(self: runner.Campaign, step: Step, seconds: float) -> runner.Done:
        if builds and "setup.py" in step.command:
            (self.out / "site" / "fastfilm" / "kernels").mkdir(parents=True)
            return runner.Done("ok", 1.0, 0, "", 1)
        return runner.Done("FAILED", 1.0, 1, "no pip", 1)

    with monkeypatch.context() as patched:
        patched.setattr(runner.Campaign, "run", run_)
        run(tmp_path, [script("build", "")])
    assert state(tmp_path) == {"build": "ok"}
    if builds:
        return
    code = "import fastfilm.kernels, pathlib; print(pathlib.Path(fastfilm.kernels.__file__).parts)"
    assert run(tmp_path, [script("after", code)]) == 0
    assert "'site', 'fastfilm', 'kernels'" in (tmp_path / "logs" / "after.log").read_text()


def test_a_step_past_its_bound_is_ended_with_all_it_started_and_its_rows_count(
    tmp_path: Path,
) -> None:
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c',"
    child += " 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"
    row = "{'suite': 's', 'status': 'ok', 'case': 'kept'}"
    begun = time.monotonic()
    run(tmp_path, [writing("slow", row, "\n" + child, seconds=3.0), script("next", "")])
    assert time.monotonic() - begun < 25
    assert state(tmp_path) == {"slow": "cut", "next": "ok"}
    pid = int((tmp_path / "logs" / "slow.log").read_text().split()[-1])
    time.sleep(0.2)
    assert not alive(pid)
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["case"] == "kept"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # one that has ended and whom nobody has waited for counts as ended
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[-1][0] != "Z"


def test_steps_that_do_not_fit_are_left_for_the_next_run(tmp_path: Path) -> None:
    first = [script("a", ""), Step("b", "", (sys.executable, "-c", ""), 30, least=1e6)]
    run(tmp_path, first)
    assert state(tmp_path) == {"a": "ok", "b": "skipped"}
    later = [script("a", "raise SystemExit('run twice')"), script("b", "")]
    assert run(tmp_path, later) == 0
    assert state(tmp_path) == {"a": "ok", "b": "ok"}


def test_what_was_cut_comes_last_and_again_comes_first(tmp_path: Path) -> None:
    campaign = runner.Campaign(tmp_path, "cpu")
    for name, status in (("a", "ok"), ("b", "cut"), ("c", "FAILED"), ("d", "skipped")):
        campaign.done[name] = runner.Done(status)
    wanted = [script(n, "") for n in "abcde"]
    assert [s.name for s in campaign.order(wanted, [])] == ["d", "e", "b"]
    assert [s.name for s in campaign.order(wanted, ["c"])] == ["c", "d", "e", "b"]


def test_a_killed_campaign_goes_on_where_it_was(tmp_path: Path) -> None:
    child = tmp_path / "kill.py"
    child.write_text(
        f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("_r", {str(ROOT / "benchmarks" / "run.py")!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
from benchmarks.campaign import runner
from benchmarks.campaign.steps import Step
def s(name, code):
    return Step(name, "", (sys.executable, "-c", code), 60, least=1)
sleeps = "import os, time; print(os.getpid()); time.sleep(60)"
runner.main(Path({str(tmp_path / "out")!r}), "cpu", 120, (), [s("a", ""), s("b", sleeps)])
"""
    )
    process = subprocess.Popen([sys.executable, str(child)], stdout=subprocess.PIPE, text=True)
    path = tmp_path / "out" / "logs" / "b.log"
    for _ in range(300):
        if path.exists() and path.read_text().count("\n") > 1:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state(tmp_path / "out") == {"a": "ok"}
    assert (tmp_path / "out" / "results.json").exists() and (
        tmp_path / "out" / "report.md"
    ).exists()
    # what is killed cannot end its step
    os.kill(int(path.read_text().split()[-1]), signal.SIGKILL)
    run(tmp_path / "out", [script("a", "raise SystemExit(1)"), script("b", "")])
    assert state(tmp_path / "out") == {"a": "ok", "b": "ok"}


def test_a_folder_of_another_device_or_an_unknown_step_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [script("a", "")])
    assert runner.main(tmp_path, "cuda", 60.0) == 2
    assert "holds a campaign on cpu" in capsys.readouterr().err
    assert run(tmp_path, [script("a", "")], again=("z",)) == 2
    assert "no step z" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["--suite", "campaign", "--device", "cpu"])
    assert "needs --out DIR" in capsys.readouterr().err


def test_no_step_changes_the_cards_clocks_or_settings() -> None:
    sources = [Path(m.__file__ or "") for m in (steps, runner, results, report, profile)]
    text = "\n".join(path.read_text() for path in sources)
    text += "\n".join(" ".join(s.command) for s in steps.steps("cuda"))
    for flag in (
        "-pm",
        "-pl",
        "-lgc",
        "-rgc",
        "-ac",
        "-mig",
        "--lock",
        "--gpu-reset",
        "--persistence",
    ):
        assert f"{flag} " not in text and f'"{flag}"' not in text
    assert '"--clock-control", "none"' in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_have_names_of_their_own_and_need_only_earlier_ones(device: str) -> None:
    seen: list[str] = []
    for step in steps.steps(device):
        assert step.name not in seen
        assert set(step.after) <= set(seen)
        assert step.seconds >= step.least
        arguments = step.arguments(Path("/x"), 60.0)
        assert not any("{" in a for a in arguments)
        seen.append(step.name)


def test_the_essential_tests_exist() -> None:
    for node in steps.ESSENTIAL_TESTS:
        path, _, name = node.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_test_outcomes_are_read_from_a_log_that_breaks_off(tmp_path: Path) -> None:
    log = tmp_path / "t.log"
    log.write_text(
        "$ python -m pytest\n"
        "tests/test_kernels.py::test_a[gpu-2d, x] PASSED [ 10%]\n"
        "tests/test_kernels.py::test_b FAILED [ 20%]\n"
        "tests/test_kernels.py::test_c SKIPPED (why) [ 30%]\n"
        "[gw3] [ 40%] PASSED tests/test_kernels.py::test_e[a b] \n"
        "tests/test_kernels.py::test_d "
    )
    wrong = ["tests/test_kernels.py::test_b"]
    assert results.outcomes(log) == {"passed": 2, "failed": 1, "skipped": 1, "wrong": wrong}
    assert results.outcomes(tmp_path / "none.log") == {}


def row(provider: str, seconds: float, **values: Any) -> dict[str, Any]:
    usual = {
        "step": "model", "suite": "model", "case": targets.FLAT, "mode": "training", "dtype": "bfloat16",
        "status": "ok", "provider": provider, "median_s": seconds, "note": "", "ratio": None,
    }  # fmt: skip
    return usual | values


def verdict(rows: list[dict[str, Any]], figure: str) -> targets.Verdict:
    (found,) = [v for v in targets.verdicts(rows) if v.target.figure == figure]
    return found


AGAINST_EAGER = "FiLMedUNet 2D, training step against eager AMP channels-last"


def test_a_speed_up_compares_rows_that_took_turns() -> None:
    rows = [
        row("eager-channels-last", 6.0),
        row("fastfilm", 1.5),
        row("fastfilm", 1.0, step="other"),
    ]
    found = verdict(rows, AGAINST_EAGER)
    assert (found.value, found.word) == (4.0, "reached")
    rows[1]["median_s"] = 3.0
    assert verdict(rows, AGAINST_EAGER).word == "short"
    rows[1]["status"] = "FAILED"  # a wrong result has no speed
    assert verdict(rows, AGAINST_EAGER).word == "not measured"


def test_memory_is_reached_below_its_bound() -> None:
    figure = "peak memory of the training step, 2D, to eager-channels-last"
    rows = [row("eager-channels-last", 1.0, peak_bytes=100), row("fastfilm", 1.0, peak_bytes=39)]
    assert verdict(rows, figure).word == "reached"
    rows[1]["peak_bytes"] = 41
    assert verdict(rows, figure).word == "short"


def test_the_papers_form_is_taken_in_float32() -> None:
    figure = "FiLMedUNet 2D, training step, against the paper's form"
    rows = [row("paper", 3.0), row("paper", 12.0, dtype="float32", step="f"), row("fastfilm", 1.0)]
    assert verdict(rows, figure).value == 12.0


def test_the_limiter_is_the_largest_term_of_the_network() -> None:
    terms = [{"dram": 1.0, "l2": 3.0}, {"dram": 2.0, "l2": 4.0}]
    rows = [row("fastfilm", 1.0, suite="explain", network=targets.FLAT, terms_s=t) for t in terms]
    assert targets.limiter(rows, targets.FLAT, "training") == "l2 (70 % of the estimate)"
    assert targets.limiter(rows, targets.FLAT, "inference") == ""


def test_every_case_where_a_peer_was_faster_is_listed() -> None:
    rows = [
        row("eager", 2.0),
        row("compile", 0.5),
        row("fastfilm", 1.0),
        row("fastfilm-triton", 0.4),
    ]
    rows += [row("eager", 2.0, mode="inference"), row("fastfilm", 1.0, mode="inference")]
    ((case, peer, ratio),) = targets.slower(rows)
    assert "training" in case and peer == "compile" and ratio == 0.5


def test_targets_cover_every_figure_and_none_counts_without_a_measurement() -> None:
    found = targets.verdicts([])
    assert len(found) == 17 and {v.word for v in found} == {"not measured"}


def page(rows: list[dict[str, Any]], device: str) -> str:
    about = {"about": {"device": device}, "machine": {"device_name": "Card"}, "rows": rows}
    steps_ = {"model": {"status": "ok", "seconds": 3.0, "note": ""}}
    entry = {"plan": "triton/fused", "tiles": {"fprop": [8, 8]}, "seconds": {"triton/fused": 2e-3}}
    tuned = {"sm_90": {"entries": {"bucket": entry}}}
    tests = {"tests": {"passed": 3}}
    return report.text({**about, "steps": steps_, "tests": tests, "tuned": tuned}, {})


def test_the_report_of_a_dry_run_claims_no_speed() -> None:
    text = page([row("eager-channels-last", 6.0), row("fastfilm", 1.0)], "cpu")
    assert "no speed on a GPU is claimed" in text
    assert "no speed" not in page([], "cuda")


def test_the_report_shows_layers_counters_growth_and_tests() -> None:
    rows = [
        row("fastfilm", 1e-3, suite="explain", network="N", layer="L", count=2, floor_s=5e-4, estimate_s=8e-4,
            limiter="l2", terms_s={"dram": 1.0}),
        row("fastfilm", 1e-3, suite="profile", layer="L", note="without film", difference_s=2e-4),
        row("ncu", 1e-4, suite="profile", layer="L", note="fprop_kernel", dram_bytes=2**21, registers=168.0),
        *(row("fastfilm", s, suite="scaling", dims=2, axis="size", voxels=v) for v, s in ((10, 1.0), (100, 10.0))),
    ]  # fmt: skip
    text = page(rows, "cuda")
    for said in (
        "| L | 2 | 0.5 | 0.8 | 1 | l2 |",
        "without film",
        "fprop_kernel | 0.1 | 2 |",
        "168",
        "3 passed",
    ):
        assert said in text
    assert "10 to 100 | 1 |" in text


def test_growth_exponent_is_the_slope_of_logarithms() -> None:
    assert scaling.slope([(10, 2.0), (100, 20.0), (1000, 200.0)]) == pytest.approx(1.0)
    assert scaling.slope([(10, 1.0), (100, 100.0)]) == pytest.approx(2.0)
    assert scaling.slope([(10, 1.0), (10, 2.0)]) is None


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","launch__registers_per_thread","other"
"","","us","Mbyte","register/thread","x"
"0","fprop_kernel","1,234.5","2.5","168","9"
"1","coef_grad_kernel","3","n/a","32","9"
"""


def test_counters_are_read_in_si_units() -> None:
    first, second = profile.read_csv(NCU)
    assert first[0] == "fprop_kernel"
    assert first[1] == pytest.approx({"time": 1.2345e-3, "dram_bytes": 2.5e6, "registers": 168.0})
    assert "dram_bytes" not in second[1]
    assert profile.read_csv("==ERROR== no permission\n") == []


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


def test_every_picture_is_drawn_from_rows_and_none_from_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = []
    for step, peer, seconds in (("model", "paper", 3e-3), ("compile", "compile", 1.5e-3)):
        for provider, time_ in (("eager-channels-last", 2e-3), (peer, seconds), ("fastfilm", 1e-3)):
            rows.append(row(provider, time_, step=step, peak_bytes=1 << 20))
    for i, seconds in enumerate((1e-3, 2e-3)):
        extra = {
            "floor_s": 5e-4,
            "estimate_s": 8e-4,
            "tflops": 300.0,
            "flops_per_byte": 10.0 ** (i + 1),
        }
        rows.append(
            row("fastfilm", seconds, suite="explain", network="N", layer=f"L{i} @ 4", **extra)
        )
        growth = {"dims": 2, "axis": "size", "voxels": 64 * 4**i, "batch": 1}
        rows.append(row("fastfilm", seconds, suite="scaling", **growth))
    machine = {"device_name": "Card", "matrix_tflops": {"bfloat16": 700.0}, "copy_gbps": 4000.0}
    found = {"about": {"device": "cuda"}, "machine": machine, "rows": rows}
    drawn = plots.draw(found, tmp_path / "plots")
    assert [Path(p).stem for p in drawn] == ["speedup", "memory", "roofline", "layers", "growth"]
    assert all((tmp_path / p).stat().st_size > 10_000 for p in drawn)
    assert plots.draw(found | {"rows": []}, tmp_path / "none") == {}


def test_rows_of_another_step_are_scaled_by_their_own_reference() -> None:
    rows = [row("eager-channels-last", 2.0), row("fastfilm", 1.0)]
    rows += [row("eager-channels-last", 4.0, step="later"), row("compile", 2.0, step="later")]
    group = (targets.FLAT, "training", "bfloat16")
    found = plots._same_step(rows, group, rows[0])
    assert found["compile"]["median_s"] == 1.0 and found["fastfilm"]["median_s"] == 1.0


def test_the_committed_gaps_are_those_of_no_measurement_at_all() -> None:
    committed = (ROOT / "benchmarks" / "results" / "GAPS.md").read_text(encoding="utf-8")
    assert committed == gaps.text(None)
    assert "no target has been measured" in committed


def test_gaps_of_a_campaign_list_what_falls_short_and_not_what_is_reached() -> None:
    rows = [
        row("eager-channels-last", 6.0),
        row("fastfilm", 1.0, fraction_of_floor=0.5, tflops=1.0),
    ]
    machine: dict[str, Any] = {
        "copy_gbps": 4000.0,
        "l2_gbps": 6000.0,
        "launch_us": 3.0,
        "processors": 132,
    }
    machine |= {"matrix_tflops": {"bfloat16": 700.0}}
    results_ = {"about": {"device": "cuda"}, "machine": machine, "rows": rows}
    text = gaps.text(results_)
    assert AGAINST_EAGER not in text and "no target has been measured" not in text
    assert "FiLMedUNet 2D, training step, of the roofline floor | ≥ 60 % | 50 % |" in text
    # a dry run is no measurement
    assert gaps.text(results_ | {"about": {"device": "cpu"}}) == gaps.text(None)


def test_norm_and_film_fold_into_the_weights_of_one_convolution() -> None:
    layer = Layer(3, 5, (6, 7))
    inputs = frozen.make(layer, "cpu", torch.float64)
    weight, bias = frozen.folded(inputs)
    one = torch.relu(torch.nn.functional.conv2d(inputs.x, weight, bias, padding=1))
    torch.testing.assert_close(one, frozen.eager(layer, inputs))
    torch.testing.assert_close(frozen.ours(layer, inputs), frozen.eager(layer, inputs))
