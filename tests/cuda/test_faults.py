"""Mistakes planted in the CUDA kernels: the emulation must catch each of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import test_emulated
from tests.cuda.test_convolution import TENSOR_FLOAT, Layer, check_layer, check_rounded
from tests.cuda.test_emulated import check_pointwise
from tests.cuda.test_sources import SOURCES, check_sources
from tests.support import emulated
from tests.support.emulated import library

__all__ = ["library"]

pytestmark = test_emulated.pytestmark


def _pointwise(cuda: Any) -> None:
    check_pointwise(cuda, (2, 12, 11, 9), torch.float32, "silu")


def _layer(cuda: Any) -> None:
    check_layer(cuda, Layer((13, 34), (24, 16), dtype=torch.float16))


def _sources(cuda: Any) -> None:
    check_sources(cuda, SOURCES["2d"], joint=False)


def _halo(cuda: Any) -> None:
    check_sources(cuda, SOURCES["2d_joint"], joint=False)  # of several tiles


def _joint(cuda: Any) -> None:
    check_sources(cuda, SOURCES["2d_joint"], joint=True)


def _rounded(cuda: Any) -> None:
    check_rounded(cuda, TENSOR_FLOAT["2d"])


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
    "a barrier of the merge of partial results is dropped": (
        "merge_partials.cu",
        "merge_partials.cu",
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
        "operands.h",
        "fprop.cu",
        "      if (!in_map && !view) return;\n",
        "",
        _layer,
    ),
    "the halo begins one voxel late": (
        "slab.h",
        "fprop.cu",
        "first.w + x * step};",
        "first.w + x * step + 1};",
        _layer,
    ),
    "the wait for a slab's copies is dropped": (
        "convolve.h",
        "fprop.cu",
        "          wait_copies<1>();\n",
        "",
        _layer,
    ),
    "a slab is multiplied before all threads have transformed it": (
        "convolve.h",
        "fprop.cu",
        "        }\n        barrier();\n        if constexpr",
        "        }\n        if constexpr",
        _layer,
    ),
    "the next slab overwrites one that is still multiplied": (
        "convolve.h",
        "fprop.cu",
        "        barrier();\n        slot ^= 1;",
        "        slot ^= 1;",
        _deep,
    ),
    "the products of two halves of a tile meet": (
        "convolve.h",
        "dgrad.cu",
        "values, state);\n      }\n      barrier();",
        "values, state);\n      }",
        _layer,
    ),
    "a row of products is left out of the moments": (
        "fprop.cu",
        "fprop.cu",
        "      state.add(u);",
        "      if (voxel.number > 0) state.add(u);",
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
        "first += kShares * kStep) {",
        "first += kShares * 2 * kStep) {",
        _layer,
    ),
    "a window of the pooled map is shifted": (
        "operands.h",
        "fprop.cu",
        "const int ix = voxel.w * view.axis[2].taps + x;",
        "const int ix = voxel.w * view.axis[2].taps;",
        _sources,
    ),
    "the gradient of the moments is left out of the halo": (
        "operands.h",
        "dgrad.cu",
        "            e[i] += du * slope_z;",
        "            if (v > box.size.w) e[i] += du * slope_z;",
        _halo,
    ),
    "the gradient of a maximum goes to its last window's voxel": (
        "backward_epilogue.h",
        "dgrad.cu",
        "dx[i] = owner[i] == here ? dv[i] : 0.0f;",
        "dx[i] = here == 0 ? dv[i] : 0.0f;",
        _sources,
    ),
    "what other consumers gave is overwritten": (
        "backward_epilogue.h",
        "dgrad.cu",
        "dx[i] += before[i];",
        "dx[i] += 0 * before[i];",
        _sources,
    ),
    "the halo is summed too": (
        "both_gradients.cu",
        "both_gradients.cu",
        "if (state && own)",
        "if (state)",
        _joint,
    ),
    "the taps of the joint gradient run the wrong way": (
        "both_gradients.cu",
        "both_gradients.cu",
        "(taps - 1 - t)",
        "t",
        _joint,
    ),
    "the tile of a joint gradient is multiplied before it is whole": (
        "convolve.h",
        "both_gradients.cu",
        "        }\n        barrier();\n        if constexpr",
        "        }\n        if constexpr",
        _joint,
    ),
    "the operands of rounded products are cut off": (
        "primitives.h",
        "fprop.cu",
        "? round_to_tf32(word) : word",
        "? word : word",
        _rounded,
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
