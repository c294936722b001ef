"""Kernels of warpgroups without a GPU: parts and faults of their code, a simulated block, predictions."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.campaign import probes
from benchmarks.counted.deciding_layers import SUBJECTS
from benchmarks.counted.machine_code import (
    clock_table,
    cuda_binaries,
    sass,
    warpgroup_block,
    warpgroup_clocks,
    warpgroup_loops,
)
from benchmarks.counted.machine_code.clock_model import CONSTANTS, Prediction, Shape
from benchmarks.counted.machine_code.kernel_loops import name_of
from benchmarks.counted.machine_code.warpgroup_block import Block, Gate, Tile, Timeline, Work
from benchmarks.counted.machine_code.warpgroup_loops import NOTHING, Turn, Warpgroups
from benchmarks.suites import gate
from tests.benchmarks.test_clock_model import listing

ROOT = Path(__file__).parents[2]
PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24"
LAST = f"{PRODUCT}, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
USAGE = {"REG": 168, "STACK": 0, "LOCAL": 0}

Line = str | tuple[str, int, int, int]
Lines = Sequence[Line]
"""As `listing` takes them."""

MAIN = ["WARPGROUP.ARRIVE", PRODUCT, PRODUCT, PRODUCT, LAST, WAIT]
EPILOGUE = [
    "STSM.16.MT88.4 [R2], R4",
    "STSM.16.MT88.4 [R2], R4",
    *["FADD R4, R4, R5"] * 64,
    *["LDS.128 R4, [R2]", "STG.E.128 desc[UR4][R2.64], R4"] * 2,
]
COPIES = ["LDS R4, [R2]", "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]"] * 4
TRANSFORM = [
    *["LDS.64 R4, [R2]"] * 4,
    *["FFMA R4, R4, R5, R6"] * 16,
    *["STS.64 [R2], R4"] * 4,
]


def nested(*parts: Lines | str, first: int = 0) -> list[Line]:
    """Instructions from number ``first`` on: a text is one, a list a loop of its own."""
    found: list[Line] = []
    for part in parts:
        if isinstance(part, str):
            found.append(part)
        else:
            found += [*part, f"@P0 BRA {16 * (first + len(found)):#x}"]
    return found


def kernel(
    main: Lines = MAIN,
    epilogue: Lines = EPILOGUE,
    copies: Lines = COPIES,
    transform: Lines = TRANSFORM,
    around: Lines = (),
    more: Sequence[Lines] = (),
    taken: Lines = ("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xc0",),
) -> list[str]:
    """The listing of a kernel: a nest that multiplies, ``around`` beside its main loop, and one that brings."""
    code: list[Line] = ["USETMAXREG.DEALLOC.CTAPOOL 0x78", *taken]
    unit = len(code)
    # a unit, a plane and the main loop in it
    code += ["MOV R1, R2", "MOV R1, R3"]
    plane = unit + 1
    code += nested(main, first=len(code))
    code += [*around, f"@P1 BRA {16 * plane:#x}"]
    code += nested(epilogue, first=len(code))
    code += [f"@P1 BRA {16 * unit:#x}"]
    plane = len(code)
    code += ["MOV R1, R2"]
    code += nested(["STS [R2], R4"], first=len(code))
    for loop in (copies, *more):
        code += nested(loop, first=len(code))
    code += nested("LDGDEPBAR", transform, first=len(code))
    code += [f"@P1 BRA {16 * plane:#x}", "EXIT"]
    return listing(code)


def without_roles() -> list[str]:
    """The listing of a kernel whose only nest multiplies and brings."""
    code: list[Line] = ["MOV R1, R2", "MOV R1, R3"]
    gradient = [*["LDS.64 R8, [R3]"] * 4, *TRANSFORM]
    loops = (MAIN[:-1], ["STS [R2], R4"], COPIES, COPIES * 2, "LDGDEPBAR", TRANSFORM, gradient)
    code += nested(*loops, first=len(code))
    return listing([*code, "BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 BRA 0x10", "EXIT"])


def parts(lines: Sequence[str]) -> Warpgroups:
    return Warpgroups(sass.Function(sass.parse(lines)), 168, CONSTANTS)


def test_parts_are_recognised_by_what_they_do() -> None:
    found = parts(kernel())
    assert found.group_products == 4 and found.group.issue == len(MAIN) + 1
    ((copy, chunks),) = found.copies()
    assert (copy.issue, chunks, copy.shared) == (len(COPIES) + 1, 4, 4 * (16 + 4))
    turn, voxels = found.transform("input")
    assert voxels == 4 and turn.issue == len(TRANSFORM) + 1 + 16 * CONSTANTS["activation"]
    epilogue, turns = found.epilogue
    assert turns == 8 and epilogue.issue == len(EPILOGUE) + 1 + 16 * CONSTANTS["activation"]
    assert found.find.issue == 2
    assert found.ahead == NOTHING


def test_a_kernel_without_roles_brings_in_the_loop_of_its_products() -> None:
    found = parts(without_roles())
    assert found.planes is found.units
    assert [chunks for _, chunks in found.copies()] == [4, 8]
    assert found.transform("input")[0].issue < found.transform("gradient")[0].issue
    # the header, what closes the copies, the barrier and the branch
    assert found.tile(summing=False).issue == 4
    assert faults(without_roles(), "sm90_wgrad") == []
    assert "registers are not taken" in faults(without_roles(), "sm90_fprop")


def test_a_transform_that_loads_twice_is_that_of_a_gradient() -> None:
    found = parts(kernel(transform=[*TRANSFORM, *["LDS.64 R8, [R3]"] * 4]))
    turn, voxels = found.transform("gradient")
    assert (voxels, turn.shared) == (4, 3 * 4 * 8)
    with pytest.raises(ValueError, match="transforms the input"):
        found.transform("input")


def test_an_epilogue_is_counted_without_what_is_rarely_wanted() -> None:
    """Halves that are written whole are two turns; exponentials and older gradients are on another way."""
    whole = parts(kernel(epilogue=EPILOGUE * 4))
    assert whole.epilogue[1] == 2
    at = EPILOGUE.index("FADD R4, R4, R5")
    begin = 2 + 2 + len(MAIN) + 1 + 1 + at  # of the place where the ways part
    rare = [*["FRND R4, R5"] * 3, "LDG.E.128 R4, desc[UR4][R2.64]"]
    target = 16 * (begin + 1 + len(rare))
    parted = [*EPILOGUE[:at], f"@P2 BRA {target:#x}", *rare, *EPILOGUE[at:]]
    turn, _ = parts(kernel(epilogue=parted)).epilogue
    assert turn.issue == len(EPILOGUE) + 2 + 16 * CONSTANTS["activation"]


def faults(
    lines: list[str], name: str = "sm90_fprop", usage: Mapping[str, int] | None = None
) -> list[str]:
    function = sass.Function(sass.parse(lines))
    return warpgroup_loops.faults(name, lines, function, USAGE | dict(usage or {}))


def test_a_kernel_as_it_should_be_has_no_fault() -> None:
    assert faults(kernel()) == []
    assert faults(kernel(), "sm90_wgrad", {"REG": 128}) == []


@pytest.mark.parametrize(
    ("lines", "usage", "said"),
    [
        (kernel(taken=()), {}, "registers are not taken"),
        (kernel(main=[*MAIN, "LDG.E R4, desc[UR4][R2.64]"]), {}, "load from global memory"),
        (kernel(main=[*MAIN, "LDL R4, [R1]"]), {}, "local memory in the loops of the products"),
        (kernel(around=["STL [R1], R4"]), {}, "local memory in the loops of the products"),
        (kernel(main=[*MAIN[:-1], WAIT.replace("0x1", "0x0")]), {}, "waits for all products"),
        (kernel(main=[*MAIN, WAIT]), {}, "2 waits for 1 groups"),
        (kernel(main=["NOP"]), {}, "no HGMMA"),
        (kernel(around=["HMMA.16816.F32.BF16 R8, R4, R6, R8"]), {}, "HMMA beside HGMMA"),
        (kernel(), {"REG": 176}, "176 of 168 registers"),
        (kernel(), {"STACK": 8}, "spills 8 B"),
    ],
)
def test_what_may_not_be_in_a_kernel_is_named(
    lines: list[str], usage: dict[str, int], said: str
) -> None:
    found = faults(lines, usage=usage)
    assert any(said in f for f in found), found


@pytest.mark.parametrize(
    ("mangled", "found"),
    [
        (
            "_ZN8fastfilm4cuda5entryINS0_4sm9041_GLOBAL__N__f5_9_weight_cu_25WgradINS0_8BFloat16ELi64EEEEEv",
            ("sm90_wgrad", "bf16", (64, 64)),
        ),
        (
            "_ZN8fastfilm4cuda5entryINS0_4sm908ConvolveINS0_7Float16ENS2_15ActivatedPlanesENS2_43_GLOBAL__N_",
            ("sm90_fprop", "fp16", None),
        ),
        (
            "_ZN8fastfilm4cuda5entryINS0_4sm908ConvolveINS0_8BFloat16ENS2_14GradientPlanesE16BackwardEpilogueE",
            ("sm90_dgrad", "bf16", None),
        ),
        (
            "_ZN8fastfilm4cuda5entryINS0_44_GLOBAL__N__ff_7_pack_cu_c0_67197PrepareINS0_8BFloat16ENS0_4sm906Layout",
            ("Prepare of warpgroups", "bf16", None),
        ),
        (
            "_ZN8fastfilm4cuda5entryINS0_50_GLOBAL__N__09_17_merge_partials_cu_0e7SumRowsEEEvNT_6ParamsE",
            ("SumRows", "fp32", None),
        ),
    ],
)
def test_kernels_have_names_without_hashes(
    mangled: str, found: tuple[str, str, tuple[int, int] | None]
) -> None:
    assert name_of(mangled) == found


def test_a_gate_opens_with_its_last_arrival() -> None:
    time, passed = Timeline(), list[float]()
    two = Gate(2)

    def waits() -> warpgroup_block.Process:
        yield two
        passed.append(time.now)
        yield time.now + 5
        passed.append(time.now)

    time.at(0.0, waits())
    time.at(10.0, two)
    time.at(30.0, two)
    assert time.run() == 35
    assert passed == [30, 35]


def work(**changes: Any) -> Work:
    """Two warpgroups, a plane each, ten slices of 128 clocks; all else takes nothing."""
    plain = Work(
        planes=(((True, False), 10), ((False, True), 10)),
        around=NOTHING,
        table=NOTHING,
        copy=NOTHING,
        copy_bytes=0.0,
        transform=NOTHING,
        slice=128.0,
        slice_bytes=0.0,
        group=Turn(0, 40),
        group_slices=2,
        epilogue=NOTHING,
        turns=1,
        ahead=NOTHING,
        slots=4,
    )
    return replace(plain, **changes)


UNITS = 40


def test_products_of_both_warpgroups_fill_the_tensor_cores() -> None:
    clocks = Block(work(), UNITS).run()
    assert clocks == pytest.approx(UNITS * 2 * 1280, rel=0.05)


def test_an_epilogue_hides_behind_the_products_of_the_other() -> None:
    short, long = (Block(work(epilogue=Turn(0, n)), UNITS).run() for n in (1000, 4000))
    assert short == pytest.approx(UNITS * 2 * 1280, rel=0.1)
    assert long == pytest.approx(UNITS * (1280 + 4000), rel=0.15)


def test_a_slow_transform_is_what_the_others_wait_for() -> None:
    block = Block(work(transform=Turn(0, 3000)), UNITS)
    assert block.run() == pytest.approx(UNITS * 2 * (3000 + CONSTANTS["barrier"]), rel=0.1)
    assert block.spent[warpgroup_block.PLANE] > 0.5 * UNITS * 6000
    fast = Block(work(), UNITS)
    fast.run()
    assert fast.spent[warpgroup_block.ROOM] > fast.spent[warpgroup_block.PLANE]


def test_weights_that_stay_are_never_waited_for_and_streamed_ones_with_few_rooms_are() -> None:
    stay = Block(work(), UNITS).run()
    many, few = (Block(work(rooms=n, room_slices=2), UNITS) for n in (10, 3))
    assert stay <= many.run() < few.run()
    assert few.spent["waits for weights"] > many.spent["waits for weights"]
    assert few.started == many.started == UNITS * 5


def test_depths_that_a_plane_serves_are_multiplied_by_both() -> None:
    planes = tuple(((j < 3, j > 0), 10) for j in range(4))
    block = Block(work(planes=planes, slots=6), UNITS)
    assert block.run() == pytest.approx(UNITS * 6 * 1280, rel=0.05)
    assert block.busy()["tensor"] == UNITS * 6 * 1280


def test_a_block_with_too_few_rooms_hangs_and_says_so() -> None:
    """A plane is delivered once the next one has a room, and its own is empty behind the next products."""
    assert Block(work(slots=3), 3).run() > 0
    with pytest.raises(ValueError, match="never ends"):
        Block(work(slots=2), 3).run()


def test_copies_ahead_of_an_epilogue_are_waited_for_where_it_is_short() -> None:
    def more(clocks: float) -> float:
        """That copies make an epilogue of four turns longer."""
        plain = work(epilogue=Turn(0, clocks), turns=4)
        return Block(replace(plain, ahead=Turn(0, 1)), 1).run() - Block(plain, 1).run()

    assert more(10) == pytest.approx(CONSTANTS["map"], rel=0.1)
    assert more(2000) < 0.01 * CONSTANTS["map"]


def test_instructions_of_other_warps_cost_a_warp_time() -> None:
    busy = work(transform=Turn(500, 2000), epilogue=Turn(1000, 4000))
    alone = Block(busy, UNITS).run()
    assert 1.05 * alone < warpgroup_block.simulated(busy, UNITS)[1] < 1.5 * alone
    full = work(epilogue=Turn(4000, 100))
    assert warpgroup_block.simulated(full, UNITS)[1] >= UNITS * 2 * 4000


def test_what_passes_through_shared_memory_bounds_a_block() -> None:
    heavy = work(slice_bytes=128 * 1000.0)
    assert warpgroup_block.simulated(heavy, UNITS)[1] == pytest.approx(UNITS * 20 * 1000)


def test_a_tile_takes_no_less_than_its_warps_share() -> None:
    long = Tile((("transform", Turn(90, 1500)), ("copies", Turn(10, 500))), 500.0, 0.0)
    assert long.busy() == {"issue": 300, "tensor": 500, "shared memory": 0}
    assert 2000 < long.clocks() < 2020
    full = replace(long, parts=(("transform", Turn(1000, 2000)),))
    assert full.clocks() == 3000
    assert replace(long, tensor=5000.0).clocks() == 5000
    assert replace(long, moved=128 * 6000.0).clocks() == 6000


def facts(name: str, **changes: Any) -> dict[str, Any]:
    plain = {
        "channels": (64, 64),
        "tile": (1, 16, 32),
        "plane": (18, 18),
        "tiles_a_block": 17,
        "groups": 8,
        "resident": True,
        "part": 6,
        "shifts": 1,
        "slots": 4,
        "stages": 6,
    }
    if name == "wgrad":
        plain |= {"tile": (1, 8, 16), "tiles_a_block": 63, "groups": 131}
    return plain | changes


def test_blocks_take_all_units_and_some_of_them_the_sums_of_the_gradient() -> None:
    shape, code = Shape.of(SUBJECTS[0]), parts(kernel())
    voxels = shape.batch * math.prod(shape.size)
    fprop = warpgroup_clocks.Plan(shape, "fprop", facts("fprop"), code)
    assert sum(n * units for n, units, _ in fprop.blocks()) * 512 == voxels
    assert {summing for _, _, summing in fprop.blocks()} == {False}
    wgrad = warpgroup_clocks.Plan(shape, "wgrad", facts("wgrad", channels=(64, 32)), code)
    blocks = wgrad.blocks()
    assert sum(n * units for n, units, _ in blocks) * 128 == 2 * voxels  # once for 32 channels
    assert sum(n * units for n, units, summing in blocks if summing) * 128 == voxels


def test_a_prediction_has_the_products_that_its_plan_asks_for() -> None:
    shape, code = Shape.of(SUBJECTS[0]), parts(kernel())
    found = warpgroup_clocks.predict(shape, "fprop", "H200", facts("fprop"), code)
    assert found.kernel == "sm90_fprop"
    assert found.phases["tensor"] == 2 * 36 * 128  # four slices of nine taps, by two warpgroups
    shared = warpgroup_clocks.predict(shape, "fprop", "H200", facts("fprop", shifts=2), code)
    assert shared.phases["tensor"] == 2 * 48 * 128
    # no faster than the tensor cores, and as the planes are brought
    assert found.seconds > shape.flops / (4096 * 132 * 1.755e9)
    late = "FFMA R4, R4, R5, R6", 15, 7, 0
    slow = parts(kernel(transform=[*[late] * 200, *TRANSFORM]))
    behind = warpgroup_clocks.predict(shape, "fprop", "H200", facts("fprop"), slow)
    assert behind.seconds > found.seconds and behind.binding == "brings: transform"


def test_a_prediction_of_the_weight_s_gradient_adds_up_a_tile() -> None:
    shape, code = Shape.of(SUBJECTS[0]), parts(without_roles())
    found = warpgroup_clocks.predict(shape, "wgrad", "H200", facts("wgrad"), code)
    assert found.phases["tensor"] == 9 * 8 * 32  # of nine taps eight steps of 16 voxels
    assert found.tile_clocks >= found.phases["tensor"]
    alone = [p for n, p in found.phases.items() if n not in ("issue", "tensor", "shared memory")]
    assert found.tile_clocks >= sum(alone) > 0


@pytest.mark.parametrize("loops", [[COPIES * 2], [COPIES * 2, COPIES], [COPIES, COPIES]])
def test_a_gradient_and_the_raw_output_are_copied_by_one_loop_or_two(loops: list[Lines]) -> None:
    gradient = [*["LDS.64 R8, [R3]"] * 4, *TRANSFORM]
    code = parts(kernel(copies=loops[0], more=loops[1:], transform=gradient))
    plan = warpgroup_clocks.Plan(Shape.of(SUBJECTS[0]), "dgrad", facts("dgrad"), code)
    chunks = 18 * 18 * 8 / 128  # of a thread, in each map
    turn = len(loops[0]) + 1
    turns = chunks / 4 * (2 if len(loops[0]) == len(COPIES) else 1)
    assert plan.work().copy.issue == pytest.approx(turn * turns)


def predicted(name: str, seconds: float, device: str = "H200") -> Prediction:
    return Prediction("l", name, device, 1e4, 1, seconds, 1.0, "products", {"products": 1e4})


def test_both_kinds_of_kernels_and_the_vendors_stand_side_by_side(tmp_path: Path) -> None:
    found = [predicted("fprop", 3e-3), predicted("sm90_fprop", 1e-3), predicted("dgrad", 1e-3)]
    file = tmp_path / "results.json"
    times = {"vendor": 5e-4, "fastfilm-cuda-wgmma": 9e-4, "fastfilm-cuda/fused": 4e-3}
    rows = [
        {"suite": "routes", "case": "l", "provider": p, "mode": "forward", "median_s": s}
        for p, s in times.items()
    ]
    file.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    seconds = clock_table.measured(file)
    assert seconds == {
        ("l", "vendor fprop"): 5e-4,
        ("l", "sm90_fprop"): 9e-4,
        ("l", "fprop"): 4e-3,
    }
    lines = clock_table.beside(found, seconds, [("l", "fprop")])
    assert lines[2] == "| l | fprop | H200 | 3000 | 1000 | 1 | products | yes | 500 | 0.50 |"
    assert lines[3] == ""
    assert lines[4].startswith("H200: 3.00 times as fast as mma.sync")
    assert lines[5].startswith("H200: 0.50 times as fast as the vendor's, measured")


def test_the_file_keeps_both_kinds_apart() -> None:
    found = [predicted("fprop", 3e-3), predicted("sm90_fprop", 1e-3)]
    written = clock_table.as_json(found, [("l", "fprop")])
    assert [r["pass"] for r in written["rows"]] == ["fprop"]
    assert [(r["pass"], r["taken"]) for r in written["warpgroups"]] == [("sm90_fprop", True)]


def test_the_committed_file_has_every_layer_pass_and_device() -> None:
    path = ROOT / "benchmarks" / "results" / "clock-model.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["warpgroups"]
    assert len({(r["layer"], r["pass"], r["device"]) for r in rows}) == len(rows) == 29 * 2
    assert {r["pass"] for r in rows} == {"sm90_fprop", "sm90_dgrad", "sm90_wgrad"}


def test_the_gate_takes_counts_of_the_code(tmp_path: Path) -> None:
    row = {"case": "cuda sm90_fprop", "provider": "sm_90a", "dtype": "bf16", "registers": 168}
    row |= {"stack_bytes": 8, "main_loop_mma": 4, "main_loop_instructions": 41}
    file = tmp_path / "static.json"
    file.write_text(json.dumps({"rows": [row | {"transform_instructions": 40}]}), encoding="utf-8")
    name = "sm_90a cuda sm90_fprop bf16"
    assert list(gate.tiles(file)) == [
        gate.Figure(f"stack bytes: {name}", 8),
        gate.Figure(f"registers: {name}", 168, 0.1),
        gate.Figure(f"products of the main loop: {name}", 4),
        gate.Figure(f"instructions of the main loop: {name}", 41, 0.1),
        gate.Figure(f"instructions of a voxel's transform: {name}", 40, 0.1),
    ]


Built = tuple[Path, ModuleType]


@pytest.fixture(scope="module")
def built() -> Built:
    pytest.importorskip("triton", reason="its package has the disassembler")
    library = sass.extension()
    if library is None:
        pytest.skip("the CUDA extension is not built")
    module = sass.load(library)
    if warpgroup_loops.TARGET not in module.architectures.split(";"):
        pytest.skip("the CUDA extension is not built for sm_90a")
    return library, module


def test_the_installed_kernels_have_no_fault_and_every_layer_a_time(built: Built) -> None:
    library, module = built
    target = f"sm_{warpgroup_loops.TARGET}"
    usage = dict(sass.resources(library, target))
    names = [n for n in usage if name_of(n)[0].startswith(warpgroup_loops.PREFIX)]
    assert {name_of(n)[:2] for n in names} == {
        (f"sm90_{name}", dtype)
        for name in ("fprop", "dgrad", "wgrad")
        for dtype in ("bf16", "fp16")
    }
    shared, _ = cuda_binaries.layouts(90)
    kernels = {}
    for mangled, lines in sass.functions(library, target, names):
        row = cuda_binaries.warpgroups_row(mangled, lines, usage[mangled], shared)
        assert row["status"] == "ok", row
        assert row["main_loop_mma"] in (3, 4) and 0 < row["shared_bytes"] <= 232448
        if found := warpgroup_clocks.kernel_of(mangled, lines, usage[mangled]["REG"]):
            kernels[found[0]] = found[1]
    rows = warpgroup_clocks.rows(kernels, module)
    assert len(rows) == 2 * 29
    for row in rows:
        assert row["status"] == "ok" and 1e1 < row["predicted_us"] < 1e5, row


def test_kernels_by_mma_stay_as_they_are_beside_those_of_warpgroups(built: Built) -> None:
    shared, traffic = cuda_binaries.layouts(90)
    kinds = {key[0] for key in shared}
    assert kinds == {"fprop", "dgrad", "wgrad", "sm90_fprop", "sm90_dgrad", "sm90_wgrad"}
    assert {dtype for name, dtype, _ in shared if name.startswith("sm90_")} == {"bf16", "fp16"}
    assert set(traffic) == set(cuda_binaries.CODES)


WARNINGS = r"C75\d\d|serializ|setmaxnreg|Potential Performance Loss"
"""What ptxas says where it makes products wait for each other, or ignores a change of the registers."""


@pytest.mark.skipif(probes.nvcc() is None, reason="needs nvcc")
@pytest.mark.parametrize("name", ["forward", "backward", "weight"])
def test_ptxas_warns_of_nothing_and_spills_nothing(name: str, tmp_path: Path) -> None:
    compiler = probes.nvcc()
    assert compiler is not None
    command = [compiler, "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    command += ["-Xptxas", "-v", "-o", str(tmp_path / "kernel.cubin")]
    command += [str(ROOT / "csrc" / "cuda" / "sm90" / f"{name}.cu")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Used \d+ registers", done.stderr)
    assert not re.search(WARNINGS, done.stderr), done.stderr
    spilled = re.findall(r"(\d+) bytes spill", done.stderr)
    assert spilled and set(spilled) == {"0"}, done.stderr
