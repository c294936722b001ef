"""One set of functions per backend, and the two routes that put a block together from them."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from ..settings import left_out
from ..spec import Plan
from . import composed, fused

MODULES = {"reference": "eager", "cpu": "cpu.kernels", "cuda": "cuda.kernels", "triton": "triton"}
"""Backend -> the module here that holds its launchers."""

_replaced: dict[str, Any] = {}

ROUTES = {"composed": composed, "fused": fused}
"""Modules with ``forward``, ``finished`` and ``backward``; see ``composed``."""


@functools.cache
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{MODULES[backend]}")


def of(backend: str) -> Any:
    """The kernels of a backend (``interface.Kernels``), imported on first use, without those that are left out."""
    if not _replaced and not left_out.entries:
        return _module(backend)
    from .remaining import remaining

    return remaining(backend, _replaced[backend] if backend in _replaced else _module(backend))


def reads_sources(plan: Plan) -> bool:
    """Whether a plan's convolutions read maps that were never written."""
    return plan.route == "fused" and of(plan.backend).reads_sources is True


@contextlib.contextmanager
def replaced(kernels: Mapping[str, Any]) -> Iterator[None]:
    """Replaces backends' kernels inside the block, for an instrument that watches them."""
    before = dict(_replaced)
    _replaced.update(kernels)
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)
