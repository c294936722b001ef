"""The instruction sets that the C++ kernels were compiled for and this processor has, one after another."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastfilm.ops.launchers.cpu import _C


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.instruction_set()
    _C.use_instruction_set(request.param)
    yield request.param
    _C.use_instruction_set(before)
