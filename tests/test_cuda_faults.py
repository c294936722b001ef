"""Mistakes planted in the CUDA kernels: the emulation must catch each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import emulated, test_cuda_emulated
from tests.test_cuda_emulated import check_pointwise, library

__all__ = ["library"]

pytestmark = test_cuda_emulated.pytestmark


def _pointwise(cuda: Any) -> None:
    check_pointwise(cuda, (2, 12, 11, 9), torch.float32, "silu")


FAULTS: dict[str, tuple[str, str, str, str, Callable[[Any], None]]] = {
    # name: file, kernels that see it, right, wrong, check
    "a barrier of the tree that merges sums is dropped": (
        "affine.h",
        "pointwise.cu",
        "    barrier();\n    if (t < half) {",
        "    if (t < half) {",
        _pointwise,
    ),
    "a barrier of the second stage is dropped": (
        "second_stage.cu",
        "second_stage.cu",
        "  scratch[t] = sum;\n  barrier();",
        "  scratch[t] = sum;",
        _pointwise,
    ),
    "the last voxel of a block is left out": (
        "pointwise.cu",
        "pointwise.cu",
        "in[j] = voxel + j * place.step < place.last;",
        "in[j] = voxel + j * place.step < place.last - 1;",
        _pointwise,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, library: Path, tmp_path: Path) -> None:
    file, kernel, right, wrong, check = FAULTS[fault]
    shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / file
    text = source.read_text()
    assert text.count(right) == 1, "the fault no longer fits the source"
    source.write_text(text.replace(right, wrong))
    others = [o for o in library.parent.glob("*.o") if o.stem != Path(kernel).stem]
    built = emulated.build(tmp_path / "build", csrc=tmp_path / "csrc", objects=others)
    extension = emulated.load(built)
    with emulated.installed(extension) as cuda:
        for seed in (0, 7):
            extension.set_seed(seed)
            try:
                check(cuda)
            except (AssertionError, RuntimeError):
                return
    pytest.fail("nothing noticed it")
