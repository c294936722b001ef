"""The clock model: what a listing says, what follows from it, and that every deciding layer has a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.counted.machine_code import clock_figures, clock_model, clock_table, sass
from benchmarks.counted.machine_code.clock_model import Phase, Time
from benchmarks.counted.machine_code.kernel_loops import Cost, Kernel, is_, name_of
from benchmarks.counted.machine_code.sass import Function
from benchmarks.suites import gate
from fastfilm.tuning import cost

LATENCIES = {"LDG": 500, "LDS": 30}


def listing(lines: Sequence[str | tuple[str, int, int, int]]) -> list[str]:
    """Lines as ``cuobjdump -sass`` writes them.

    A line is a text, or (text, clocks until the next one, scoreboard that it sets, scoreboards that it waits for).
    """
    found = []
    for number, line in enumerate(lines):
        text, stall, board, waits = line if isinstance(line, tuple) else (line, 1, 7, 0)
        word = stall << 41 | board << 46 | 7 << 49 | waits << 52
        found.append(f"        /*{16 * number:04x}*/    {text} ;    /* 0x0000000000000000 */")
        found.append(f"                                 /* 0x{word:016x} */")
    return found


def function(*lines: str | tuple[str, int, int, int]) -> Function:
    return Function(sass.parse(listing(lines)))


NEST = function(
    "MOV R1, c[0x0][0x28]",  # 00
    "IADD3 R2, R2, 0x1, RZ",  # 10: outer
    "LDS.128 R4, [R2]",  # 20: inner
    "HMMA.16816.F32.BF16 R8, R4, R6, R8",  # 30
    "@P0 BRA 0x20",  # 40
    "@!P1 BRA 0x80",  # 50: with a store, or without
    "STG.E.64 desc[UR4][R2.64], R4",  # 60
    "FADD R1, R1, R2",  # 70
    "@P2 BRA 0x10",  # 80
    "EXIT",  # 90
)


def names(path: Sequence[sass.Instruction] | None) -> list[str]:
    assert path is not None
    return [i.name for i in path]


def test_instructions_have_their_width_pipe_target_and_condition() -> None:
    wide, matrix, jump = (NEST.instructions[i] for i in (2, 3, 4))
    assert (wide.name, wide.bytes, wide.pipe) == ("LDS", 16, "shared")
    assert (matrix.opcode, matrix.pipe) == ("HMMA.16816.F32.BF16", "tensor")
    assert (jump.target, jump.predicated) == (0x20, True)
    four, narrow = function(
        "LDSM.16.MT88.4 R4, [R2]", "LDG.E.U16 R4, desc[UR4][R2.64]"
    ).instructions
    assert (four.bytes, narrow.bytes) == (16, 2)
    assert sass.pipes(NEST.instructions)["branch"] == 4


def test_loops_are_nested() -> None:
    outer, inner = NEST.loops
    assert (outer.header, inner.header) == (0x10, 0x20)
    assert inner.parent is outer and outer.inner == [inner]
    assert outer.own == {0x10, 0x50, 0x60, 0x80}


def test_a_path_is_the_shortest_one_that_meets_its_needs_without_inner_loops() -> None:
    outer, inner = NEST.loops
    assert names(NEST.path(outer, [])) == ["IADD3", "BRA", "BRA"]
    assert names(NEST.path(outer, [inner, is_("STG", 8)])) == ["IADD3", "BRA", "STG", "FADD", "BRA"]
    assert names(NEST.path(outer, [], is_("STG"))) == ["IADD3", "BRA", "STG", "FADD", "BRA"]
    assert NEST.path(outer, [is_("STG", 16)]) is None
    assert NEST.path(outer, [(is_("STG"), 2)]) is None


def test_a_condition_that_is_an_operand_leaves_both_ways_open() -> None:
    loop = function("NOP", "@!P0 BRA P1, 0x40", "FADD R1, R1, R1", "BRA P2, 0x0", "EXIT")
    assert loop.edges[0x20] == [0, 0x40]


def test_a_call_with_a_condition_leaves_the_loop_and_one_without_returns() -> None:
    loop = function(
        "CALL.REL.NOINC 0x40", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "EXIT", "RET.REL.NODEC R2 0x0"
    )
    assert loop.edges[0x0] == [0x10]
    assert loop.edges[0x10] == [0x30, 0x20]


def latency(i: sass.Instruction) -> int:
    return LATENCIES.get(i.name, 0)


def test_a_warp_waits_for_scoreboards_that_its_instructions_wait_for() -> None:
    late = function(("LDG.E R1", 2, 0, 0), ("IADD3 R2", 4, 7, 0), ("FADD R1", 1, 7, 1))
    assert sass.chain(late.instructions, latency) == 500 + 1
    two = function(("LDG.E R1", 2, 0, 0), ("LDG.E R2", 2, 0, 0), ("FADD R1", 1, 7, 1))
    assert sass.chain(two.instructions, latency) == 2 + 500 + 1  # both are on their way at once
    assert sass.chain(function(("FADD R1", 5, 7, 0)).instructions, latency) == 5


def test_operands_are_read_long_before_a_result_is_there() -> None:
    word = 1 << 41 | 7 << 46 | 2 << 49
    lines = listing(["STG.E desc[UR4][R2.64], R4", ("FADD R4", 1, 7, 1 << 2)])
    lines[1] = f"      /* 0x{word:016x} */"
    both = sass.parse(lines)
    assert both[0].operands == 2
    assert sass.chain(both, latency, read=20) == 20 + 1


def test_loops_of_a_kernel_are_recognised_by_what_they_do() -> None:
    kernel = Kernel(
        function(
            "MOV R4, R5",  # 00: a tile
            "MOV R4, R5",  # 10: weights
            "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
            "@P0 BRA 0x10",
            "MOV R4, R5",  # 40: affine
            "LDS.64 R4, [R1]",
            "FFMA R4, R4, R5, R6",
            "STS.64 [R1], R4",
            "@P0 BRA 0x40",
            "BAR.SYNC.DEFER_BLOCKING 0x0",
            "HMMA.16816.F32.BF16 R8, R4, R6, R8",  # a0: products
            "@P0 BRA 0xa0",
            "LDS R4, [R1]",  # c0: epilogue
            "FFMA R4, R4, R5, R6",
            "STG.E.64 desc[UR4][R2.64], R4",
            "@P0 BRA 0xc0",
            *["MOV R4, R5"] * 30,  # 100: slab
            "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
            "@P0 BRA 0x100",
            "@P0 BRA 0x0",
            "EXIT",
        ),
        128,
        clock_model.CONSTANTS,
    )
    assert kernel.tiles.header == 0
    kinds = {0x10: "weights", 0x40: "affine", 0xA0: "products", 0xC0: "epilogue", 0x100: "slab"}
    assert kernel.kinds == kinds
    copy = kernel.copy("slab", True)
    assert copy is not None and (copy.issue, copy.bytes, copy.shared) == (32, 16, 4)
    assert [c.tensor for c in kernel.products()] == [1]
    assert [c.bytes for c in kernel.epilogue(True, True)] == [8]
    (affine, treated), *_ = kernel.affine("input", True, False)
    assert treated == 8 and affine.shared == 4
    assert not kernel.reads_map()


def test_products_of_float32_are_a_loop_of_sums_that_stores_nothing() -> None:
    kernel = Kernel(
        function(
            "MOV R4, R5",  # 00: a tile
            "MOV R4, R5",  # 10: products
            "LDS.128 R4, [R1]",
            "LDS.128 R8, [R2]",
            *["FFMA R12, R4, R8, R12"] * 16,
            "@P0 BRA 0x10",
            "LDS.128 R4, [R1]",  # 150: affine
            *["FFMA R4, R4, R5, R6"] * 16,
            "STS.128 [R1], R4",
            "@P0 BRA 0x150",
            "@P0 BRA 0x0",
            "EXIT",
        ),
        128,
        clock_model.CONSTANTS,
        4,
    )
    assert not kernel.on_tensor_cores
    assert kernel.tiles.header == 0
    assert kernel.kinds == {0x10: "products", 0x150: "affine"}
    (products,) = kernel.products()
    # a load is of one wavefront there; elsewhere sums are no products
    assert (products.tensor, products.bytes, products.shared) == (16, 16, 2)
    ((affine, treated),) = kernel.affine("input", True, False)
    assert (affine.tensor, affine.shared, treated) == (0, 8, 16)


def test_copies_by_values_are_as_wide_as_a_value() -> None:
    lines = ["MOV R4, R5", "LDG.E R4, desc[UR4][R2.64]", "STS.128 [R1], R4"]
    lines += ["LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "@P0 BRA 0x10"]
    lines += ["HMMA.1688.F32.TF32 R8, R4, R6, R8", "@P0 BRA 0x0", "EXIT"]
    wide, narrow = (Kernel(function(*lines), 128, clock_model.CONSTANTS, n) for n in (4, 2))
    assert [wide.copy(kind, False) is not None for kind in ("slab", "weights")] == [False, True]
    assert narrow.copy("weights", False) is None


def test_kernels_are_named_with_their_dtype_and_channels() -> None:
    mangled = "_ZN8fastfilm4cuda5entryINS0_8ConvolveINS0_8BFloat16ELi64ELi32ENS0_9ActivatedE"
    assert name_of(mangled) == ("fprop", "bf16", (64, 32))


@pytest.mark.parametrize(
    ("cost", "bound"),
    [
        (Cost(10, 100, 0, 0, 1), "latency"),
        (Cost(100, 10, 0, 0, 1), "issue"),
        (Cost(10, 10, 20, 0, 1), "tensor"),
        (Cost(10, 10, 0, 50, 1), "shared"),
    ],
)
def test_a_phase_is_bound_by_what_it_has_most_of(cost: Cost, bound: str) -> None:
    time = clock_model.timed(Phase("x", 2, cost), 8, 8.0)
    parts = time.latency, time.issue, time.tensor, time.shared
    expected = 2 * cost.chain, 4 * cost.issue, 32 * cost.tensor, 16 * cost.shared
    assert parts == expected
    assert time.binding == bound
    assert max(parts) <= time.total <= sum(parts)


def test_two_blocks_hide_latency_but_share_the_units() -> None:
    waiting = [Time("x", 1000, 10, 0, 0, 1000.0)]
    assert 1000 <= clock_model.together(waiting, 2) < 1010
    busy = [Time("x", 10, 0, 1000, 0, 1000.0)]
    assert 2000 <= clock_model.together(busy, 2) < 2010
    assert clock_model.together(waiting, 1) == 1000
    assert clock_model.bound(waiting, 2) == "x: latency"
    assert clock_model.bound([*busy, *waiting], 2) == "x: tensor"


def test_blocks_begin_where_a_place_becomes_free() -> None:
    assert clock_model.scheduled([3, 1, 1, 1], 2) == 3
    assert clock_model.scheduled([1, 1, 1], 2) == 2


def test_the_table_says_how_far_off_it_is_and_what_was_gained() -> None:
    found = clock_model.Prediction(
        "l", "fprop", "H200", 1e4, 1, 2e-3, 1.0, "products: tensor", {"products": 1e4}
    )
    lines = clock_table.table([found], {("l", "fprop"): 1e-3}, {("l", "fprop", "H200"): 3e3}, True)
    assert "2.00 | 1.50 | products 10000" in lines[2]
    assert lines[4] == "1 measured: off by 2.000 in the geometric mean, 1 by more than 1.6."
    assert lines[-1] == "All: 1.50 times as fast in the geometric mean."


def test_the_committed_figures_have_every_layer_pass_and_device() -> None:
    path = Path(clock_model.__file__).resolve().parents[2] / "results" / "clock-model-before.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len({(r["layer"], r["pass"], r["device"]) for r in rows}) == len(rows) == 29 * 3


def test_the_gate_takes_the_predicted_times_of_a_static_run(tmp_path: Path) -> None:
    row = {"case": "clock model: 64→64 fprop", "provider": "H200", "dtype": "bf16"}
    file = tmp_path / "static.json"
    file.write_text(json.dumps({"rows": [row | {"predicted_us": 500.0}]}), encoding="utf-8")
    assert list(gate.tiles(file)) == [gate.Figure("clock model: µs 64→64 fprop H200", 500.0, 0.03)]


def test_a_kernel_that_is_not_understood_costs_its_own_row_alone() -> None:
    class Convolution:
        def __init__(self, *arguments: Any) -> None: ...

        def facts(self, kernel: str) -> dict[str, Any]:
            return {"channels": (64, 64)}

    module = ModuleType("_CUDA")
    module.Convolution = Convolution  # type: ignore[attr-defined]
    found = clock_model.rows({}, module, 80)
    assert len(found) == 29
    assert found[0]["status"] == "FAILED: the library has no fprop of 64 by 64 channels"


Built = tuple[clock_model.Kernels, ModuleType, int]


@pytest.fixture(scope="module")
def built() -> Built:
    pytest.importorskip("triton", reason="its package has the disassembler")
    library = sass.extension()
    if library is None:
        pytest.skip("the CUDA extension is not built")
    module = sass.load(library)
    target = module.architectures.split(";")[-1]
    arch = int(target.rstrip("af")) // 10 * 10
    if arch not in {gpu.arch for gpu in clock_model.GPUS.values()}:
        pytest.skip(f"no device of the model has compute capability {arch}")
    return clock_model.read(library, f"sm_{target}"), module, arch


def test_every_deciding_layer_has_a_time_and_what_binds_it(built: Built) -> None:
    rows = clock_model.rows(*built)
    devices = {r["provider"] for r in rows}
    assert devices and len(rows) == 29 * len(devices)
    for row in rows:
        assert 1e1 < row["predicted_us"] < 1e6, row
        assert row["binding"] and row["status"] == "ok"


def test_the_cost_models_figures_are_those_of_the_installed_kernels(built: Built) -> None:
    """``clock_figures`` makes them anew where kernels change; compilers differ a little."""
    kernels, module, arch = built
    device = next(name for name, gpu in clock_model.GPUS.items() if gpu.arch == arch)
    committed = cost.figures()["clocks"][str(arch)]["bfloat16"]
    found = dict(clock_figures.tables(kernels, module, device, "bf16"))
    assert found.keys() == committed.keys()
    for name, table in found.items():
        assert table.keys() == committed[name].keys()
        for key, figure in table.items():
            assert figure[:2] == committed[name][key][:2], (name, key)
            assert figure[2:] == pytest.approx(committed[name][key][2:], rel=0.05), (name, key)


def test_figures_stand_one_a_line_for_every_type_pass_and_size() -> None:
    text = cost.FIGURES.read_text(encoding="utf-8")
    known = json.loads(text)
    assert clock_figures.text(known) == text
    assert set(known["clocks"]) == set(known["clock"]) == {"80", "90"}
    for types in known["clocks"].values():
        assert set(types) == {"bfloat16", "tf32", "float32"}
        for name, tables in types.items():
            assert set(tables) == {f"{p} {t}" for p in cost.PASSES for t in (1, 9, 27)}
            sizes = 12 if name == "bfloat16" else 4
            assert {len(table) for table in tables.values()} == {sizes}
            for rows, columns, alone, shared, _ in (f for t in tables.values() for f in t.values()):
                assert rows in (8, 16, 32, 64) and columns in (8, 16, 32, 64)
                assert 0 < shared <= alone <= 2 * shared
