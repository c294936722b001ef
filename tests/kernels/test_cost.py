"""The cost model's arithmetic, pinned by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fastfilm.tuning import cost

ROOT = Path(__file__).resolve().parents[2]
if "benchmarks" not in sys.modules:
    spec = importlib.util.spec_from_file_location("_run_for_cost", ROOT / "benchmarks" / "run.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))

from benchmarks import ddp, explain, networks, roofline  # noqa: E402

# 1 B/s·1e9, 2e12 FLOP/s, L2 four times the memory, 1 µs a launch, 10 processors
CEILINGS = cost.Ceilings(1e9, {"bfloat16": 2e12}, l2=4e9, launch=1e-6, processors=10)
SHAPE = cost.Convolution(2, 32, 64, (3, 3), (1, 1), (16, 32), (16, 32))
TILE = cost.Tile(128, 64, 32, (8, 16))

X, Y, W = 2 * 2 * 32 * 512, 2 * 2 * 64 * 512, 2 * 32 * 64 * 9
FLOPS = 2 * 2 * 512 * 32 * 64 * 9


def test_bytes_and_flops_of_a_convolution_count_each_map_once() -> None:
    assert (SHAPE.x_bytes, SHAPE.y_bytes, SHAPE.w_bytes) == (X, Y, W)
    assert SHAPE.flops == FLOPS


def test_transposed_convolution_counts_arithmetic_at_its_input() -> None:
    up = cost.Convolution(1, 8, 4, (2, 2), (2, 2), (5, 5), (10, 10), transposed=True)
    assert up.flops == 2 * 25 * 8 * 4 * 4


@pytest.mark.parametrize(
    ("mode", "input_grad", "expected"),
    [
        ("inference", True, 1),
        ("training", True, 3),
        ("training", False, 2),
        ("backward", True, 2),
        ("backward", False, 1),
    ],
)
def test_passes_of_a_mode(mode: str, input_grad: bool, expected: int) -> None:
    c = cost.Convolution(1, 8, 8, (3,) * 2, (1,) * 2, (8, 8), (8, 8), input_grad=input_grad)
    assert len(c.passes(mode)) == expected
    once = max((c.x_bytes + c.y_bytes + c.w_bytes) / 1e9, c.flops / 2e12)
    assert cost.floor(c, mode, "bfloat16", CEILINGS) == pytest.approx(expected * once)


def test_programs_cover_ragged_tiles_of_each_sample_and_depth() -> None:
    assert cost.programs(SHAPE, TILE) == 2 * 2 * 2
    ragged = cost.Convolution(3, 8, 65, (3,) * 3, (1,) * 3, (5, 9, 17), (5, 9, 17))
    assert cost.programs(ragged, TILE) == 3 * 5 * 2 * 2 * 2
    # without an edge the voxels of the batch follow each other: 3 * 765 = 2295 = 17.9 tiles
    assert cost.programs(ragged, cost.Tile(128, 64, 32)) == 18 * 2


def test_l2_bytes_read_an_input_for_every_tap_and_a_weight_for_every_tile() -> None:
    inputs = 8 * 128 * 9 * 32 * 2
    weights = 8 * 9 * 32 * 64 * 2
    assert cost.l2_bytes(SHAPE, TILE) == inputs + weights + Y
    # half the output channels a tile: the inputs are read twice, the weights as often as before
    half = cost.Tile(128, 32, 32, (8, 16))
    assert cost.l2_bytes(SHAPE, half) == 2 * inputs + weights + Y


def test_padded_arithmetic_counts_whole_tiles() -> None:
    assert cost.padded_flops(SHAPE, TILE) == FLOPS
    narrow = cost.Convolution(2, 1, 3, (3, 3), (1, 1), (16, 32), (16, 32))
    padded = cost.padded_flops(narrow, cost.Tile(128, 16, 16, (8, 16)))
    assert padded == 2 * 8 * 128 * 16 * 16 * 9


@pytest.mark.parametrize(("count", "expected"), [(10, 1.0), (11, 2 / 1.1), (25, 3 / 2.5)])
def test_tail_of_the_last_wave(count: int, expected: float) -> None:
    assert cost.tail(count, 10) == pytest.approx(expected)


def test_a_kernel_takes_its_largest_term_and_its_launch() -> None:
    kernel = cost.Kernel("k", dram=2e3, l2=4e3, flops=1e6, share=0.5)
    terms = cost.time(kernel, "bfloat16", CEILINGS)
    assert (terms.dram, terms.l2, terms.matrix) == pytest.approx((2e-6, 1e-6, 1e-6))
    assert terms.total == pytest.approx(3e-6)
    assert terms.limiter == "dram"


def test_kernels_of_each_route() -> None:
    def names(route: str, mode: str) -> list[str]:
        return [k.name for k in cost.kernels(SHAPE, route, mode)]

    assert names("floor", "training") == ["fprop", "dgrad", "wgrad"]
    assert names("fused", "training") == ["fprop", "moments_backward", "dgrad", "wgrad"]
    assert names("composed", "training") == [
        "apply", "fprop", "moments", "moments_backward", "apply", "dgrad", "apply_backward", "wgrad",
    ]  # fmt: skip
    assert names("fused", "inference") == ["fprop"]
    assert names("composed", "inference") == ["fprop", "apply"]
    with pytest.raises(ValueError, match="route must be one of"):
        cost.kernels(SHAPE, "eager", "training")


def test_bytes_of_the_composed_route_through_memory() -> None:
    moved = {k.name: k.dram for k in cost.kernels(SHAPE, "composed", "training")}
    assert moved["apply"] == 2 * X
    assert moved["moments"] == Y
    assert moved["moments_backward"] == 3 * Y
    assert moved["apply_backward"] == 3 * X
    assert moved["fprop"] == moved["wgrad"] == moved["dgrad"] == X + Y + W


def test_bytes_of_the_fused_route_through_memory() -> None:
    moved = {k.name: k.dram for k in cost.kernels(SHAPE, "fused", "training", tile=TILE)}
    partials = 2 * 2 * 4 * 64 * 8  # mean and M2 of 64 channels of 8 tiles, written and read
    assert moved["fprop"] == X + Y + W + partials
    assert moved["dgrad"] == 2 * X + Y + W  # reads the raw input again
    assert moved["wgrad"] == X + Y + W


def test_an_estimate_is_never_below_the_floor_and_adds_up() -> None:
    for route in ("fused", "composed"):
        for mode in ("inference", "training"):
            e = cost.estimate(SHAPE, route, mode, "bfloat16", CEILINGS)
            assert e.seconds >= e.floor > 0
            assert e.seconds == pytest.approx(sum(e.kernels.values()))
            t = e.terms
            assert e.seconds == pytest.approx(t.dram + t.l2 + t.matrix + t.launch)
            assert e.limiter == max(cost.LIMITERS, key=lambda name: getattr(t, name))


def test_the_limiter_follows_the_ceiling_that_is_lowered() -> None:
    found = {}
    for name, ceilings in {
        "dram": cost.Ceilings(1e6, {"bfloat16": 1e15}, l2=1e15),
        "l2": cost.Ceilings(1e15, {"bfloat16": 1e15}, l2=1e6),
        "matrix": cost.Ceilings(1e15, {"bfloat16": 1e9}, l2=1e15),
        "launch": cost.Ceilings(1e15, {"bfloat16": 1e18}, l2=1e15, launch=1.0),
    }.items():
        found[name] = cost.estimate(SHAPE, "fused", "training", "bfloat16", ceilings).limiter
    assert found == {name: name for name in found}


def test_the_floor_of_the_benchmarks_is_that_of_the_model() -> None:
    for layer in networks.NETWORKS[1].layers():
        c = roofline.convolution(layer, 2, "bfloat16")
        work = roofline.work([layer], 2, "bfloat16", "training", CEILINGS)
        assert c.flops * len(c.passes("training")) == work.flops
        assert cost.floor(c, "training", "bfloat16", CEILINGS) == pytest.approx(work.floor_s)


def test_ring_all_reduce() -> None:
    link = ddp.Link(bandwidth=1e9, latency=1e-3)
    assert ddp.all_reduce(1e9, 1, link) == 0.0
    assert ddp.all_reduce(1e9, 4, link) == pytest.approx(2 * 3 / 4 + 6e-3)


def test_what_the_backward_pass_hides_is_not_added_to_the_step() -> None:
    link = ddp.Link(bandwidth=1e9, latency=0.0)
    bucket = ddp.BUCKET_BYTES
    once = ddp.all_reduce(bucket, 2, link)
    hidden = ddp.step(0.1, 10.0, 4 * bucket, 2, link)
    assert hidden.communication == pytest.approx(4 * once)
    assert hidden.exposed == pytest.approx(once)  # the last bucket has nothing behind it
    assert hidden.seconds == pytest.approx(10.1 + once)
    assert hidden.efficiency == pytest.approx(10.1 / hidden.seconds)
    bare = ddp.step(0.1, 0.0, 4 * bucket, 2, link)
    assert bare.exposed == pytest.approx(4 * once)
    assert ddp.step(0.1, 0.2, bucket, 1, link).seconds == pytest.approx(0.3)
    with pytest.raises(ValueError, match="gpus must be at least 1"):
        ddp.step(1.0, 1.0, 1, 0)


def test_batch_norm_over_processes_pays_latency_twice_a_norm() -> None:
    link = ddp.Link(bandwidth=1e9, latency=1e-4)
    plain, norms = (ddp.step(1.0, 1.0, 100, 2, link, n) for n in (0, 5))
    assert norms.seconds - plain.seconds == pytest.approx(5 * 2 * 2 * 1e-4)


def test_explained_lines_count_every_occurrence() -> None:
    network = networks.NETWORKS[0]
    found = explain.lines(network, "training", "bfloat16", CEILINGS)
    assert sum(line.count for line in found) == sum(network.layers().values())
    floor = roofline.work(
        network.layers().elements(), network.batch, "bfloat16", "training", CEILINGS
    ).floor_s
    assert sum(line.floor for line in found) == pytest.approx(floor)
    cells = explain.rows(found)
    assert cells[-1][0] == "sum" and float(cells[-1][2]) == pytest.approx(1e3 * floor, abs=1e-3)
    assert cells[-1][4] == "-"  # nothing was measured
    measured = {layer: 1e-3 for layer in network.layers()}
    cells = explain.rows(explain.lines(network, "training", "bfloat16", CEILINGS, measured))
    assert float(cells[-1][4]) == pytest.approx(sum(network.layers().values()))
