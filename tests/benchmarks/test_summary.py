"""The sentences and the chart at the end of a run: right for rows whose figures are known."""

from __future__ import annotations

import builtins
import io
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import cli
from benchmarks.measure import summary, table
from benchmarks.measure.record import FAILED, NO_TIME, SKIPPED, Record, Row

CPU = {
    "device": "cpu", "device_name": "Some CPU", "threads": 2, "cores": 2, "load": 0.5, "load_end": 1.0,
    "torch": "2.13.0",
}  # fmt: skip
FLAT, DEEP = "FiLMedUNet 2D 96×96 b2", "FiLMedUNet 3D 32×32×16 b2"


def row(
    provider: str, ratio: float | None = None, seconds: float | None = None, **more: Any
) -> Row:
    values = {"suite": "model", "case": FLAT, "mode": "training", "dtype": "float32"} | more
    return Row(provider=provider, device="cpu", ratio=ratio, median_s=seconds, **values)


def case(ours: float, **more: Any) -> list[Row]:
    """Eager in both layouts, the paper's form, and fastfilm ``ours`` times as fast."""
    speeds = {"eager": 0.8, "eager-channels-last": 1.0, "paper": 0.5, "fastfilm-cpu": ours}
    return [row(name, ratio, 0.024 / ratio, **more) for name, ratio in speeds.items()]


def test_five_sentences_name_what_was_measured_and_how_fast() -> None:
    rows = [*case(1.5), *case(6.0, case=DEEP), *case(2.0, suite="ops", case="64→64")]
    found = summary.sentences(rows, CPU)
    assert len(found) == 5 and all(s[0].isupper() and s.endswith(".") for s in found)
    measured, eager, compiled, memory, following = found
    assert (
        "Some CPU (2 threads), torch 2.13.0: 2 cases of whole FiLMed U-Nets and 1 case" in measured
    )
    assert "3.00 times as fast in the geometric mean (1.50 to 6.00 in 2 cases) on whole" in eager
    assert "2.00 times as fast on single blocks" in eager and "slower" not in eager
    assert (
        compiled
        == "Against torch.compile of torch 2.13.0 nothing was measured: this run does not compile."
    )
    assert memory.startswith("Memory was not measured")
    assert "fastfilm.convert(model)" in following


def test_a_slower_case_is_called_slower() -> None:
    eager = summary.sentences([*case(0.8), *case(2.0, case=DEEP)], CPU)[1]
    assert "(0.80 to 2.00 in 2 cases)" in eager and eager.endswith("; in 1 case it is slower.")


def test_the_faster_of_the_compiled_forms_counts_and_its_torch_is_named() -> None:
    rows = [*case(3.0), row("compile", 1.2, 0.02), row("compile-max-autotune", 1.5, 0.016)]
    said = summary.sentences(rows, CPU)[2]
    assert said.startswith("Against torch.compile of torch 2.13.0, fastfilm is 2.00 times as fast")
    reason = row("compile", status=SKIPPED, note="no C++ compiler for torch.compile on a CPU")
    said = summary.sentences([*case(3.0), reason], CPU)[2]
    assert said.endswith("nothing was measured: no C++ compiler for torch.compile on a CPU.")


def test_memory_is_that_of_the_memory_suite() -> None:
    kept = {"suite": "memory", "case": "FiLMedUNet 2D 320×256 b1"}
    rows = [
        row("eager", saved_bytes=400 << 20, **kept),
        row("fastfilm-cpu", saved_bytes=160 << 20, **kept),
    ]
    said = summary.sentences([*case(2.0), *rows], CPU)[3]
    assert "fastfilm keeps 160.0 MiB" in said and "400.0 MiB, 2.5 times as much" in said


def test_what_to_do_next_depends_on_what_happened() -> None:
    wrong = row("fastfilm-triton", status=FAILED, note="error 1.0e-01")
    assert "1 row of fastfilm FAILED" in summary.sentences([*case(2.0), wrong], CPU)[4]
    assert "more time" in summary.sentences([], CPU)[4]
    late = row("all", status=SKIPPED, note=NO_TIME)
    assert "what there was no time for" in summary.sentences([*case(2.0), late], CPU)[4]
    assert "fastfilm tune" in summary.sentences(case(2.0), CPU | {"device": "cuda"})[4]


def test_nothing_measured_gives_no_speed() -> None:
    measured = summary.sentences([], CPU | {"load_end": 9.0})[0]
    assert measured.startswith("Nothing was timed") and "(load 9.0 on 2 cores)" in measured
    measured, eager, *_ = summary.sentences([], CPU)
    assert measured.startswith("Nothing was timed") and eager.startswith("There is no speed")
    # a wrong result has a time and no ratio
    rows = [*case(2.0)[:3], row("fastfilm-cpu", None, 0.001, status=FAILED)]
    assert summary.sentences(rows, CPU)[1].startswith("There is no speed") and not summary.bars(
        rows
    )


def test_a_busy_machine_and_the_reference_backend_are_named() -> None:
    assert (
        "busy with other work (load 7.0 on 2 cores)"
        in summary.sentences(case(2.0), CPU | {"load": 7.0})[0]
    )
    rows = [*case(2.0)[:3], row("fastfilm-reference", 1.0, 0.024)]
    assert summary.sentences(rows, CPU)[1].startswith("None of fastfilm's kernels runs here")


def test_bars_are_as_long_as_the_ratios_and_their_times_agree_with_them() -> None:
    rows = case(2.0)
    rows[
        -1
    ].median_s = 0.020  # taken while the machine was slow: the quotient of the medians is 1.2
    lines = summary.chart(summary.bars(rows), "#")
    assert lines[1] == f"{FLAT}, training, fp32"
    found = {m[1]: (len(m[2]), float(m[3]), float(m[4])) for line in lines
             if (m := re.match(r"  (\S+)\s+(#+)\s+([\d.]+)×\s+([\d.]+) ms$", line))}  # fmt: skip
    assert list(found) == [
        "eager-channels-last",
        "paper",
        "fastfilm-cpu",
    ]  # the slower layout is left out
    assert [v[0] for v in found.values()] == [summary.WIDTH // 2, summary.WIDTH // 4, summary.WIDTH]
    for _, ratio, ms in found.values():
        assert ratio * ms == pytest.approx(24.0)


def test_a_ratio_that_the_medians_contradict_is_marked_and_explained() -> None:
    rows = case(2.0)
    assert "~" not in table.table(rows)
    rows[-1].median_s = 0.020
    text = table.table(rows)
    assert text.count("2.00x~") == text.count("~") - 1 == 1
    assert text.endswith(table.DRIFTED)
    line = next(s for s in text.splitlines() if s.startswith("paper"))
    assert "0.50x " in line  # the column stays aligned


@pytest.mark.parametrize("rich", [True, False])
def test_the_same_text_is_printed_with_rich_and_without(
    rich: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rich:
        pytest.importorskip("rich", reason="the package rich is not installed")
    else:
        real = builtins.__import__

        def without(name: str, *args: Any, **options: Any) -> Any:
            if name.startswith("rich"):
                raise ImportError(name)
            return real(name, *args, **options)

        monkeypatch.setattr(builtins, "__import__", without)
    out = io.StringIO()
    summary.show(case(2.0), CPU, out)
    expected = ["", *summary.sentences(case(2.0), CPU), "", *summary.chart(summary.bars(case(2.0)))]
    assert out.getvalue().splitlines() == expected


def test_a_terminal_without_blocks_gets_number_signs() -> None:
    buffer = io.BytesIO()
    out = io.TextIOWrapper(buffer, encoding="ascii", errors="replace")
    summary.show(case(2.0), CPU, out)
    out.flush()
    text = buffer.getvalue().decode("ascii")
    assert "#" * summary.WIDTH in text and "2.00x" in text


@pytest.mark.parametrize("suite", [None, "model"])
def test_a_run_without_suite_ends_with_sentences_then_bars_then_the_table(
    suite: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record(dict(CPU), tmp_path / "o.json")
    for one in case(2.0):
        record.add(one)
    args = SimpleNamespace(suite=suite, json=str(record.path), plot=str(tmp_path / "o.png"))
    session = SimpleNamespace(record=record)
    assert cli.finish(session, args, time.monotonic(), plot=False) == 0  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    starts = (
        "Measured on",
        "Against eager",
        "Against torch.compile",
        "Memory",
        "Next:",
        "Speed over",
    )
    places = [i for start in starts for i, line in enumerate(lines) if line.startswith(start)]
    head = next(i for i, line in enumerate(lines) if line.startswith("provider"))
    if suite is None:
        assert len(places) == len(starts) and sorted(places) == places and places[-1] < head
    else:
        assert not places


def test_results_go_to_an_ignored_folder_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", lambda *given: 0)
    assert cli.main(["--suite", "gate"]) == 0
    assert (tmp_path / cli.FOLDER).is_dir()
    ignored = (Path(__file__).resolve().parents[2] / ".gitignore").read_text().splitlines()
    assert f"{cli.FOLDER.split('/')[0]}/" in ignored
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    (tmp_path / "other" / "build").write_text("")
    with pytest.raises(SystemExit) as ended:
        cli.main(["--suite", "gate"])
    assert (
        ended.value.code == cli.EXIT_USAGE and "cannot make the folder" in capsys.readouterr().err
    )
