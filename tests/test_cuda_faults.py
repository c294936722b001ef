"""Mistakes planted in the CUDA kernels: the emulation must catch each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import emulated, test_cuda_emulated
from tests.emulated import library
from tests.test_cuda_convolution import Layer, check_layer
from tests.test_cuda_emulated import check_pointwise

__all__ = ["library"]

pytestmark = test_cuda_emulated.pytestmark


def _pointwise(cuda: Any) -> None:
    check_pointwise(cuda, (2, 12, 11, 9), torch.float32, "silu")


def _layer(cuda: Any) -> None:
    check_layer(cuda, Layer((13, 34), (24, 16), dtype=torch.float16))


def _deep(cuda: Any) -> None:
    check_layer(cuda, Layer((5, 5), (200, 8), dtype=torch.bfloat16))


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
    "padding gets the affine too": (
        "slab.h",
        "fprop.cu",
        "      if (!(inside & 1)) continue;\n",
        "",
        _layer,
    ),
    "the halo begins one voxel late": (
        "slab.h",
        "fprop.cu",
        "gx = first.w + x * step;",
        "gx = first.w + x * step + 1;",
        _layer,
    ),
    "the wait for a slab's copies is dropped": (
        "conv.h",
        "fprop.cu",
        "          wait_copies<1>();\n",
        "",
        _layer,
    ),
    "a slab is multiplied before all threads have transformed it": (
        "conv.h",
        "fprop.cu",
        "coefs + buffer * slab.kCoefBytes);\n        barrier();",
        "coefs + buffer * slab.kCoefBytes);",
        _layer,
    ),
    "the next slab overwrites one that is still multiplied": (
        "conv.h",
        "fprop.cu",
        "        barrier();\n        slot ^= 1;",
        "        slot ^= 1;",
        _deep,
    ),
    "the products of two halves of a tile meet": (
        "conv.h",
        "dgrad.cu",
        "valid, values, state);\n      }\n      barrier();",
        "valid, values, state);\n      }",
        _layer,
    ),
    "a row of products is left out of the moments": (
        "fprop.cu",
        "fprop.cu",
        "      state.add(u);",
        "      if (at > 0) state.add(u);",
        _layer,
    ),
    "the parity of a strided gradient is off": (
        "plan.cpp",
        "plan.cpp",
        "axis(t.base, i) = (axis(r, i) + axis(s.padding, i) - first) / step;",
        "axis(t.base, i) = (axis(r, i) + axis(s.padding, i) - first) / step + axis(r, i);",
        lambda cuda: check_layer(cuda, Layer((6, 7), (8, 8), stride=2)),
    ),
    "a share of the voxels is missing from the weight's gradient": (
        "wgrad.cu",
        "wgrad.cu",
        "first += kShares * 16) {",
        "first += kShares * 32) {",
        _layer,
    ),
    "the gradient's tile is used before it has arrived": (
        "wgrad.cu",
        "wgrad.cu",
        "        wait_copies<1>();\n",
        "",
        _layer,
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
