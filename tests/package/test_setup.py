"""What the build says it left out, on machines without one of its tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[2]
# leaves an empty file where the result is asked for
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""


def build(
    tools: Path, out: Path, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """``build_ext`` with nothing but ``tools`` on the path, and what it says of fastfilm itself."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTFILM_", "CC", "CXX"))}
    kept |= {"PATH": str(tools), **environment}
    folders = ["--build-lib", str(out / "lib"), "--build-temp", str(out / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done, [line for line in lines if line.startswith("fastfilm: ")]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def add_compiler(tools: Path) -> dict[str, str]:
    path = tools / "c++"
    path.write_text(COMPILER)
    path.chmod(0o755)
    return {"CC": "c++", "CXX": "c++"}


def test_without_nvcc_one_line_says_that_the_cpu_part_is_built(tools: Path, tmp_path: Path) -> None:
    done, lines = build(tools, tmp_path, **add_compiler(tools))
    assert done.returncode == 0, done.stderr
    assert lines == ["fastfilm: only the CPU part is built: nvcc not found"]
    lib = tmp_path / "lib"
    built = [path.relative_to(lib) for path in lib.rglob("*") if path.is_file()]
    assert [str(path).partition(".")[0] for path in built] == ["fastfilm/ops/launchers/cpu/_C"]


def test_without_a_compiler_one_line_speaks_for_both_parts(tools: Path, tmp_path: Path) -> None:
    done, lines = build(tools, tmp_path, CC="c++", CXX="c++")
    assert done.returncode == 0, done.stderr
    expected = "only the Python part is built: no working C++17 compiler: c++ not found"
    assert lines == [f"fastfilm: {expected}"]
    assert not (tmp_path / "lib").exists()


def test_a_part_that_was_asked_for_by_name_fails_without_its_tools(
    tools: Path, tmp_path: Path
) -> None:
    done, _ = build(tools, tmp_path, FASTFILM_CUDA="1", **add_compiler(tools))
    assert done.returncode != 0
    assert "FASTFILM_CUDA=1, but the CUDA part was not built: nvcc not found" in done.stderr


def test_nothing_is_said_where_nothing_is_left_out(tools: Path, tmp_path: Path) -> None:
    done, lines = build(tools, tmp_path, FASTFILM_CUDA="0", **add_compiler(tools))
    assert done.returncode == 0, done.stderr
    assert lines == []
