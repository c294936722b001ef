"""What the compiler says of the CUDA kernels in the installed extension, without a GPU.

A kernel that spills or keeps anything in local memory, a tensor core kernel without its instruction, and one that
needs more shared memory than its target has fail. So does the 3x3 convolution of 64 channels where it moves more
than 1.35 times its maps between L2 and the multiprocessors.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastfilm.tuning.binary import SHARED_LIMIT, resident

DEVICES = {80: (80, 108, SHARED_LIMIT[80]), 90: (90, 132, SHARED_LIMIT[90])}
"""Compute capability, multiprocessors and shared memory of an A100 and an H100."""

MOST_TRAFFIC = 1.35
THREADS = 256
TYPES = {
    "f": "fp32",
    "NS0_11TensorFloatE": "tf32",
    "NS0_8BFloat16E": "bf16",
    "NS0_7Float16E": "fp16",
}
CODES = {"fp32": 0, "tf32": 0, "bf16": 2, "fp16": 3}
KERNELS = {"forward": "fprop", "backward": "dgrad", "weight": "wgrad", "joint": "joint"}

LAYERS = (
    # (dims, ci, co, kernel, stride): one for each compiled tile at least
    (2, 64, 64, 3, 1),
    (2, 32, 16, 3, 1),
    (2, 32, 32, 3, 1),
    (2, 8, 32, 3, 1),
    (2, 8, 64, 3, 1),
    (2, 64, 64, 3, 2),
    (3, 64, 64, 3, 1),
    (3, 32, 64, 3, 2),
)


def extension() -> Path | None:
    """The file of the CUDA extension; None where it was not built."""
    spec = importlib.util.find_spec("fastfilm.ops.launchers.cuda._CUDA")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _tool() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _name(mangled: str) -> tuple[str, str, tuple[int, int] | None]:
    """Kernel, type and tile of a mangled name."""
    kind = r"(f|NS0_8BFloat16E|NS0_7Float16E|NS0_11TensorFloatE)"
    found = re.search(rf"(Convolve|Wgrad)I{kind}Li(\d+)ELi(\d+)E", mangled)
    if found is not None:
        kernel = "wgrad" if found[1] == "Wgrad" else "dgrad" if "Backward" in mangled else "fprop"
        kernel = "joint" if "WeightCompanion" in mangled else kernel
        return kernel, TYPES[found[2]], (int(found[3]), int(found[4]))
    found = re.search(rf"\d+([A-Z][A-Za-z]+)I{kind}E", mangled)
    if found is not None:
        return found[1], TYPES[found[2]], None
    found = re.search(r"(Finish[A-Z][a-z]+)", mangled)
    return found[1] if found else mangled, "fp32", None


def _resources(library: Path, target: str) -> Iterator[tuple[str, dict[str, int]]]:
    command = [_tool(), "-arch", target, "-res-usage", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pattern = r"Function (\S+):\s+(REG:.*)"
    for name, usage in re.findall(pattern, done.stdout + done.stderr):
        yield name, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)}


def _instructions(library: Path, target: str) -> dict[str, Counter[str]]:
    """How often each kernel has the instructions that matter here."""
    found: dict[str, Counter[str]] = {}
    command = [_tool(), "-arch", target, "-sass", str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        here: Counter[str] = Counter()
        for line in process.stdout:
            if "Function :" in line:
                here = found.setdefault(line.split(":")[1].strip(), Counter())
            elif match := re.search(r"\b(HMMA|HGMMA|LDL|STL)\b", line):
                here[match[1]] += 1
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    return found


def _layouts(arch: int) -> tuple[dict[tuple[str, str, tuple[int, int]], int], dict[str, float]]:
    """Shared memory of the tiles that ``LAYERS`` use, and L2 traffic of 64 to 64 channels over its maps."""
    module = importlib.import_module("fastfilm.ops.launchers.cuda._CUDA")
    shared: dict[tuple[str, str, tuple[int, int]], int] = {}
    traffic: dict[str, float] = {}
    for dtype, code in CODES.items():
        for dims, ci, co, k, s in LAYERS:
            size = (1, 256, 256) if dims == 2 else (64, 64, 64)
            kernel = (1, k, k) if dims == 2 else (k, k, k)
            padding = (0, k // 2, k // 2) if dims == 2 else (k // 2,) * 3
            out = tuple(n if n == 1 else n // s for n in size)
            shape = (code, dims, 16, ci, co, size, out, kernel, padding, s, DEVICES[arch])
            conv = module.Convolution(*shape, dtype == "tf32")
            for kind, name in KERNELS.items():
                if kind == "joint" and not conv.has_joint():
                    continue
                facts = conv.facts(kind)
                key = (name, dtype, facts["channels"])
                shared[key] = max(shared.get(key, 0), facts["shared_bytes"])
                if (dims, ci, co, k, s) == LAYERS[0] and kind == "forward":
                    bytes_an_element = 4 if code == 0 else 2
                    traffic[dtype] = facts["bytes_an_output"] / (2 * bytes_an_element)
    return shared, traffic


def rows(quick: bool) -> list[dict[str, Any]]:
    """A row for each kernel and target, and for the traffic of the 3x3 convolution; none without the extension."""
    library = extension()
    if library is None:
        return []
    built = importlib.import_module("fastfilm.ops.launchers.cuda._CUDA").architectures.split(";")
    found = []
    for target in built[-1:] if quick else built:
        arch = int(target.rstrip("af")) // 10 * 10
        if arch not in DEVICES:
            continue
        shared, traffic = _layouts(arch)
        instructions = _instructions(library, f"sm_{target}")
        for mangled, usage in _resources(library, f"sm_{target}"):
            found.append(_row(target, arch, mangled, usage, instructions[mangled], shared))
        for dtype in ("bf16", "fp16"):
            ratio = traffic[dtype]
            over = f"FAILED: more than {MOST_TRAFFIC}" if ratio > MOST_TRAFFIC else "ok"
            about = {"suite": "static", "case": "cuda fprop 3x3 64->64: L2 bytes over maps"}
            found.append(
                about
                | {"provider": f"sm_{target}", "dtype": dtype, "l2_ratio": ratio, "status": over}
            )
    return found


def _row(
    target: str,
    arch: int,
    mangled: str,
    usage: dict[str, int],
    counts: Counter[str],
    shared: dict[tuple[str, str, tuple[int, int]], int],
) -> dict[str, Any]:
    kernel, dtype, tile = _name(mangled)
    faults = []
    if usage["STACK"] or usage.get("LOCAL", 0) or counts["LDL"] or counts["STL"]:
        faults.append(f"local memory: {usage['STACK']} B of stack, {counts['LDL']} loads")
    matrix = counts["HMMA"] + counts["HGMMA"]
    if tile is not None and dtype != "fp32" and matrix == 0:
        faults.append("no HMMA")
    row: dict[str, Any] = {
        "suite": "static",
        "case": f"cuda {kernel}" + (f" {tile[0]}x{tile[1]}" if tile else ""),
        "provider": f"sm_{target}",
        "dtype": dtype,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "mma": matrix,
    }
    needed = None if tile is None else shared.get((kernel, dtype, tile))
    if needed is not None:
        row["shared_bytes"] = needed
        row["blocks"] = resident(usage["REG"], needed, THREADS // 32, arch)
        if needed > SHARED_LIMIT[arch]:
            faults.append(f"needs {needed} of {SHARED_LIMIT[arch]} B shared")
        if row["blocks"] == 0:
            faults.append("not one block fits into a multiprocessor")
    return row | {"status": "FAILED: " + ", ".join(faults) if faults else "ok"}
