"""The campaign: its order, its bounds, what survives a kill and a fault, and what its report says."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.campaign import bundle, plots, prepare, report, results, runner, steps, targets
from benchmarks.campaign.steps import Step
from benchmarks.subjects import networks
from benchmarks.suites import profile
from fastfilm.ops.settings import left_out

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, code: str, seconds: float = 30.0, **options: Any) -> Step:
    """A step that runs Python code, given as a file: arguments are split at spaces."""
    options = {"after": (), **options}
    file = Path(os.environ["CODE"]) / f"{name}.py"
    file.write_text(code)
    return Step(name, "a test", f"{{python}} {file} {{work}}", seconds, least=1.0, **options)


@pytest.fixture(autouse=True)
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    monkeypatch.setenv("CODE", str(tmp_path / "code"))


ROW = {
    "step": "model", "suite": "model", "case": targets.FLAT, "mode": "training", "dtype": "bfloat16",
    "status": "ok", "provider": "fastfilm", "median_s": 1.0, "note": "", "ratio": None,
}  # fmt: skip


def row(provider: str, seconds: float, **values: Any) -> dict[str, Any]:
    return {**ROW, "provider": provider, "median_s": seconds, **values}


def writing(name: str, text: str, then: str = "", **options: Any) -> Step:
    code = f"import sys\nopen(sys.argv[1] + '/steps/{name}.json', 'w').write({text!r})\n{then}"
    return script(name, code, rows=True, **options)


def rows_of(*rows: dict[str, Any]) -> str:
    return json.dumps({"machine": {"device_name": "Card"}, "rows": rows})


def run(out: Path, wanted: list[Step], seconds: float = 90.0, **options: Any) -> int:
    return runner.run(out, "cpu", seconds, wanted, **options)


def found(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "results.json").read_text())
    return value


def state(out: Path) -> dict[str, str]:
    return {name: step["status"] for name, step in found(out)["steps"].items()}


def test_steps_run_in_their_order_and_a_failure_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [script("a", "print('fine')"), script("b", "raise SystemExit('no luck')")]
    wanted += [script("c", "", after=("a",)), script("d", "", after=("b",))]
    assert run(tmp_path / "out", wanted) == 1
    assert state(tmp_path / "out") == {"a": "ok", "b": "FAILED", "c": "ok", "d": "skipped"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "no luck" in text and "b did not succeed" in text
    assert capsys.readouterr().out.endswith(f"\n{text}\n")  # what is printed last
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_step_past_its_bound_is_ended_with_all_it_started_and_its_rows_count(
    tmp_path: Path,
) -> None:
    pids = tmp_path / "pids"
    child = f"""
import os, subprocess, time
other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(90)'])
open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{other.pid}}')
time.sleep(90)
"""
    slow = writing("slow", rows_of(row("kept", 1.0)), child, seconds=6.0)
    run(tmp_path / "out", [slow, script("next", "")])
    assert state(tmp_path / "out") == {"slow": "cut", "next": "ok"}
    assert found(tmp_path / "out")["rows"][0]["provider"] == "kept"
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


def test_steps_that_time_nothing_run_beside_each_other(tmp_path: Path) -> None:
    there = """
import pathlib, time
pathlib.Path(sys.argv[1], sys.argv[0][-4]).touch()
while not pathlib.Path(sys.argv[1], {other!r}).exists():
    time.sleep(0.01)
"""
    pair = [script(n, "import sys\n" + there.format(other=o), beside=True) for n, o in ("ab", "ba")]
    wanted = [*pair, script("c", "", after=("a",), beside=True)]
    assert [[s.name for s in g] for g in runner.together(wanted)] == [["a", "b"], ["c"]]
    assert run(tmp_path / "out", wanted) == 0  # each of the two waits for the other
    assert state(tmp_path / "out") == {"a": "ok", "b": "ok", "c": "ok"}


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[-1][0] != "Z"
    except OSError:
        return False


KILLED = """
import sys
from pathlib import Path
from benchmarks.campaign import runner
from benchmarks.campaign.steps import Step
wanted = [Step(n, "", "{python} -c pass", 60, least=1, after=()) for n in "abcdefgh"]
begun = Path(sys.argv[2]) if len(sys.argv) > 2 else None
raise SystemExit(runner.run(Path(sys.argv[1]), "cpu", 120, wanted, begun))
"""


def test_a_campaign_killed_at_any_moment_leaves_a_bundle_to_go_on_from(tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "killed.py"
    file.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for seed in range(3):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([sys.executable, str(file), str(out)], env=environment)
        while not (out / bundle.NAME).exists():
            time.sleep(0.005)
        time.sleep(random.Random(seed).random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
        bundle.unpack(out / bundle.NAME, tmp_path / f"work{seed}")
        assert found(out)["steps"]["a"]["status"] == "ok" and (out / "report.md").exists()
        again = [sys.executable, str(file), str(out), str(out / bundle.NAME)]
        assert subprocess.run(again, env=environment, capture_output=True).returncode == 0
        assert state(out) == dict.fromkeys("abcdefgh", "ok")
        assert len(found(out)["about"]["runs"]) == 2


def test_what_is_done_again_where_a_campaign_goes_on(tmp_path: Path) -> None:
    campaign = runner.Campaign(tmp_path, tmp_path, "cpu", {})
    wanted = [script(n, "") for n in "abcde"] + [script("s", "", setup=True)]
    wanted += [script("t", "", setup=True, serves=("a", "b"))]
    wanted += [script("old", "", checks=True), script("new", "", checks=True)]
    for name, status in (("a", "ok"), ("b", "cut"), ("c", "FAILED"), ("d", "skipped"), ("s", "ok")):
        campaign.done[name] = runner.Done(status)
    campaign.done["old"] = runner.Done("ok", sources="other sources")
    campaign.done["new"] = runner.Done("ok", sources=campaign.sources)
    # what makes the rest; what never ran or holds no longer; what was cut short
    assert [s.name for s in campaign.order(wanted, [])] == ["s", "t", "d", "e", "old", "b"]
    assert [s.name for s in campaign.order(wanted, ["c", "a"])] == ["s", "t", "a", "c"]
    # only what serves one of them
    assert [s.name for s in campaign.order(wanted, ["c"])] == ["s", "c"]
    assert [s.name for s in campaign.order(wanted, ["t"])] == ["s", "t"]


def test_what_cannot_be_begun_is_refused_in_one_line(tmp_path: Path) -> None:
    wanted = [script("a", "")]
    run(tmp_path / "out", wanted)
    begun = tmp_path / "out" / bundle.NAME
    with pytest.raises(ValueError, match="is of a campaign on cpu"):
        runner.run(tmp_path / "other", "cuda", 60.0, wanted, begun)
    with pytest.raises(ValueError, match="no step z; there are a"):
        run(tmp_path / "out", wanted, only=["z"])
    begun.write_bytes(begun.read_bytes()[: begun.stat().st_size // 2])
    with pytest.raises(ValueError, match="is no bundle of a campaign"):
        run(tmp_path / "out", wanted, begun_from=begun)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has no machine"),
        ('{"machine": {}}', "has no rows"),
        (rows_of({"suite": "model"}), "a row lacks one of suite, case"),
        (rows_of(row("x", 1.0, tflops="many")), "has text where a number belongs"),
    ],
)
def test_a_step_that_writes_garbage_costs_its_own_rows(
    tmp_path: Path, text: str, said: str
) -> None:
    wanted = [writing("good", rows_of(row("kept", 1.0))), writing("bad", text)]
    assert run(tmp_path / "out", wanted) == 1
    assert state(tmp_path / "out") == {"good": "ok", "bad": "FAILED"}
    assert [r["provider"] for r in found(tmp_path / "out")["rows"]] == ["kept"]
    assert said in (tmp_path / "out" / "report.md").read_text()


PLANTED = {
    "kernels/conv_dgrad.py": ("def dgrad(", "while True:\n        pass"),
    "kernels/conv_wgrad.py": ("def wgrad(", "import os\n    os._exit(3)"),
    "kernels/spatial_moments.py": ("def moments(", "return 1.01 * _right(y, pre, act)"),
}
"""File -> the launcher that is faulty in the copy, and the first thing that it does there."""


def planted(folder: Path) -> Path:
    """A copy of the checkout in which kernels never end, end the process or are wrong, and one cannot be built."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "build", "results", "*.egg-info")
    for name in ("benchmarks", "fastfilm", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name, (launcher, fault) in PLANTED.items():
        source = (folder / name).read_text()
        head, body = source.split(f"\n{launcher}", 1)
        if "_right" in fault:
            head += f"\n{launcher.replace('moments', '_right')}{body}"
            body = f"y, pre, act):\n    {fault}\n"
        else:
            signature, rest = body.split('"""', 1)[0], body.split('"""', 2)[2]
            body = f'{signature}"""Faulty."""\n    {fault}\n{rest}'
        (folder / name).write_text(f"{head}\n\n{launcher}{body}")
    with (folder / "csrc/cuda/fprop.cu").open("a") as file:
        file.write("#error it is planted\n")
    return folder


def test_planted_faults_cost_their_own_rows_only_and_are_named(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the package triton is not installed")
    copy, out = planted(tmp_path / "copy"), tmp_path / "out"
    code = f"""
import sys
from dataclasses import replace
from pathlib import Path
from benchmarks.campaign import runner, steps
names = ("package", "kernels", "smoke", "routes")
wanted = {{s.name: s for s in steps.steps("cpu") if s.name in names}}
smoke = wanted["smoke"].command.replace("--seconds 60", "--seconds 30").replace("bfloat16", "float32")
smoke += " --only triton:dgrad,triton:wgrad,triton:moments,triton:pointwise,cuda:fprop"
wanted["smoke"] = replace(wanted["smoke"], command=smoke)
routes = wanted["routes"].command.replace("float16", "float32") + " --minutes 8"
wanted["routes"] = replace(wanted["routes"], seconds=500, command=routes)
raise SystemExit(runner.run(Path({str(out)!r}), "cpu", 900, list(wanted.values())))
"""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    checks = {c["check"]: c["status"] for c in found(out)["checks"]}
    assert checks == {
        "triton:dgrad:float32": "HUNG", "triton:wgrad:float32": "DIED", "triton:moments:float32": "WRONG",
        "triton:pointwise:float32": "right", "cuda:fprop:float32": "skipped",
    }  # fmt: skip
    assert state(out)["kernels"] == "FAILED" and "it is planted" in done.stdout
    text = (out / "report.md").read_text()
    for said in ("kernels FAILED", "triton:dgrad:float32 HUNG", "triton:wgrad:float32 DIED"):
        assert said in text.split("## ")[0]
    routes = [r for r in found(out)["rows"] if r["suite"] == "routes"]
    of = {(r["provider"], r["mode"]): r for r in routes if r["provider"].startswith("fastfilm-")}
    assert of["fastfilm-triton/fused", "input gradient"]["status"] == "skipped"
    assert "left out" in of["fastfilm-triton/fused", "input gradient"]["note"]
    assert any(r["status"] == "ok" for r in routes if r["provider"] == "vendor")


def test_no_step_changes_the_cards_clocks_or_settings() -> None:
    text = "\n".join(Path(m.__file__ or "").read_text() for m in (steps, runner, profile))
    text += "\n".join(s.command for s in steps.steps("cuda"))
    flags = ("-pm", "-pl", "-lgc", "-rgc", "-ac", "-mig", "--lock", "--gpu-reset", "--persistence")
    for flag in flags:
        assert f"{flag} " not in text and f'"{flag}"' not in text
    assert '"--clock-control", "none"' in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_need_only_earlier_ones_and_fit_into_their_time(device: str) -> None:
    values = dict.fromkeys(("python", "work", "minutes", "arch"), "x")
    seen: list[str] = []
    for step in steps.steps(device):
        assert step.name not in seen and set(step.after) <= {*seen, "no nvcc"}
        assert step.seconds >= step.least
        assert not any("{" in a for a in step.arguments(values))
        seen.append(step.name)
    if device == "cuda":
        essential = steps.steps(device)[: seen.index("users-command")]
        at_most = sum(max(s.seconds for s in group) for group in runner.together(essential))
        assert at_most + runner.RESERVED <= steps.ESSENTIAL


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_probes_run_before_what_they_answer_for_and_checks_before_what_is_timed(
    device: str,
) -> None:
    names = [step.name for step in steps.steps(device)]
    order = ("kernels", "probes", "smoke", "routes", "profile")
    assert sorted(order, key=names.index) == list(order)


def test_the_sanitizer_watches_both_kinds_of_convolutions_with_each_tool() -> None:
    watched = {s.name: s for s in steps.steps("cuda") if "compute-sanitizer" in s.command}
    assert set(watched) == {"memcheck", "racecheck", "synccheck"} and set(report.CHECKS) > {
        *watched
    }
    for name, step in watched.items():
        assert f"--tool {name} " in step.command and step.beside
        for family in ("fprop", "dgrad", "wgrad"):
            for kind in ("", "sm90_"):
                assert f"cuda:{kind}{family}:bfloat16" in step.command


def test_a_kernel_that_is_wrong_is_left_out_by_its_own_family(tmp_path: Path) -> None:
    campaign = runner.Campaign(tmp_path, tmp_path, "cuda", {})
    rows = [{"check": "cuda:sm90_dgrad:bfloat16", "status": "HUNG"}]
    rows += [{"check": "triton:taps:float16", "status": "WRONG"}]
    (tmp_path / "steps" / "smoke.json").write_text(json.dumps(rows))
    known = {campaign.environment(s)["FASTFILM_WITHOUT"] for s in steps.steps("cuda")}
    assert known == {"cuda:sm90_dgrad:bfloat16,triton:taps:float16"}
    assert len(left_out.parse(*known)) == 2


def test_the_essential_tests_exist() -> None:
    for node in steps.ESSENTIAL_TESTS:
        path, _, name = node.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_nothing_of_the_campaign_needs_a_package_that_is_not_installed() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1])\n"
    code += "import benchmarks.campaign.__main__ as m; m.steps('cuda')\n"
    code += "assert not {'torch', 'numpy', 'fastfilm', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-I", "-c", code, str(ROOT)], check=True)


def test_the_commit_is_that_of_the_prepared_folder_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PREPARED", tmp_path)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text("as prepared")
    assert runner.commit() is None
    known = {"commit": "abc", "sources": runner.fingerprint()}
    bundle.write_json(tmp_path / "commit.json", known)
    assert runner.commit() == "abc"
    (tmp_path / "setup.py").write_text("changed")
    assert runner.commit() == "abc-dirty"


def test_test_outcomes_are_read_from_a_log_that_breaks_off(tmp_path: Path) -> None:
    log = tmp_path / "t.log"
    log.write_text(
        "$ python -m pytest\n"
        "tests/kernels/test_kernels.py::test_a[gpu-2d, x] PASSED [ 10%]\n"
        "tests/kernels/test_kernels.py::test_b FAILED [ 20%]\n"
        "tests/kernels/test_kernels.py::test_c SKIPPED (why) [ 30%]\n"
        "[gw3] [ 40%] PASSED tests/kernels/test_kernels.py::test_e[a b] \n"
        "tests/kernels/test_kernels.py::test_d "
    )
    wrong = ["tests/kernels/test_kernels.py::test_b"]
    assert results.outcomes(log) == {"passed": 2, "failed": 1, "skipped": 1, "wrong": wrong}
    assert results.outcomes(tmp_path / "none.log") == {}


AGAINST_EAGER = "FiLMedUNet 2D, training step against eager AMP channels-last"


def verdict(rows: list[dict[str, Any]], figure: str) -> targets.Verdict:
    (judged,) = [v for v in targets.verdicts(rows) if v.target.figure == figure]
    return judged


def test_targets_compare_rows_that_took_turns_and_count_nothing_unmeasured() -> None:
    assert tuple(n.case for n in networks.NETWORKS[:3]) == (
        targets.FLAT,
        targets.DEEP,
        targets.RESENC,
    )
    assert {v.word for v in targets.verdicts([])} == {"not measured"}
    rows = [row("eager-channels-last", 6.0), row("fastfilm", 1.5), row("fastfilm", 1.0, step="b")]
    assert (verdict(rows, AGAINST_EAGER).value, verdict(rows, AGAINST_EAGER).word) == (
        4.0,
        "reached",
    )
    rows[1]["median_s"] = 3.0
    assert verdict(rows, AGAINST_EAGER).word == "short"
    rows[1]["status"] = "FAILED"  # a wrong result has no speed
    assert verdict(rows, AGAINST_EAGER).word == "not measured"
    figure = "peak memory of the training step, 2D: eager-channels-last over fastfilm"
    rows = [row("eager-channels-last", 1.0, peak_bytes=100), row("fastfilm", 1.0, peak_bytes=39)]
    assert verdict(rows, figure).word == "reached"
    rows[1]["peak_bytes"] = 41
    assert verdict(rows, figure).word == "short"
    figure = "FiLMedUNet 2D, training step, against the paper's form"
    rows = [row("paper", 3.0), row("paper", 12.0, dtype="float32", step="f"), row("fastfilm", 1.0)]
    assert verdict(rows, figure).value == 12.0
    rows = [row("eager", 2.0), row("compile", 0.5), row("fastfilm", 1.0), row("fastfilm-x", 0.4)]
    ((case, peer, ratio),) = targets.slower(rows)
    assert "training" in case and peer == "compile" and ratio == 0.5


def measured(*rows: dict[str, Any], device: str = "cuda") -> dict[str, Any]:
    machine = {"device_name": "Card", "copy_gbps": 4000.0, "l2_gbps": 6000.0, "launch_us": 3.0}
    machine |= {"processors": 132, "matrix_tflops": {"bfloat16": 700.0}}
    checks = [{"check": "cuda:fprop:float16", "status": "right", "error": 1e-4}]
    checks += [{"check": "cuda:wgrad:bfloat16", "status": "WRONG", "error": 0.5}]
    return {
        "about": {"device": device, "commit": "abc"}, "machine": machine, "rows": list(rows), "checks": checks,
        "steps": {"model": {"status": "ok", "seconds": 3.0, "note": ""}}, "tests": {"tests": {"passed": 3}},
        "probes": [{"probe": "shift", "status": "FAIL", "figure": 2.0, "unit": "errors", "note": "n"}],
        "tuned": {},
    }  # fmt: skip


ROUTES = [
    row(p, s, suite="routes", case="L", mode="forward", ratio=r, tflops=5.0)
    for p, s, r in (("vendor", 2e-3, None), ("fastfilm-a", 1e-3, 2.0), ("fastfilm-b", 4e-3, 0.5))
]
NCU = row(
    "ncu", 1e-4, suite="profile", note="fprop_kernel", registers=168.0, stalls={"barrier": 0.4}
)


def test_the_report_answers_first_and_shows_everything() -> None:
    text = report.text(measured(*ROUTES, NCU, row("fastfilm", 1.0, ratio=1.5)), ["speed.png"])
    answers = [line for line in text.splitlines() if line[:2].strip(".").isdigit()]
    assert len(answers) == 10 and text.startswith("# Campaign\n\n1. On: Card")
    head = "\n".join(answers)
    for said in (
        "1 right against float64; left out of all that follows: cuda:wgrad:bfloat16 WRONG",
        "faster than the vendor's convolution alone in 1 of 1, median 2.00×",
        "barrier 40 %", "1 FAIL: shift", "mend cuda:wgrad:bfloat16", "training bfloat16 1.50×",
    ):  # fmt: skip
        assert said in head
    for said in (
        "| L | forward | 2 5 | 1 5 2.00× | 4 5 0.50× |",
        "168",
        "3 passed",
        "![speed.png]",
    ):
        assert said in text
    dry = report.text(
        measured(row("eager-channels-last", 6.0), row("fastfilm", 1.5), device="cpu"), []
    )
    assert "no speed on a GPU is claimed" in dry and "no speed on" not in text
    assert "| reached |" not in dry


def kinds(old: float | None, new: float, vendor: float, taken: bool, mode: str) -> list[Any]:
    """Rows of a layer by both kinds of CUDA convolutions, and the vendor's."""
    common = {"suite": "routes", "case": "L", "mode": mode, "tflops": 5.0, "step": "routes"}
    rows = [row("vendor", vendor, **common)]
    if old is not None:
        rows += [row(targets.OLD, old, ratio=vendor / old, **common)]
    return [*rows, row(targets.NEW, new, ratio=vendor / new, chosen=taken, **common)]


def test_the_report_has_both_kinds_of_convolutions_beside_the_vendors() -> None:
    rows = kinds(4e-3, 1e-3, 2e-3, taken=True, mode="forward")
    rows += kinds(2e-3, 4e-3, 1e-3, taken=True, mode="input gradient")
    rows += kinds(None, 1e-3, 3e-3, taken=False, mode="weight gradient")
    failed = {"status": "FAILED", "median_s": None, "note": "wrong output"}
    rows += [row(targets.NEW, 1.0, suite="routes", case="M", mode="forward") | failed]
    text = report.text(measured(*rows), [])
    for said in (
        "| L | forward | 4 5 | 1 5 | 2 5 | 4.00× | 2.00× | wgmma |",
        "| L | input gradient | 2 5 | 4 5 | 1 5 | 0.50× | 0.25× | **wgmma** |",
        "| L | weight gradient | - | 1 5 | 3 5 | - | 3.00× | mma |",
        "| M | forward | - | FAILED wrong output | - | - | - | - |",
        "by wgmma: faster than those by mma in 1 of 2, median 2.25×;",
        "faster than the vendor's in 2 of 3, median 2.00×",
    ):  # fmt: skip
        assert said in text
    assert "by wgmma" not in report.text(measured(*ROUTES), []).replace("Probes of wgmma", "")


def test_every_picture_is_drawn_from_rows_and_none_from_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [
        row("eager-channels-last", 2.0, peak_bytes=1 << 21),
        row("fastfilm", 1.0, peak_bytes=1 << 20),
    ]
    rows += [row("eager-channels-last", 4.0, step="later"), row("compile", 2.0, step="later")]
    assert plots.draw(measured(*rows, *ROUTES), tmp_path) == list(bundle.PICTURES)
    assert all((tmp_path / p).stat().st_size > 10_000 for p in bundle.PICTURES)
    assert plots.draw(measured(), tmp_path) == []
    # rows of another step are scaled by their own reference
    same = plots.same_step(rows, (targets.FLAT, "training", "bfloat16"), rows[0])
    assert same["compile"]["median_s"] == 1.0


def test_preparing_names_what_could_not_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "PREPARED", tmp_path)
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "_run", lambda command, *rest: True)
    monkeypatch.setattr(prepare.probes, "nvcc", lambda: None)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    assert prepare.main("90a") == 1
    assert "FAILED: CUDA kernels, probes\n" in capsys.readouterr().err
