"""The probes: index maths, instructions, and rows whatever a probe does. No device is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.campaign import probes
from tests.support.emulated import alone

needs_nvcc = pytest.mark.skipif(probes.nvcc() is None, reason="needs nvcc")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "probes"


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    with alone(folder):
        return probes.compile(folder)


def log(program: Path) -> str:
    return program.with_name(f"{program.name}.log").read_text()


def cuobjdump() -> str | None:
    """The disassembler in the path, or the one that Triton ships."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(shipped) if shipped.is_file() else None


def without_device() -> dict[str, str]:
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


@needs_nvcc
def test_both_ways_to_each_expected_value_agree(program: Path) -> None:
    done = subprocess.run([program, "--self-test"], capture_output=True, text=True, timeout=60)
    assert done.stdout == "self-test: right\n"
    assert done.returncode == 0


@needs_nvcc
def test_no_kernel_spills_or_waits_between_its_products(program: Path) -> None:
    said = log(program)
    assert len(re.findall(r"bytes spill stores", said)) >= 15
    assert not re.findall(r"[1-9]\d* bytes (?:stack frame|spill stores|spill loads)", said)
    assert "serialized" not in said


@needs_nvcc
def test_kernels_have_the_instructions_that_they_ask_about(program: Path) -> None:
    tool = cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump")
    path = f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"  # it calls nvdisasm
    listing = subprocess.run(
        [tool, "-sass", program], capture_output=True, text=True, check=True, env={"PATH": path}
    ).stdout
    kernels = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        kernels[name] = body
    wgmma = [n for n in kernels if re.search(r"\d(?:operands|rate|pipeline)I", n)]
    assert len(wgmma) == 8 + 6 + 4
    for name in wgmma:
        assert "HGMMA" in kernels[name], name
    for name in (n for n in wgmma if "pipeline" in n):
        assert "LDGSTS" in kernels[name], name
        # one with the barriers' initialisation, one behind the weights, and one behind each tile
        assert kernels[name].count("FENCE.VIEW.ASYNC") == (3 if "Lb1E" in name else 2), name
    (stores,) = (n for n in kernels if "10transposed" in n)
    assert re.search(r"STSM\.16\.MT88\.4", kernels[stores])


@needs_nvcc
def test_probes_are_skipped_without_a_device(program: Path) -> None:
    names = subprocess.run([program, "--list"], capture_output=True, text=True).stdout.split()
    assert {"k_major_pitch18", "pipeline", "rate_swizzled", "stmatrix_trans"} <= set(names)
    done = subprocess.run([program], capture_output=True, text=True, env=without_device())
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["probe"] for row in found] == names
    assert {row["status"] for row in found} == {"SKIPPED"}
    assert all("no CUDA device" in row["note"] for row in found)
    assert done.returncode == 1
    assert subprocess.run([program, "nothing"], capture_output=True).returncode == 2


@needs_nvcc
def test_a_table_and_a_file_without_a_device(program: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.campaign.probes",
        "--executable",
        program,
        "--out",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=without_device())
    rows = json.loads(out.read_text())
    assert len(rows) == len(done.stdout.splitlines()) > 20
    assert done.returncode == 1


@needs_nvcc
def test_device_code_compiles_for_sm_80_too(tmp_path: Path) -> None:
    compiler, sources = probes.nvcc(), sorted(probes.SOURCES.glob("*.cu"))
    assert compiler
    command = [compiler, *probes.flags("80"), "-cubin", "--output-directory", tmp_path, *sources]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.cubin"))) == len(sources)


@needs_nvcc
def test_a_program_compiled_beforehand_is_taken(
    program: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "nvcc", lambda: None)
    assert probes.compile(folder) == program
    with pytest.raises(RuntimeError, match="no nvcc"):
        probes.compile(folder / "elsewhere")


def test_the_fingerprint_follows_sources_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probes.fingerprint()
    assert first == probes.fingerprint() != probes.fingerprint("80")
    copy = tmp_path / "copy"
    shutil.copytree(probes.SOURCES, copy)
    monkeypatch.setattr(probes, "SOURCES", copy)
    assert probes.fingerprint() == first
    with open(copy / "wgmma.cuh", "a") as source:
        source.write("\n")
    assert probes.fingerprint() != first


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = script(tmp_path / "nvcc", "echo first; echo the reason >&2; exit 3")
    monkeypatch.setattr(probes, "nvcc", lambda: str(compiler))
    with pytest.raises(RuntimeError, match=r"nvcc failed:\nfirst\nthe reason"):
        probes.compile(tmp_path / "out")


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def ended(pid: str, seconds: float = 10.0) -> bool:
    """Whether a process is gone, or dead and not yet reaped, within some time."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] in "XZ":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


FAKE = """
line() { printf '{"probe": "%s", "status": "%s", "figure": 3, "unit": "errors", "note": ""}\\n' $1 $2; }
case "$1" in
    --list) echo "crashes garbage silent impostor odd hangs right wrong none" ;;
    crashes) kill -SEGV $$ ;;
    garbage) echo "{not json" ;;
    silent) exit 0 ;;
    impostor) line right PASS ;;
    odd) line odd MAYBE ;;
    hangs) sleep 60 & echo $! > "$0.child"; echo half; sleep 60 ;;
    right) line right PASS ;;
    wrong) line wrong FAIL ;;
    none) line none SKIPPED; exit 1 ;;
esac
"""


def test_a_probe_that_goes_wrong_costs_its_own_row(tmp_path: Path) -> None:
    rows = {row["probe"]: row for row in probes.run(script(tmp_path / "fake", FAKE), seconds=2)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "crashes": "FAIL",
        "garbage": "FAIL",
        "silent": "FAIL",
        "impostor": "FAIL",
        "odd": "FAIL",
        "hangs": "FAIL",
        "right": "PASS",
        "wrong": "FAIL",
        "none": "SKIPPED",
    }
    assert "signal 11" in rows["crashes"]["note"]
    assert "not json" in rows["garbage"]["note"]
    assert "did not end within 2 s" in rows["hangs"]["note"]
    assert ended((tmp_path / "fake.child").read_text().strip())
    assert rows["right"]["figure"] == 3 and rows["right"]["unit"] == "errors"


def test_probes_without_time_left_are_skipped(tmp_path: Path) -> None:
    fake = script(tmp_path / "fake", FAKE.replace("crashes garbage", "hangs garbage"))
    rows = probes.run(fake, seconds=0.5, total=0.4)
    assert rows[0]["status"] == "FAIL" and "did not end" in rows[0]["note"]
    assert {row["status"] for row in rows[1:]} == {"SKIPPED"}


def test_a_program_that_does_not_start_is_one_row(tmp_path: Path) -> None:
    (row,) = probes.run(tmp_path / "nothing")
    assert row["status"] == "FAIL" and "did not start" in row["note"]
    (row,) = probes.run(script(tmp_path / "mute", "exit 0"))
    assert "no names" in row["note"]
    command = [
        sys.executable,
        "-m",
        "benchmarks.campaign.probes",
        "--executable",
        tmp_path / "nothing",
    ]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 1
