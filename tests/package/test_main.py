"""The command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastfilm
from fastfilm.__main__ import COMMANDS, main
from fastfilm.ops.choice import BACKENDS
from fastfilm.ops.settings import left_out
from fastfilm.ops.settings.environment import VARIABLES


def report(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["info"]) == 0
    return capsys.readouterr().out


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys)
    for value in (fastfilm.__version__, torch.__version__, "numpy", "triton", *BACKENDS):
        assert value in text


def test_info_is_aligned_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys)
    assert text.isascii()
    rows = [line for line in text.splitlines() if line.startswith("  ")]
    starts = {len(row) - len(row[22:].lstrip()) for row in rows if len(row) > 22 and row[2] == " "}
    assert len(starts) == 1


def test_info_says_why_a_backend_is_unavailable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastfilm.ops.choice.describe", lambda: [("triton", "no CUDA device", "cuda; float32")]
    )
    assert "unavailable: no CUDA device" in report(capsys)


def test_info_prints_the_variables_in_force(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTFILM_BACKEND", "reference")
    monkeypatch.delenv("FASTFILM_ROUTE", raising=False)
    rows = dict(
        line.split(maxsplit=1)
        for line in report(capsys).splitlines()
        if line.lstrip().startswith("FASTFILM")
    )
    assert rows["FASTFILM_BACKEND"] == "reference"
    assert rows["FASTFILM_ROUTE"].startswith("not set")
    assert set(rows) == {v.name for v in VARIABLES if v.name.startswith("FASTFILM")}


def test_info_says_what_does_the_work_of_kernels_that_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "left out" not in report(capsys).partition("environment")[0]
    with left_out.without("cuda:sm90_dgrad:bfloat16,cuda:pointwise"):
        text = report(capsys)
    said = "cuda:pointwise, cuda:sm90_dgrad:bfloat16 (done by mma)"
    assert re.search(rf"^  left out  +{re.escape(said)}$", text, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_info_without_a_gpu_says_none(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.split() for line in report(capsys).splitlines() if "none" in line]
    assert {row[0] for row in rows} == {"CUDA", "driver", "cuDNN"}


def test_info_lists_cuda_devices(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="Card", major=9, minor=0, total_memory=2**35)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr("fastfilm.machine.driver", lambda: "1.2.3")
    text = report(capsys)
    assert "Card, sm_90, 32 GiB" in text and "1.2.3" in text


@pytest.mark.parametrize("argv", [[], ["inform"], ["info", "--colour"]])
def test_wrong_command_line_prints_the_usage_and_returns_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err.startswith("usage: fastfilm")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(command.name in text for command in COMMANDS)


def test_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "fastfilm"]
    good = subprocess.run([*command, "info"], capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and good.stdout.startswith("versions\n"), good.stderr
    bad = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 2 and "usage" in bad.stderr


@pytest.mark.parametrize("command", ["info", "plan --help"])
def test_a_reader_that_leaves_ends_a_command_quietly_with_its_own_status(command: str) -> None:
    """As under ``fastfilm info | head -1``."""
    read, write = os.pipe()
    os.close(read)
    command_line = [sys.executable, "-m", "fastfilm", *command.split()]
    process = subprocess.run(
        command_line, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")
