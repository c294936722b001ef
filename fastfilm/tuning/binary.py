"""Registers, spills and matrix instructions of a compiled kernel, read from its binary without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory of one block, bytes (CUDA C++ Programming Guide, technical specifications)."""

SHARED_TOTAL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Shared memory of a multiprocessor, bytes; each block takes 1024 beside its own."""

REGISTERS = 64 * 1024
"""Of a multiprocessor."""

MAX_THREADS = 2048
"""Resident on a multiprocessor."""

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}


def read_binary(cubin: bytes, arch: int) -> tuple[int, int, int]:
    """Registers, stack bytes (spills) and matrix instructions of a cubin.

    Raises:
        RuntimeError: Triton's package lacks the disassembler, or it prints what it never printed.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        raise RuntimeError(f"Triton's package has no {tool.name}, which reads compiled kernels")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run([str(tool), "-res-usage", file.name])
        sass = _run([str(tool), "-sass", file.name])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    name = MATRIX_INSTRUCTION[arch]
    return int(found[1]), int(found[2]), len(re.findall(rf"\b{name}\b", sass))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def resident(registers: int, shared: int, warps: int, arch: int) -> int:
    """Programs that a multiprocessor holds at a time; 0: not even one."""
    threads = 32 * warps
    # registers are given to a warp in units of 256
    by_registers = REGISTERS // (warps * -(-32 * registers // 256) * 256) if registers else 32
    return min(by_registers, SHARED_TOTAL[arch] // (shared + 1024), MAX_THREADS // threads, 32)
