"""Triton binaries that are made beforehand: found on another machine's paths, refused where their keys differ."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")
pytest.importorskip("resource", reason="make counts CPU time as Unix does")

from benchmarks.campaign import binaries

if not (shutil.which("gcc") and shutil.which("readelf")):
    pytest.skip("Triton's launchers need gcc and its binutils", allow_module_level=True)

REPLAY = """
import triton
from benchmarks.campaign import binaries, workloads

seen = {True: [], False: []}
triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: seen[cache_hit].append(src.name)
with binaries.unlaunched():
    # the other way round: a key must not depend on which kernel came first
    for call in reversed(list(workloads.WORKLOADS["proof"]())):
        call()
print(len(seen[True]), *sorted(seen[False]))
"""


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Python in a checkout, where Triton compiles and does not interpret."""
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    given |= {"PYTHONPATH": str(folder), **environment}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, env=given, stdout=subprocess.PIPE, text=True)


def checkout(folder: Path) -> Path:
    """A copy of the sources at another path."""
    skip = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("fastfilm", "benchmarks"):
        shutil.copytree(binaries.ROOT / name, folder / name, ignore=skip)
    shutil.copytree(binaries.ROOT / "kernels", folder / "fastfilm" / "kernels", ignore=skip)
    return folder


def test_binaries_serve_at_other_paths_and_a_changed_kernel_is_compiled_anew(
    tmp_path: Path,
) -> None:
    made, place, cache = (tmp_path / name for name in ("made", "elsewhere", "cache"))
    arguments = "-m", "benchmarks.campaign.binaries", "make", str(made), "--only", "proof"
    assert start(binaries.ROOT, *arguments).wait() == 0
    manifest = json.loads((made / binaries.MANIFEST).read_text())
    assert manifest["faults"] == []
    kernels = list(manifest["entries"].values())
    assert {"fprop_kernel", "moments_kernel"} <= set(kernels)
    assert binaries.install(made, cache) > len(kernels)
    # with the kernels come the parts of Triton's driver that are written in C; the GPU's driver is theirs to load
    libraries = list(cache.glob("*/*.so"))
    assert libraries
    for path in libraries:
        assert b"[libcuda.so.1]" in subprocess.check_output(["readelf", "-d", str(path)])
    source = checkout(place) / "fastfilm" / "kernels" / "pointwise.py"
    text = source.read_text()
    assert "def apply_kernel(" in text
    source.write_text(text.replace("def apply_kernel(", "def apply_kernel( ", 1))
    replay = start(place, "-c", REPLAY, TRITON_CACHE_DIR=str(cache))
    assert binaries.check(made) is None
    found, *compiled = replay.communicate()[0].split()
    assert (int(found), compiled) == (len(kernels) - 1, ["apply_kernel"])


def test_the_value_that_differs_is_named() -> None:
    values = {"triton_key": "1", "environment": {}, "kernels": {"common.py": "1", "taps.py": "1"}}
    manifest: dict[str, Any] = {"values": values, "entries": {"A": "fprop_kernel"}}
    here: dict[str, Any] = {"values": values, "proof": {"A": "fprop_kernel"}}
    assert binaries.difference(manifest, here) is None
    for name, value, said in (
        ("triton_key", "2", "triton_key was 1, here it is 2"),
        ("environment", {"DISABLE_PTXAS_OPT": "1"}, "environment: DISABLE_PTXAS_OPT differ"),
        ("kernels", {"common.py": "2", "taps.py": "1"}, "kernels: common.py differ"),
    ):
        other = {**here, "values": {**values, name: value}}
        assert binaries.difference(manifest, other) == said
    missing = binaries.difference(manifest, {**here, "proof": {"B": "dgrad_kernel"}})
    assert missing == "1 of 1 launches of a layer find no binary, dgrad_kernel first"
