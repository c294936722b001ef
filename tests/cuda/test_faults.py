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
    check_sources(cuda, SOURCES["2d"])


def _halo(cuda: Any) -> None:
    check_sources(cuda, SOURCES["2d_several_tiles"])


def _rounded(cuda: Any) -> None:
    check_rounded(cuda, TENSOR_FLOAT["2d"])


def _strided(cuda: Any) -> None:
    # a gradient of four classes of voxels, whose blocks share a counter
    check_layer(cuda, Layer((9, 10), (40, 24), stride=2))


def _several(cuda: Any) -> None:
    # so large that a sample has several blocks of tiles
    check_layer(cuda, Layer((33, 33), (8, 8), batch=1))


def _deep(cuda: Any) -> None:
    check_layer(cuda, Layer((5, 5), (200, 8), dtype=torch.bfloat16))


def _parts(cuda: Any) -> None:
    # so many channels that their weights come part after part
    check_layer(cuda, Layer((9, 10), (72, 40), dtype=torch.bfloat16))


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
        "merge.h",
        "merge_partials.cu",
        "  scratch[t] = sum;\n  barrier();",
        "  scratch[t] = sum;",
        _pointwise,
    ),
    "the last block reads what others may not have written yet": (
        "merge.h",
        "fprop.cu",
        "  fence();\n  barrier();\n  int* last",
        "  barrier();\n  int* last",
        _layer,
    ),
    "a block arrives before all of its threads have written": (
        "merge.h",
        "fprop.cu",
        "  fence();\n  barrier();\n  int* last",
        "  fence();\n  int* last",
        _layer,
    ),
    "the last block may read what it had before the others wrote": (
        "merge.h",
        "dgrad.cu",
        "  const bool found = *last;\n  fence();",
        "  const bool found = *last;",
        _layer,
    ),
    "the first block to be done takes itself for the last": (
        "merge.h",
        "dgrad.cu",
        "static_cast<unsigned>(blocks) - 1;",
        "0;",
        _strided,
    ),
    "the block with the highest number takes itself for the last": (
        "merge.h",
        "fprop.cu",
        "*last = arrive(counter) == static_cast<unsigned>(blocks) - 1;",
        "*last = arrive(counter) < 99 && block_index().x == blocks - 1;",
        _several,
    ),
    "the counters keep what was in their memory": (
        "pack.cu",
        "pack.cu",
        "if (i < p.count) p.counters[i] = 0;",
        "",
        _layer,
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
        "if (number[i] >= 0) store_few<T, kPiece>",
        "store_few<T, kPiece>",
        _layer,
    ),
    "the halo begins one voxel late": (
        "slab.h",
        "fprop.cu",
        "first.w + (in_plane - y * size.w) * step};",
        "first.w + (in_plane - y * size.w) * step + 1};",
        _layer,
    ),
    "the wait for a slab's copies is dropped": (
        "convolve.h",
        "fprop.cu",
        "        wait_copies<0>();\n        barrier();\n        if (pending) {",
        "        barrier();\n        if (pending) {",
        _layer,
    ),
    "a slab is multiplied before all threads have transformed it": (
        "convolve.h",
        "fprop.cu",
        "beside, constants);\n          barrier();",
        "beside, constants);",
        _layer,
    ),
    "the next slab overwrites one that is still multiplied": (
        "convolve.h",
        "fprop.cu",
        "          slot ^= 1;\n        }\n        barrier();",
        "          slot ^= 1;\n        }",
        _deep,
    ),
    "the weights of the next part overwrite those that are multiplied": (
        "convolve.h",
        "fprop.cu",
        "              wait_copies<0>();\n              barrier();",
        "              wait_copies<0>();",
        _parts,
    ),
    "the wait for the weights of a part is dropped": (
        "convolve.h",
        "fprop.cu",
        "              wait_copies<0>();\n              barrier();",
        "              barrier();",
        _parts,
    ),
    "what lies beside the products is a row off": (
        "backward_epilogue.h",
        "dgrad.cu",
        "load_anew(beside + i * pitch, few.w);",
        "load_anew(beside + (i & ~1) * pitch, few.w);",
        _layer,
    ),
    "what lies beside the products is not waited for": (
        "convolve.h",
        "dgrad.cu",
        "      Epilogue::wait();\n",
        "",
        _layer,
    ),
    "a tile reads the voxels of the one before": (
        "convolve.h",
        "fprop.cu",
        "if (tile + 1 < last) find(tile + 1);",
        "",
        _halo,
    ),
    "the sums of a tile replace those of the tiles before": (
        "wgrad.cu",
        "wgrad.cu",
        "start ? 0.0f : sum + state",
        "start ? 0.0f : 0 * sum + state",
        _halo,
    ),
    "the products of two halves of a tile meet": (
        "convolve.h",
        "dgrad.cu",
        "        warp_barrier();\n        products.next_half",
        "        products.next_half",
        _layer,
    ),
    "a row of products is left out of the moments": (
        "affine.h",
        "fprop.cu",
        "const float d = number[i / kV] >= 0 ?",
        "const float d = number[i / kV] > 0 ?",
        _layer,
    ),
    "the parity of a strided gradient is off": (
        "extents.h",
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
    "the gradient of the moments is left out of the halo": (
        "operands.h",
        "dgrad.cu",
        "        through_moments<kW>(rows, act, y, e, at_slope);",
        "        if (number[0] > 18) through_moments<kW>(rows, act, y, e, at_slope);",
        _halo,
    ),
    "what other consumers gave is overwritten": (
        "backward_epilogue.h",
        "dgrad.cu",
        "dv[i * kPair + j] += few[j];",
        "dv[i * kPair + j] += 0 * few[j];",
        _sources,
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
        "      wait_copies<0>();\n      barrier();\n      if (pending) Input",
        "      barrier();\n      if (pending) Input",
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
    # compiling a file takes longer than what runs of it
    build = {"flags": ("-O0",), "csrc": tmp_path / "csrc", "objects": others}
    extension = emulated.load(emulated.build(tmp_path / "build", **build))
    with emulated.installed(extension) as cuda, pytest.MonkeyPatch.context() as patch:
        # the fault is in none of Triton's kernels, which take long
        patch.setattr(cuda, "_TRITON", False)
        for seed in (0, 7):
            extension.set_seed(seed)
            try:
                check(cuda)
            except (AssertionError, RuntimeError):
                return
    pytest.fail("nothing noticed it")
