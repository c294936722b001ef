"""What the compiler says of the CUDA kernels in the installed extension, without a GPU.

A kernel that spills or keeps anything in local memory, a tensor core kernel without its instruction, and one that
needs more shared memory than its target has fail, and kernels of warpgroups with the faults of `warpgroup_loops`.
The clock models' figures of the deciding layers stand behind them, and what the 3x3 convolution of 64 channels
moves between L2 and the multiprocessors, over its maps.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from typing import Any

from fastfilm.tuning.binary import SHARED_LIMIT, resident

from . import clock_model, sass, warpgroup_clocks
from .kernel_loops import Kernel, name_of
from .warpgroup_loops import PREFIX, TARGET, THREADS, Warpgroups, faults

DEVICES = {80: (80, 108, SHARED_LIMIT[80]), 90: (90, 132, SHARED_LIMIT[90])}
"""Compute capability, multiprocessors and shared memory of an A100 and an H100."""

BLOCK = 256
"""Threads of a kernel by mma.sync."""

MATTERING = r"\b(HMMA|HGMMA|LDL|STL)\b"
"""Instructions that are counted."""

CODES = {"fp32": 0, "tf32": 0, "bf16": 2, "fp16": 3}
KERNELS = {"forward": "fprop", "backward": "dgrad", "weight": "wgrad"}

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


Tile = tuple[int, int] | None
Shared = dict[tuple[str, str, Tile], int]
"""Kernel, type and channels of a block (none where one kernel serves all) -> bytes of shared memory at most."""


def layouts(arch: int) -> tuple[Shared, dict[str, float]]:
    """Shared memory of the tiles that ``LAYERS`` use, and L2 traffic of 64 to 64 channels over its maps."""
    module = importlib.import_module("fastfilm.ops.launchers.cuda._CUDA")
    shared: Shared = {}
    traffic: dict[str, float] = {}
    for dtype, code in CODES.items():
        for dims, ci, co, k, s in LAYERS:
            size = (1, 256, 256) if dims == 2 else (64, 64, 64)
            kernel = (1, k, k) if dims == 2 else (k, k, k)
            padding = (0, k // 2, k // 2) if dims == 2 else (k // 2,) * 3
            out = tuple(n if n == 1 else n // s for n in size)
            shape = (code, dims, 16, ci, co, size, out, kernel, padding, s, DEVICES[arch])
            conv = module.Convolution(*shape, dtype == "tf32", "never")
            of_warpgroups = module.Convolution(*shape, dtype == "tf32", "always")
            for kind, name in KERNELS.items():
                facts, other = conv.facts(kind), of_warpgroups.facts(kind)
                key: tuple[str, str, Tile] = (name, dtype, facts["channels"])
                shared[key] = max(shared.get(key, 0), facts["shared_bytes"])
                if other["instruction"] == "wgmma":
                    key = PREFIX + name, dtype, other["channels"] if name == "wgrad" else None
                    shared[key] = max(shared.get(key, 0), other["shared_bytes"])
                if (dims, ci, co, k, s) == LAYERS[0] and kind == "forward":
                    bytes_an_element = 4 if code == 0 else 2
                    traffic[dtype] = facts["bytes_an_output"] / (2 * bytes_an_element)
    return shared, traffic


def rows(quick: bool) -> list[dict[str, Any]]:
    """Rows of each kernel and target, of the clock model and of the traffic; none without the extension."""
    library = sass.extension()
    if library is None:
        return []
    module = sass.load(library)
    built = module.architectures.split(";")
    found = []
    for target in built[-1:] if quick else built:
        arch = int(target.rstrip("af")) // 10 * 10
        if arch not in DEVICES:
            continue
        shared, traffic = layouts(arch)
        resources = dict(sass.resources(library, f"sm_{target}"))
        kernels: dict[tuple[str, tuple[int, int]], Kernel] = {}
        warpgroups: dict[tuple[str, int], Warpgroups] = {}
        for mangled, lines in sass.functions(library, f"sm_{target}"):
            usage, counts = resources[mangled], Counter(re.findall(MATTERING, "".join(lines)))
            if name_of(mangled)[0].startswith(PREFIX):
                if target == TARGET:  # they are empty elsewhere
                    found.append(warpgroups_row(mangled, lines, usage, shared))
                    if other := warpgroup_clocks.kernel_of(mangled, lines, usage["REG"]):
                        warpgroups[other[0]] = other[1]
                continue
            found.append(_row(target, arch, mangled, usage, counts, shared))
            if kernel := clock_model.kernel_of(mangled, lines, usage["REG"]):
                kernels[kernel[0]] = kernel[1]
        found += clock_model.rows(kernels, module, arch)
        found += warpgroup_clocks.rows(warpgroups, module)
        for dtype in ("bf16", "fp16"):
            ratio = traffic[dtype]
            about = {"suite": "static", "case": "cuda fprop 3x3 64->64: L2 bytes over maps"}
            found.append(
                about
                | {"provider": f"sm_{target}", "dtype": dtype, "l2_ratio": ratio, "status": "ok"}
            )
    return found


def _row(
    target: str,
    arch: int,
    mangled: str,
    usage: dict[str, int],
    counts: Counter[str],
    shared: Shared,
) -> dict[str, Any]:
    kernel, dtype, tile = name_of(mangled)
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
        row["blocks"] = resident(usage["REG"], needed, BLOCK // 32, arch)
        if needed > SHARED_LIMIT[arch]:
            faults.append(f"needs {needed} of {SHARED_LIMIT[arch]} B shared")
        if row["blocks"] == 0:
            faults.append("not one block fits into a multiprocessor")
    return row | {"status": "FAILED: " + ", ".join(faults) if faults else "ok"}


def warpgroups_row(
    mangled: str, lines: list[str], usage: dict[str, int], shared: Shared
) -> dict[str, Any]:
    """Of a kernel of warpgroups, with the instructions of a group of products and of a voxel's transform."""
    kernel, dtype, tile = name_of(mangled)
    function = sass.Function(sass.parse(lines))
    counts = Counter(i.name for i in function.instructions)
    wrong = faults(kernel, lines, function, usage)
    row: dict[str, Any] = {
        "suite": "static",
        "case": f"cuda {kernel}" + (f" {tile[0]}x{tile[1]}" if tile else ""),
        "provider": f"sm_{TARGET}",
        "dtype": dtype,
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "mma": counts["HGMMA"],
        "local_loads": counts["LDL"],
        "threads": THREADS[kernel],
    }
    try:
        parts = Warpgroups(function, usage["REG"], clock_model.CONSTANTS)
        which = "gradient" if kernel == f"{PREFIX}dgrad" else "input"
        transform, voxels = parts.transform(which)
        row |= {
            "main_loop_mma": parts.group_products,
            "main_loop_instructions": parts.group.issue,
            "transform_instructions": transform.issue / voxels,
        }
    except ValueError as error:
        wrong.append(str(error))
    needed = shared.get((kernel, dtype, tile))
    if needed is not None:
        row |= {"shared_bytes": needed, "blocks": 1}
        if needed > SHARED_LIMIT[90]:
            wrong.append(f"needs {needed} of {SHARED_LIMIT[90]} B shared")
    return row | {"status": "FAILED: " + ", ".join(wrong) if wrong else "ok"}
