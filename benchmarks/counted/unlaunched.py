"""Triton's kernels on CPU tensors, found or compiled as for a GPU and never run.

Triton and fastfilm are imported where they are used: a process may set their environment first.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ARCHITECTURE = 90
"""Compute capability times 10; the tiles that launchers choose for CPU tensors are those of this one."""


def target() -> Any:
    """The GPU that Triton compiles for."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", ARCHITECTURE, 32)


def kernel_sources() -> list[Path]:
    """Files of the Triton kernels that are installed."""
    return sorted(Path(importlib.import_module("fastfilm.kernels").__path__[0]).glob("*.py"))


class _Driver:
    """Stands in for the driver of a GPU that is not here."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target()


@contextlib.contextmanager
def unlaunched() -> Iterator[None]:
    """Kernels launched on CPU tensors in the block are found or compiled as for a GPU, and do not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fastfilm.ops.launchers import available
    from fastfilm.ops.launchers import triton as fallback
    from fastfilm.ops.vendor import convolutions as vendor

    run = JITFunction.run

    def no_run(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        return run(kernel, *args, grid=grid, warmup=True, **named)

    driver.set_active(_Driver())
    with (
        patch.object(JITFunction, "run", no_run),
        patch.object(available, "interpreting", lambda: True),
        patch.object(fallback, "STRICT", True),
        # a CPU's layout of weights, which its processor decides on
        patch.object(vendor, "_packs", lambda *given: False),
    ):
        yield
