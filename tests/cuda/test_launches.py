"""Kernel launches of one block: no more than stated here, on the CUDA kernels and on Triton's by both routes."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks.counted import emulation as emulated_kernels
from benchmarks.counted import launches
from fastfilm.ops import choice
from tests.support import emulated
from tests.support.emulated import extension, library

__all__ = ["extension", "library"]

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

LIMITS = {
    # forward, backward, inference; autocast casts the weight, and its gradient back
    ("cuda/fused", "bfloat16"): (2, 4, 2),
    ("cuda/fused", "autocast"): (3, 5, 3),
    ("triton/fused", "bfloat16"): (4, 8, 4),
    ("triton/fused", "autocast"): (5, 9, 5),
    ("triton/composed", "bfloat16"): (6, 9, 7),
    ("triton/composed", "autocast"): (7, 10, 8),
}

CALLS = {"forward": 90, "backward": 106, "inference": 90}
"""Functions of the package, without those of ``kernels``, that a block on ``cuda/fused`` calls."""


@pytest.mark.parametrize("norm", launches.NORMS)
@pytest.mark.parametrize("cast", launches.CASTS)
@pytest.mark.parametrize("route", launches.ROUTES)
def test_a_block_takes_few_launches(
    route: str, cast: str, norm: str, extension: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not choice.interpreting():
        pytest.skip("Triton's interpreter is not active")
    monkeypatch.undo()  # conftest's NaN in new buffers are launches too
    with emulated_kernels.serving(extension):
        ours = route == "cuda/fused"
        found = launches.of_block(route, norm, cast, extension, python=ours)
    for mode, limit in zip(launches.MODES, LIMITS[route, cast], strict=True):
        names = found[mode].launches
        assert len(names) <= limit, f"{mode}: {', '.join(names)}"
        convolved = [k for k in names if "convolution" in k or "fprop" in k or "dgrad" in k]
        assert convolved, "the count missed the convolution"
        if ours:
            python = found[mode].python
            assert python and 10 < python.calls <= CALLS[mode], f"{mode}: {python}"
