"""The emulation of sm_90a: small kernels give the right numbers, and the same with a mistake are found out."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.counted.emulation import FLAGS
from tests.support import emulated
from tests.support.emulated import ORDERS, ROOT, SANITIZE, alone, build_folder

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="needs a C++ compiler")

SOURCES = (ROOT / "tests/cuda/sm90_emulation.cpp", *sorted((ROOT / "csrc/emulation").glob("*.cpp")))
BARRIERS = r"the mbarrier at \d+ \(parity \d; its phase \d+ misses {} arrivals and {} bytes\)"

CASES = {
    # what the kernel does, and what its launch says
    "convolution_bfloat16": "right",
    "convolution_float16": "right",
    "gradient_bfloat16_64": "right",
    "gradient_bfloat16_32": "right",
    "gradient_float16_32": "right",
    "swizzle": "right",
    "special_numbers": "right",
    "pipeline": "right",
    "pipeline_polls": "right",
    "bulk_copy": "right",
    "registers": "right",
    "ended_threads": "right",
    "device": "right",
    # products
    "no_fence": "wrong numbers",
    "unwritten_operand": "NaN",
    "no_begin": "wgmma: no products_begin in front of a product",
    "no_commit": "wgmma: products were not committed",
    "no_wait": "wgmma: products were never waited for",
    "early_release": "wgmma: an operand in shared memory changed before the product was done",
    "touched": "wgmma: an accumulator was written before the product was done",
    "read_too_early": "NaN",
    "lanes_disagree": "wgmma: the lanes of a warp do not agree on a product",
    "outside": "wgmma: an operand is not inside shared memory",
    # mbarriers and bulk copies
    "no_arrival": "deadlock: warps 0-3 wait for "
    + BARRIERS.format("1 of 128", 0)
    + "; warps 4-7 wait for "
    + BARRIERS.format("129 of 129", 0),
    "wrong_parity": "wrong numbers|deadlock: .*|wgmma: .*|a bulk copy .*",
    "too_many_arrivals": r"more than 1 arrivals at the mbarrier at 0 in phase 0",
    "polls_for_ever": "deadlock: .* polls? " + BARRIERS.format("129 of 129", 0) + ".*",
    "not_initialised": "mbarrier_arrive: no mbarrier was initialised at 8",
    "initialised_twice": "mbarrier_init: twice at 0",
    "no_barrier_behind_initialisation": "mbarrier_wait: no barrier follows the initialisation of .*",
    "bulk_copy_not_waited_for": "a bulk copy was never waited for",
    "bulk_copies_run_over": "bytes came to the mbarrier at 0 twice, and no thread waited .*",
    "bulk_copy_announced_too_long": "deadlock: warps 0-1 wait for " + BARRIERS.format("0 of 1", 16),
    "bulk_copy_misaligned": "copy_bulk: misaligned address or size",
    "bulk_copy_to_unfenced_mbarrier": "copy_bulk: no fence_async follows .*",
    # parts of a block
    "registers_beyond": "deadlock: warps? .* waits? for registers: 240 for each thread .*",
    "registers_of_two_warps": "registers: the warps of warpgroup 0 come to different calls",
    "registers_taken_but_fewer": "registers: 248 cannot be increased to 128",
    "no_warp_at_barrier": r"deadlock: warps 4-5 wait for barrier 2 \(32 of 128 threads missing\); .*",
    "part_of_a_warp": "barrier_of: a part of a warp comes to barrier 1",
    "two_counts": "barrier_of: barrier 1 has 96 threads for some and 64 for others",
    "not_uniform": "uniform: the lanes of a warp do not agree",
    "no_fence_in_front_of_arrival": "arrive: the thread has not come to a fence",
    "first_fence_behind_arrival": "a thread comes to its first fence behind an arrival",
}


def _built(folder: Path, flags: tuple[str, ...]) -> Path:
    with alone(folder):
        program = folder / "sm90_emulation"
        if not program.exists():
            command = [str(emulated.compiler()), *FLAGS, *flags, f"-I{ROOT / 'csrc'}"]
            made = folder / "part"
            done = subprocess.run(
                [*command, *map(str, SOURCES), "-o", str(made)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[:2000]
            made.rename(program)
        return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _built(build_folder(tmp_path_factory) / "sm90", ("-O1",))


def _said(program: Path, *arguments: object) -> str:
    command = [str(program), *map(str, arguments)]
    # what a kernel with a mistake leaves on its fibers' stacks is not freed
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[:2000]
    return done.stdout.strip()


def _matches(case: str, said: str) -> None:
    assert re.fullmatch(CASES[case], said), said


def test_every_case_is_expected_something(program: Path) -> None:
    assert set(_said(program).split()) == set(CASES)


@pytest.mark.parametrize("seed", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_what_a_launch_says(program: Path, case: str, seed: int) -> None:
    _matches(case, _said(program, case, seed))


@pytest.mark.parametrize("case", ["pipeline", "early_release", "no_fence", "wrong_parity"])
def test_no_order_hides_a_mistake(program: Path, case: str) -> None:
    for seed in range(1, 25):
        _matches(case, _said(program, case, seed))


@pytest.mark.parametrize("seed", ORDERS)
def test_the_emulation_is_clean_under_the_sanitizers(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    sanitized = _built(build_folder(tmp_path_factory) / "sm90_sanitized", ("-O1", *SANITIZE))
    for case, said in CASES.items():
        if said == "right":
            _matches(case, _said(sanitized, case, seed))
