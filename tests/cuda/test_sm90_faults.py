"""Mistakes planted in the kernels of warpgroup products: the emulation must catch each of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import test_faults
from tests.cuda.test_convolution import Layer, check_layer
from tests.cuda.test_sources import Call, Part, check_sources
from tests.support.emulated import library, sm90_device

__all__ = ["library"]

pytestmark = test_faults.pytestmark


def _layer(*sizes: Any, **options: Any) -> Callable[[Any], None]:
    def check(cuda: Any) -> None:
        with sm90_device():
            check_layer(cuda, Layer(*sizes, **options))

    return check


def _moments(cuda: Any) -> None:
    call = Call((20, 35), (Part(24, (20, 35)), Part(8, (20, 35), act="gelu")), 40, torch.float16)
    with sm90_device():
        check_sources(cuda, call)


def _samples(cuda: Any) -> None:
    # tiles of several samples in a block, each with constants of its own
    with sm90_device(multiprocessors=1):
        check_layer(cuda, Layer((6, 7), (64, 24), batch=6))


_several = _layer((35, 37), (40, 40), batch=1)
# x comes while the products of the group before it are written
_linear = _layer((35, 37), (40, 40), batch=1, act="leaky_relu")
# so many channels that planes, and weights, take turns in their rooms
_deep = _layer((9, 8), (256, 64), batch=1)
_wide = _layer((9, 8), (64, 256), batch=1)
_volume = _layer((4, 9, 10), (24, 40), dtype=torch.float16)
_one = _layer((35, 37), (40, 40), kernel=1, batch=1)
# rows of the output share a product
_shared = _layer((35, 20), (16, 16), batch=1)

FORWARD, BACKWARD, WEIGHT = (f"sm90/{name}.cu" for name in ("forward", "backward", "weight"))
BRING = "sm90/convolve.h", FORWARD
GATHER = "sm90/convolve.h", BACKWARD

FAULTS: dict[str, tuple[str, str, str, str, Callable[[Any], None]]] = {
    # name: file, kernels that see it, right, wrong, check
    "a lane writes voxels that the others have not staged yet": (
        "sm90/forward.cu",
        FORWARD,
        "row + line * Staging::kLine);\n      }\n      warp_barrier();",
        "row + line * Staging::kLine);\n      }",
        _several,
    ),
    "voxels are staged where others have not been written yet": (
        "sm90/forward.cu",
        FORWARD,
        "        }\n      }\n      warp_barrier();\n    }\n  }\n",
        "        }\n      }\n    }\n  }\n",
        _several,
    ),
    "x is read before the other lanes' copies have come": (
        "sm90/backward.cu",
        BACKWARD,
        "wait_copies<kAhead - 1>();\n        warp_barrier();",
        "wait_copies<kAhead - 1>();",
        _linear,
    ),
    "the gradient is staged while other lanes read x": (
        "sm90/backward.cu",
        BACKWARD,
        "        warp_barrier();\n#pragma unroll\n        for (int line",
        "#pragma unroll\n        for (int line",
        _linear,
    ),
    "the gradient is written before the other lanes have staged it": (
        "sm90/backward.cu",
        BACKWARD,
        "row + line * Staging::kLine);\n        }\n        warp_barrier();",
        "row + line * Staging::kLine);\n        }",
        _several,
    ),
    "a plane is full before it is fenced": (
        *BRING,
        "      fence_async();\n      mbarrier_arrive(plane_full(layout, slot));",
        "      mbarrier_arrive(plane_full(layout, slot));",
        _several,
    ),
    "bulk copies come to mbarriers that are not fenced": (
        *BRING,
        "      fence_async();\n    }\n    barrier();",
        "    }\n    barrier();",
        _several,
    ),
    "no barrier follows the initialisation of the mbarriers": (
        *BRING,
        "    barrier();\n    const int warpgroup",
        "    const int warpgroup",
        _several,
    ),
    "a group of products has no beginning": (
        *BRING,
        """                  products_begin();
                  multiply_async(sums[0], weights, one, T{});
                  multiply_async(sums[1], weights, one + half, T{});
                  multiply_async(sums[0], weights + kSliceBytes""",
        """                  multiply_async(sums[0], weights, one, T{});
                  multiply_async(sums[1], weights, one + half, T{});
                  multiply_async(sums[0], weights + kSliceBytes""",
        _several,
    ),
    "a group of products is never closed": (
        *BRING,
        "two + half, T{});\n                  products_commit();",
        "two + half, T{});",
        _several,
    ),
    "the last products of a unit are not waited for": (
        *BRING,
        "      products_wait<0>();\n      release_done();",
        "      release_done();",
        _several,
    ),
    "rooms are empty while the products before the last ones run": (
        *BRING,
        "                products_wait<1>();\n",
        "",
        _deep,
    ),
    "a plane is released while its last products run": (
        *BRING,
        "if (left == 0) plane_done = plane.index;",
        "if (left == 0) release(plane_empty(layout, plane.index));",
        _deep,
    ),
    "planes are never released": (
        *BRING,
        "if (plane_done >= 0) release(plane_empty(layout, plane_done));",
        "",
        _deep,
    ),
    "weights are released while their last products run": (
        *GATHER,
        "stage_done = stage.index;",
        "if (!layout.resident) release(stage_empty(layout, stage.index));",
        _wide,
    ),
    "weights are never released": (
        *GATHER,
        "if (stage_done >= 0 && !layout.resident) release(stage_empty(layout, stage_done));",
        "",
        _wide,
    ),
    "the planes that a depth skips are not released": (
        *BRING,
        "release(plane_empty(layout, plane.index));\n              continue;",
        "continue;",
        _volume,
    ),
    "a plane is full once half of the threads have brought theirs": (
        *BRING,
        "mbarrier_init(plane_full(layout, i), kWarpgroup);",
        "mbarrier_init(plane_full(layout, i), kWarpgroup / 2);",
        _several,
    ),
    "a plane is empty once one warpgroup has read it": (
        *BRING,
        "mbarrier_init(plane_empty(layout, i), kConsumers / 32);",
        "mbarrier_init(plane_empty(layout, i), kWarpgroup / 32);",
        _deep,
    ),
    "weights are done once one warpgroup has read them": (
        *GATHER,
        "mbarrier_init(stage_empty(layout, i), kConsumers / 32);",
        "mbarrier_init(stage_empty(layout, i), kWarpgroup / 32);",
        _wide,
    ),
    "the first room that is used again is not waited for": (
        *BRING,
        "if (number >= layout.slots) {",
        "if (number > layout.slots) {",
        _deep,
    ),
    "the parity of a room's phases stays the same": (
        *BRING,
        "        parity ^= 1;\n",
        "",
        _deep,
    ),
    "the parity of the weights' empty room is that of the phase before": (
        *GATHER,
        "mbarrier_test(stage_empty(p, s.stage), s.parity ^ 1)",
        "mbarrier_test(stage_empty(p, s.stage), s.parity)",
        _wide,
    ),
    "the parity of a full plane is that of the phase before": (
        *BRING,
        "mbarrier_wait(plane_full(layout, plane.index), plane.parity);",
        "mbarrier_wait(plane_full(layout, plane.index), plane.parity ^ 1);",
        _several,
    ),
    "the weights' arrival is not waited for": (
        *BRING,
        "mbarrier_wait(stage_full(layout, stage.index), stage.parity);",
        "",
        _several,
    ),
    "stages that are not full are announced as full ones": (
        *BRING,
        "mbarrier_expect(full, count * kSliceBytes);",
        "mbarrier_expect(full, p.stage_slices * kSliceBytes);",
        _layer((9, 10), (24, 40), kernel=1),
    ),
    "one slice fewer is announced than comes": (
        *BRING,
        "mbarrier_expect(full, count * kSliceBytes);",
        "mbarrier_expect(full, (count - 1) * kSliceBytes);",
        _several,
    ),
    "what lies beside a plane has one buffer": (
        *GATHER,
        "layout.beside_at + (number & 1) * layout.slab_bytes",
        "layout.beside_at",
        _moments,
    ),
    "copies of a plane are not met by all threads that bring it": (
        *BRING,
        "            wait_copies<0>();\n            barrier_of<1, kWarpgroup>();\n",
        "            wait_copies<0>();\n",
        _several,
    ),
    "copies of a plane are not waited for": (
        *BRING,
        "            wait_copies<0>();\n            barrier_of<1, kWarpgroup>();\n",
        "            barrier_of<1, kWarpgroup>();\n",
        _several,
    ),
    "copies of the last plane are not waited for": (
        *BRING,
        "      wait_copies<0>();\n      barrier_of<1, kWarpgroup>();\n",
        "      barrier_of<1, kWarpgroup>();\n",
        _several,
    ),
    "the warpgroup that brings keeps its registers": (
        *BRING,
        "      give_registers<kBringRegisters>();\n",
        "",
        _several,
    ),
    "core matrices of the rows that share a product are those of one row": (
        *BRING,
        "pitch * layout.shifts * 16)",
        "pitch * 16)",
        _shared,
    ),
    "the second half of the products is the first one": (
        FORWARD,
        FORWARD,
        "if (h == 0) next_half(sums);",
        "",
        _several,
    ),
    "the groups of a half are the first one": (
        BACKWARD,
        BACKWARD,
        "stage<T>(sums, line, row",
        "stage<T>(sums, line % kGroupLines, row",
        _several,
    ),
    "the groups of a half under any activation are the first one": (
        BACKWARD,
        BACKWARD,
        "      next_group(sums);\n",
        "",
        _moments,
    ),
    "x of a half under any activation is not waited for": (
        BACKWARD,
        BACKWARD,
        "    wait_copies<0>();\n    warp_barrier();\n",
        "    warp_barrier();\n",
        _moments,
    ),
    "x of a group is not waited for": (
        BACKWARD,
        BACKWARD,
        "        wait_copies<kAhead - 1>();\n",
        "",
        _linear,
    ),
    "rows that share a product have each other's taps": (
        "pack.cu",
        "pack.cu",
        "const bool present = line >= 0 && line < reads.count.h;",
        "const bool present = true;",
        _shared,
    ),
    # the gradient at the weight
    "planes of a tile are read before they are fenced": (
        WEIGHT,
        WEIGHT,
        "      fence_async();\n",
        "",
        _several,
    ),
    "products of a tile are not waited for": (
        WEIGHT,
        WEIGHT,
        "      products_wait<0>();\n",
        "",
        _several,
    ),
    "products are waited for behind the barrier": (
        WEIGHT,
        WEIGHT,
        "      products_wait<0>();\n      wait_copies<0>();\n      barrier();\n",
        "      wait_copies<0>();\n      barrier();\n      products_wait<0>();\n",
        _several,
    ),
    "copies of a tile are not waited for": (
        WEIGHT,
        WEIGHT,
        "      wait_copies<0>();\n",
        "",
        _several,
    ),
    "copies of a tile are waited for behind the barrier": (
        WEIGHT,
        WEIGHT,
        "      wait_copies<0>();\n      barrier();\n",
        "      barrier();\n      wait_copies<0>();\n",
        _several,
    ),
    "copies of a tile are never closed": (
        WEIGHT,
        WEIGHT,
        "      commit_copies();\n",
        "",
        _several,
    ),
    "no barrier stands between two tiles": (
        WEIGHT,
        WEIGHT,
        "      wait_copies<0>();\n      barrier();\n",
        "      wait_copies<0>();\n",
        _several,
    ),
    "a row of products has no beginning": (
        WEIGHT,
        WEIGHT,
        "      products_begin();\n#pragma unroll\n",
        "#pragma unroll\n",
        _several,
    ),
    "a row of products is never closed": (
        WEIGHT,
        WEIGHT,
        "here + shifts[t], T{});\n      products_commit();\n",
        "here + shifts[t], T{});\n",
        _several,
    ),
    "products of a kernel of 1 have no beginning": (
        WEIGHT,
        WEIGHT,
        "        products_begin();\n        multiply",
        "        multiply",
        _one,
    ),
    "products of a kernel of 1 are never closed": (
        WEIGHT,
        WEIGHT,
        "T{});\n        products_commit();\n",
        "T{});\n",
        _one,
    ),
    "a tile comes to where products read": (
        WEIGHT,
        WEIGHT,
        "const int at = slab(layout, turn);\n    Input::load",
        "const int at = slab(layout, (turn + 1) % kTurns);\n    Input::load",
        _several,
    ),
    "numbers of a tile are written where those of another are read": (
        WEIGHT,
        WEIGHT,
        "find(layout, share, tile + 3, turn, after(turn, 2));",
        "find(layout, share, tile + 3, after(turn, 1), after(turn, 2));",
        _several,
    ),
    "the place of a tile is that of the one before the last": (
        WEIGHT,
        WEIGHT,
        "find(layout, share, tile + 3, turn, after(turn, 2));",
        "find(layout, share, tile + 3, turn, after(turn, 1));",
        _several,
    ),
    "what lies beside a tile has one buffer": (
        WEIGHT,
        WEIGHT,
        "p.beside_at + (tile & 1) * p.gradient_bytes",
        "p.beside_at",
        _moments,
    ),
    "constants of a sample replace those of the one before": (
        WEIGHT,
        WEIGHT,
        "p.constants_at + static_cast<int>(n & 1) * p.constant_bytes",
        "p.constants_at",
        _samples,
    ),
    "a sample's constants are those of the first one": (
        WEIGHT,
        WEIGHT,
        "if (tile == share.first || n != sample(layout, before)) {",
        "if (tile == share.first) {",
        _samples,
    ),
    "sums of the gradient begin with what was there": (
        WEIGHT,
        WEIGHT,
        "i < 2 * kPieceChannels; ++i) held(layout)",
        "i < 1; ++i) held(layout)",
        _moments,
    ),
    "eight voxels of a line are those of the line before": (
        WEIGHT,
        WEIGHT,
        "descriptor(at, pitch * 16, layout.chunk_bytes)",
        "descriptor(at, layout.tile.w * 16, layout.chunk_bytes)",
        _several,
    ),
    "eight voxels of a line of the gradient are those of the input's": (
        WEIGHT,
        WEIGHT,
        "descriptor(at + layout.plane_bytes, layout.tile.w * 16,",
        "descriptor(at + layout.plane_bytes, pitch * 16,",
        _several,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(
    fault: str, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_faults, "FAULTS", FAULTS)
    test_faults.test_a_planted_fault_is_caught(fault, library, tmp_path)
