"""The C++ kernels on one, two and three threads, with small maps split as large ones are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch


@contextlib.contextmanager
def splitting(count: int) -> Iterator[None]:
    """Gives ``count`` threads to the kernels alone: PyTorch's own operators keep theirs.

    With more than one, small maps are split and their tasks handed out last first. Three are the kernels' own, two
    may be OpenMP's.
    """
    from fastfilm.ops.launchers.cpu import _C

    before = torch.get_num_threads
    torch.get_num_threads = lambda: count
    _C.split_finely(count > 1)
    openmp = _C.openmp(count != 3)
    try:
        yield
    finally:
        _C.split_finely(False)
        _C.openmp(openmp)
        torch.get_num_threads = before


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"threads{count}")
def kernel_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with splitting(request.param):
        yield request.param
