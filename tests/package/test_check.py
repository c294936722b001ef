"""``python -m fastfilm check``: it finds nothing wrong here, and finds what is made wrong."""

from __future__ import annotations

import io
import re
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import fastfilm.check
from fastfilm.__main__ import main
from fastfilm.ops import choice, launchers
from fastfilm.ops.settings import left_out

BACKENDS = choice.BACKENDS
HERE = [b.name for b in BACKENDS.values() if b.unavailable() is None and b.name != "triton"]
needs_cpu = pytest.mark.skipif("cpu" not in HERE, reason="the C++ extension was not built")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton, which has a test of its own."""
    kept = {k: v for k, v in BACKENDS.items() if k != "triton"}
    monkeypatch.setattr(fastfilm.check, "BACKENDS", kept)


def lines(text: str) -> list[str]:
    """The rows of the table."""
    return [
        line for line in text.splitlines() if re.match(r"(reference|cpu|cuda|triton) +\w+ ", line)
    ]


def test_every_backend_and_type_is_checked_and_right(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.perf_counter()
    status = main(["check"])
    text = capsys.readouterr().out
    rows = lines(text)
    assert status == 0, "\n".join(r for r in rows if not r.endswith(" ok"))
    assert time.perf_counter() - began < 30
    for name in HERE:
        for dtype in BACKENDS[name].dtypes:
            kind = str(dtype).removeprefix("torch.")
            assert any(r.startswith(name) and f" {kind} " in r for r in rows), (name, kind)


def test_the_report_names_versions_and_is_aligned(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--quick"]) == 0
    text = capsys.readouterr().out
    for value in (torch.__version__, fastfilm.__version__, "triton", "driver", "cuDNN", "eager's"):
        assert value in text
    rows = lines(text)
    assert rows and {r.rindex(" ok") for r in rows} == {len(rows[0]) - 3}
    head = next(line for line in text.splitlines() if line.startswith("backend"))
    assert head.index("status") == len(rows[0]) - 2


def test_a_run_that_is_cut_has_printed_what_it_found(
    here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, written = fastfilm.check.HEAD._replace(backend="cpu", route="fused"), io.BytesIO()

    def cut(quick: bool) -> Iterator[fastfilm.check.Row]:
        yield row
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(fastfilm.check, "check", cut)
    # what its owner has not flushed stays in the wrapper
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    with pytest.raises(KeyboardInterrupt):
        fastfilm.check.report()
    assert len(lines(written.getvalue().decode())) == 2


def test_quick_checks_less(here: None) -> None:
    quick, full = list(fastfilm.check.check(quick=True)), len(fastfilm.check.CASES)
    assert 0 < len(quick) < full * len(HERE)


def broken(name: str, how: Callable[..., Any]) -> tuple[ModuleType, str, Callable[..., Any]]:
    kernels = launchers.of("cpu")
    real = getattr(kernels, name)
    return kernels, name, lambda *args, **options: how(real(*args, **options))


def slightly(found: torch.Tensor) -> torch.Tensor:
    """One element off by a part in 1000."""
    found.flatten()[0] *= 1.001
    return found


WRONG: dict[str, Callable[..., Any]] = {
    "apply": lambda v: v * 1.001,
    "moments": slightly,
    "apply_backward": lambda found: (found[0], found[1] * 1.001),
    "moments_backward": lambda found: (found[0].mul_(float("nan")), found[1]),
    "residual": lambda v: v * 1.001,
    "residual_backward": lambda found: (found[0] * 1.001, *found[1:]),
}


@needs_cpu
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_launcher_is_found_and_the_status_is_1(
    name: str, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(*broken(name, WRONG[name]))
    assert main(["check", "--quick"]) == 1
    rows = lines(capsys.readouterr().out)
    wrong = [r for r in rows if "WRONG" in r]
    assert wrong and all(r.startswith("cpu") for r in wrong)
    assert all(r.endswith("ok") for r in rows if r.startswith("reference"))


@needs_cpu
def test_a_wrong_view_is_found(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = launchers.of("cpu").gather

    def gather(source: Any, out: torch.Tensor, first: int) -> None:
        real(source, out, first)
        out[:, first] *= 1.001

    monkeypatch.setattr(launchers.of("cpu"), "gather", gather)
    assert main(["check", "--quick"]) == 1
    wrong = [r for r in lines(capsys.readouterr().out) if "WRONG" in r]
    assert wrong and all("behind" in r for r in wrong)


@needs_cpu
def test_a_launcher_that_raises_is_a_failure_with_its_reason(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(found: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(*broken("apply", raises))
    assert main(["check", "--quick"]) == 1
    assert "FAILED: RuntimeError: no such kernel" in capsys.readouterr().out


def test_unavailable_backends_are_named_with_their_reason(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "describe", lambda: [("triton", "no CUDA device", "")])
    assert main(["check", "--quick"]) == 0
    assert "triton: not checked, no CUDA device" in capsys.readouterr().out


def test_triton_is_checked_by_both_routes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if BACKENDS["triton"].unavailable() is not None:
        pytest.skip("triton is not available")
    monkeypatch.setattr(fastfilm.check, "BACKENDS", {"triton": BACKENDS["triton"]})
    monkeypatch.setattr(fastfilm.check, "INTERPRETED", fastfilm.check.INTERPRETED[:1])
    monkeypatch.setattr(fastfilm.check, "_QUICK", (torch.float32,))
    status = main(["check", "--quick"])
    text = capsys.readouterr().out
    assert status == 0, text
    assert {r.split()[1] for r in lines(text)} == {"fused", "composed"}


def test_kernels_that_are_left_out_are_counted_and_not_wrong(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise NotImplementedError("cuda:dgrad:float32 is left out by FASTFILM_WITHOUT")

    monkeypatch.setattr(fastfilm.check, "_errors", refused)
    assert main(["check", "--quick"]) == 0
    text = capsys.readouterr().out
    count = len(lines(text))
    assert f"{count} checks, 0 wrong" in text and f"{count} left out by FASTFILM_WITHOUT" in text


def test_kernels_whose_work_others_do_are_named_in_front(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastfilm.check, "check", lambda quick: iter(()))
    with left_out.without("cuda:sm90_fprop"):
        assert main(["check"]) == 0
    said = "left out by FASTFILM_WITHOUT: cuda:sm90_fprop (done by mma)"
    assert said in capsys.readouterr().out.splitlines()


def test_nothing_more_is_checked_once_the_gpu_is_lost(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fastfilm.check, "_errors", lost)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert main(["check", "--quick"]) == 1
    text = capsys.readouterr().out
    assert len(lines(text)) == 1 and "the other rows are not checked" in text
