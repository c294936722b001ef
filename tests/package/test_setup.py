"""What the build makes, keeps and records, and what it says it left out, on machines with other tools."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools

from fastfilm.machine import build as told

pytest.importorskip("pybind11")

ROOT = Path(__file__).parents[2]
# leaves an empty file where the result is asked for
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then : > "$2"; fi
  shift
done
"""
# answers as nvcc 99.1 does that knows sm_80 and sm_90, and compiles as COMPILER does
NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo "#$ TOP={toolkit}" >&2; exit 0;;
  --version) echo "Cuda compilation tools, release 99.1, V99.1.0"; exit 0;;
  --list-gpu-code) echo sm_80; echo sm_90; exit 0;;
esac
{body}"""


def build(
    tools: Path, out: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """``build_ext`` with nothing but ``tools`` on the path, and what it says of fastfilm itself."""
    taken = ("FASTFILM_", "CC", "CXX", "CUDA_", "MAX_JOBS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(taken)}
    kept |= {"PATH": str(tools), **environment}
    folders = ["--build-lib", str(out / "lib"), "--build-temp", str(out / "temp")]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders, *arguments],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,  # without a terminal to speak to
    )
    lines = (done.stdout + done.stderr).splitlines()
    return done, [line for line in lines if line.startswith("fastfilm: ")]


def record(out: Path) -> dict[str, Any]:
    """What the build has left for ``fastfilm info``."""
    path = out / "lib" / "fastfilm" / "ops" / "launchers" / "build.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def extensions(out: Path) -> list[str]:
    """Paths of the extensions that were built, without what names the interpreter."""
    paths = sorted(path.relative_to(out / "lib") for path in (out / "lib").rglob("*.so"))
    return [str(path).partition(".")[0].rpartition("launchers/")[2] for path in paths]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    folder = tmp_path / "tools"
    folder.mkdir()
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def add_compiler(tools: Path) -> dict[str, str]:
    write(tools / "c++", COMPILER)
    return {"CC": "c++", "CXX": "c++"}


def add_toolkit(home: Path, body: str = COMPILER.partition("\n")[2]) -> Path:
    """A toolkit laid out as CUDA's; returns its nvcc."""
    write(home / "lib64" / "libcudart_static.a", "!<arch>\n")
    write(home / "bin" / "nvcc", NVCC.format(toolkit=home, body=body))
    return home / "bin" / "nvcc"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """setup.py as a module."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    for name in ("FASTFILM_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("fastfilm_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


needs_no_package = pytest.mark.skipif(
    any(list(Path(folder).glob("nvidia/cu*/bin/nvcc")) for folder in sys.path),
    reason="the package nvidia-cuda-nvcc is installed",
)


@needs_no_package
def test_without_nvcc_one_line_says_that_the_cpu_part_is_built(tools: Path, tmp_path: Path) -> None:
    done, lines = build(tools, tmp_path, **add_compiler(tools))
    assert done.returncode == 0, done.stderr
    reason = "nvcc not found in CUDA_HOME, PATH or the package nvidia-cuda-nvcc"
    assert lines == [f"fastfilm: only the CPU part is built: {reason}"]
    assert extensions(tmp_path) == ["cpu/_C"]
    made = record(tmp_path)
    assert made["CPU"]["built"] and made["CUDA"] == {
        **made["CUDA"],
        "built": False,
        "reason": reason,
    }


def test_without_a_compiler_one_line_speaks_for_both_parts(tools: Path, tmp_path: Path) -> None:
    done, lines = build(tools, tmp_path, CC="c++", CXX="c++")
    assert done.returncode == 0, done.stderr
    expected = "only the Python part is built: no working C++17 compiler: c++ not found"
    assert lines == [f"fastfilm: {expected}"]
    assert extensions(tmp_path) == []


@needs_no_package
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
    assert record(tmp_path)["CUDA"]["reason"] == "FASTFILM_CUDA=0"


def test_targets_that_no_kernel_supports_are_named(tools: Path, tmp_path: Path) -> None:
    add_toolkit(tmp_path / "toolkit")
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), **add_compiler(tools)}
    done, lines = build(tools, tmp_path, FASTFILM_CUDA_ARCHS="70", **environment)
    assert done.returncode == 0, done.stderr
    assert len(lines) == 1 and "only the CPU part is built: FASTFILM_CUDA_ARCHS must" in lines[0]


def test_a_toolkit_in_cuda_home_builds_both_parts_and_a_second_build_compiles_nothing(
    tools: Path, tmp_path: Path
) -> None:
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), **add_compiler(tools)}
    add_toolkit(tmp_path / "toolkit")
    done, lines = build(tools, tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert len(lines) == 1 and "compiling 9 CUDA files for sm_80, sm_90a on" in lines[0]
    assert extensions(tmp_path) == ["cpu/_C", "cuda/_CUDA"]
    made = record(tmp_path)["CUDA"]
    assert made["archs"] == ["80", "90a"] and made["nvcc"] == "99.1"
    assert (made["nvcc by"], made["archs by"]) == ("CUDA_HOME", "the default without a GPU")
    files = made["compiled"]

    done, lines = build(tools, tmp_path, **environment)
    assert done.returncode == 0 and lines == [], done.stderr
    again = record(tmp_path)
    assert [again[p]["compiled"] for p in ("CPU", "CUDA")] == [0, 0]
    assert again["CUDA"]["reused"] == files

    done, lines = build(tools, tmp_path, FASTFILM_CUDA_ARCHS="80", **environment)
    assert "compiling 9 CUDA files for sm_80 on" in lines[0]
    assert record(tmp_path)["CPU"]["compiled"] == 0


def test_a_part_left_out_takes_what_an_earlier_build_left_with_it(
    tools: Path, tmp_path: Path
) -> None:
    add_toolkit(tmp_path / "toolkit")
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), **add_compiler(tools)}
    build(tools, tmp_path, **environment)
    assert extensions(tmp_path) == ["cpu/_C", "cuda/_CUDA"]
    build(tools, tmp_path, FASTFILM_CUDA="0", **environment)
    assert extensions(tmp_path) == ["cpu/_C"]


def test_kernels_that_nvcc_refuses_leave_the_cpu_part_and_the_reason(
    tools: Path, tmp_path: Path
) -> None:
    add_toolkit(tmp_path / "toolkit", "echo 'no such target' >&2; exit 1\n")
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), **add_compiler(tools)}
    done, lines = build(tools, tmp_path, "-j1", **environment)
    assert done.returncode == 0, done.stderr
    reason = "nvcc failed on csrc/cuda/dgrad.cu: no such target"
    assert lines[-1] == f"fastfilm: only the CPU part is built: {reason}"
    assert record(tmp_path)["CUDA"]["reason"] == reason
    assert not list((tmp_path / "temp").rglob("*.part"))


def test_an_object_is_compiled_anew_when_a_header_that_it_reaches_changes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "part").mkdir()
    (tmp_path / "a.cpp").write_text('#include "part/b.h"\n#include <vector>\n')
    (tmp_path / "part" / "b.h").write_text('#  include "../c.inc"\n')
    (tmp_path / "c.inc").write_text("int c;\n")
    (tmp_path / "part" / "other.h").write_text("int d;\n")
    before = script.object_key("a.cpp", "-O3")
    (tmp_path / "part" / "other.h").write_text("int e;\n")
    assert script.object_key("a.cpp", "-O3") == before
    (tmp_path / "c.inc").write_text("long c;\n")
    assert script.object_key("a.cpp", "-O3") != before
    assert script.object_key("a.cpp", "-O2") != script.object_key("a.cpp", "-O3")


def test_max_jobs_bounds_the_compilers_at_once(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "3")
    assert script.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "all")
    with pytest.raises(ValueError, match="MAX_JOBS must be a positive number, got 'all'"):
        script.jobs()


def test_the_targets_are_those_of_the_gpus_that_are_there(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = str(add_toolkit(tmp_path / "toolkit"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.architectures(nvcc) == (["80", "90a"], "the default without a GPU")

    def gpus(*capabilities: str) -> None:
        lines = "".join(f"echo {c}\n" for c in capabilities)
        write(tmp_path / "nvidia-smi", f"#!/bin/sh\n{lines}")

    gpus("9.0", "8.0", "9.0")
    assert script.architectures(nvcc) == (["80", "90a"], "this machine's GPUs (sm_80, sm_90)")
    gpus("9.0")
    assert script.architectures(nvcc)[0] == ["90a"]
    gpus("12.0")  # which this nvcc does not know
    archs, why = script.architectures(nvcc)
    assert archs == ["80", "90a"] and "does not know all of sm_120" in why
    gpus("7.5")
    with pytest.raises(RuntimeError, match=r"from sm_80 on, this machine has sm_75"):
        script.architectures(nvcc)
    monkeypatch.setenv("FASTFILM_CUDA_ARCHS", "86; 100")
    assert script.architectures(nvcc) == (["86", "100"], "FASTFILM_CUDA_ARCHS")


def test_nvcc_is_found_in_cuda_home_then_the_path_then_nvidias_packages(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(script.sys, "path", [])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(RuntimeError, match="nvcc not found in CUDA_HOME, PATH or"):
        script.find_nvcc()
    for where, home in (
        ("the package nvidia-cuda-nvcc", tmp_path / "site" / "nvidia" / "cu13"),
        ("PATH", tmp_path),
        ("CUDA_HOME", tmp_path / "home"),
    ):
        nvcc = add_toolkit(home)
        if where == "CUDA_HOME":
            monkeypatch.setenv(where, str(home))
        assert script.find_nvcc() == (str(nvcc), where)


def test_the_terminal_gets_the_lines_that_pip_keeps_to_itself(tools: Path, tmp_path: Path) -> None:
    """Under pip the build's output is a pipe, and the terminal is reached as /dev/tty."""
    child, terminal = pty.fork()
    if child == 0:  # its session has this terminal
        try:
            build_in_this_session(tools, tmp_path)
        finally:
            os._exit(0)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 1024)
        except OSError:  # the child has ended
            break
        shown += part
        if not part:
            break
    os.waitpid(child, 0)
    os.close(terminal)
    assert b"fastfilm: only the Python part is built: no working C++17 compiler" in shown


def build_in_this_session(tools: Path, out: Path) -> None:
    environment = {"PATH": str(tools), "CC": "c++", "CXX": "c++", "FASTFILM_CUDA": "0"}
    folders = ["--build-lib", str(out / "lib"), "--build-temp", str(out / "temp")]
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        timeout=120,
    )


def test_info_tells_what_the_build_recorded(tools: Path, tmp_path: Path) -> None:
    add_toolkit(tmp_path / "toolkit")
    environment = {"CUDA_HOME": str(tmp_path / "toolkit"), **add_compiler(tools)}
    build(tools, tmp_path, **environment)
    path = tmp_path / "lib" / "fastfilm" / "ops" / "launchers" / "build.json"
    rows = dict(told(path))
    assert rows["CPU part"].startswith("11 files compiled in ")
    assert "with OpenMP" in rows["CPU part"]
    expected = (
        "sm_80, sm_90a (chosen by the default without a GPU); nvcc 99.1 by CUDA_HOME; 8 files"
    )
    assert rows["CUDA part"].startswith(expected)
    build(tools, tmp_path, FASTFILM_CUDA="0", **environment)
    assert dict(told(path))["CUDA part"] == "not built: FASTFILM_CUDA=0"
    assert dict(told(tmp_path / "no.json")).keys() == {"record"}
