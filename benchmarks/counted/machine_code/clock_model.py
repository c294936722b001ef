"""Clocks of the CUDA convolutions without a GPU: counted in their machine code, for the ten layers that decide.

    python -m benchmarks.counted.machine_code.clock_model [--library FILE] [--json FILE] [--against FILE]
        [--beside] [--parts]

prints what `clock_table` makes of it. The kernels of warpgroups have a model of their own, `warpgroup_clocks`.

A kernel is a list of phases, each a loop of the compiled code with as many iterations as its work needs.
A phase takes the longest of what its iterations occupy (issue slots, tensor cores, shared memory) and of what one
warp waits for (`sass.chain`); where two are alike they overlap imperfectly (``CONSTANTS["overlap"]``). The phases
of a block are separated by barriers and add up; blocks that share a multiprocessor overlap.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fastfilm.tuning.binary import SHARED_LIMIT, resident

from ..deciding_layers import SUBJECTS, Subject
from . import sass
from .kernel_loops import Cost, Kernel, name_of

PASSES = {"fprop": "forward", "dgrad": "input gradient", "wgrad": "weight gradient"}
FACTS = {"fprop": "forward", "dgrad": "backward", "wgrad": "weight"}
DEFAULT_THREADS = 256
DTYPE = "bf16"
"""Type that the ten layers' figures are for."""

TYPES = {"bf16": (2, 2, False), "tf32": (4, 0, True), "fp32": (4, 0, False)}
"""Type of the products -> bytes of a value, code of the storage, whether float32 is rounded for tensor cores."""


@dataclass(frozen=True)
class Gpu:
    """Rates of a device: clocks/s, clocks of one HMMA and FFMA on one of four pipes, bytes/s of memory and L2."""

    arch: int
    processors: int
    clock: float
    hmma: float
    ffma: float
    dram: float
    l2: float


GPUS = {
    # data sheets. HMMA: 2048 multiply-adds by a pipe of 256 a clock on an A100; on an H100 of 512, of which
    # mma.sync reaches 62 % (arXiv:2402.13499); half as many of tf32. FFMA: a pipe of 16 lanes, and of 32. DRAM of
    # the H200: a copy measured on one. L2: assumed
    "A100": Gpu(80, 108, 1.41e9, 8.0, 2.0, 2.0e12, 4.0e12),
    "H100": Gpu(90, 132, 1.755e9, 6.45, 1.0, 3.35e12, 5.5e12),
    "H200": Gpu(90, 132, 1.755e9, 6.45, 1.0, 4.3e12, 5.5e12),
}

UNITS = ("issue", "tensor", "shared")
"""Units of a multiprocessor that its warps share."""

CONSTANTS = {
    "overlap": 1.6,  # fitted
    "block": 12000.0,  # clocks of a block's beginning and end: first copies, merging of sums, results; fitted
    "barrier": 40.0,  # clocks; assumed
    "launch": 5e-6,  # seconds of a kernel beside the convolution, in a graph; fitted
    "map": 800.0,  # clocks until values of a map are there; fitted
    "near": 60.0,  # of values that neighbouring threads read too, and of maps of one channel; fitted
    "intake": 64.0,  # bytes a clock that a multiprocessor takes from the L2; assumed
    "table": 100.0,  # of coefficients and of a view's indices and weights; fitted
    "shared": 30.0,  # LDS and LDSM; 29 in Luo et al. 2024, arXiv:2402.13499
    "read": 20.0,  # until a load, a store or a matrix instruction has read its operands; assumed
    "constant": 40.0,  # LDC; assumed
    "special": 20.0,  # MUFU and conversions; assumed
    "activation": 3.0,  # instructions a value of a leaky ReLU, which the shortest way leaves out; counted
    "branch": 40.0,  # clocks of the jump to it; assumed
    # ways of a bank conflict of 4-byte accesses: from the distances in the sources, confirmed by ncu's wavefronts
    "sums conflict": 16.0,
    "epilogue conflict": 4.0,
    "staging conflict": 2.0,
}


@dataclass(frozen=True)
class Phase:
    """A part of a tile: iterations a warp, and the cost of each."""

    name: str
    turns: float
    cost: Cost


@dataclass(frozen=True)
class Time:
    """Clocks of a phase by what they go to, and the clocks that it takes."""

    name: str
    latency: float
    issue: float
    tensor: float
    shared: float
    total: float

    @property
    def binding(self) -> str:
        """Largest of the four."""
        return max(("latency", *UNITS), key=lambda n: float(getattr(self, n)))


def blended(wait: float, work: float) -> float:
    """Clocks of two things that overlap, imperfectly where they are alike."""
    p = CONSTANTS["overlap"]
    return float((wait**p + work**p) ** (1 / p))


def timed(phase: Phase, warps: int, hmma: float) -> Time:
    """Clocks of a phase of one block alone on a multiprocessor of four schedulers."""
    c, n = phase.cost, phase.turns
    issue, tensor = n * c.issue * warps / 4, n * c.tensor * hmma * warps / 4
    shared, wait = n * c.shared * warps, n * c.chain
    return Time(phase.name, wait, issue, tensor, shared, blended(wait, max(issue, tensor, shared)))


def together(times: Sequence[Time], blocks: int) -> float:
    """Clocks in which ``blocks`` blocks of a multiprocessor compute a tile each."""
    alone = sum(t.total for t in times)
    if blocks <= 1:
        return alone
    busy = max(sum(getattr(t, n) for t in times) for n in UNITS)
    return max(alone, blended(sum(t.latency for t in times), blocks * busy))


def bound(times: Sequence[Time], blocks: int) -> str:
    """The part of a tile, and what it needs most, that its time goes to."""
    if blocks > 1:
        sums = {n: blocks * sum(getattr(t, n) for t in times) for n in UNITS}
        sums["latency"] = sum(t.latency for t in times)
        why = max(sums, key=lambda n: sums[n])
        return f"{max(times, key=lambda t: float(getattr(t, why))).name}: {why}"
    heaviest = max(times, key=lambda t: sum(o.total for o in times if o.name == t.name)).name
    longest = max((t for t in times if t.name == heaviest), key=lambda t: t.total)
    return f"{heaviest}: {longest.binding}"


@dataclass(frozen=True)
class Prediction:
    """A kernel of a layer on a device.

    Attributes:
        tile_clocks: in which a multiprocessor computes a tile; of blocks that share it, each one's share.
        blocks: that a multiprocessor has room for.
        seconds: with the second stages.
        binding: part of a tile and what it needs most; or memory or the L2.
        phases: clocks of the parts of a tile, of a block alone.
    """

    layer: str
    kernel: str
    device: str
    tile_clocks: float
    blocks: int
    seconds: float
    tflops: float
    binding: str
    phases: dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A layer as the plan's numbers need it."""

    subject: Subject
    dims: int
    batch: int
    ci: int
    co: int
    size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    dtype: str = DTYPE

    @property
    def bytes(self) -> int:
        """Of a value."""
        return TYPES[self.dtype][0]

    @classmethod
    def of(cls, subject: Subject) -> Shape:
        """Of a layer with stride 1."""
        layer = subject.block.layer
        dims = len(layer.size)
        ones = (1,) * (3 - dims)
        size, kernel = (*ones, *layer.size), (*ones, *(layer.kernel,) * dims)
        return cls(subject, dims, subject.block.batch, layer.cin, layer.cout, size, kernel)  # type: ignore[arg-type]

    def facts(
        self, module: ModuleType, gpu: Gpu, kernel: str, wgmma: str = "never"
    ) -> dict[str, Any]:
        """The plan of a kernel; ``wgmma``: whether one of warpgroups, "always" or "never"."""
        device = gpu.arch, gpu.processors, SHARED_LIMIT[gpu.arch]
        padding = tuple(k // 2 for k in self.kernel)
        maps = self.batch, self.ci, self.co, self.size, self.size
        _, storage, tf32 = TYPES[self.dtype]
        conv = module.Convolution(
            storage, self.dims, *maps, self.kernel, padding, 1, device, tf32, wgmma
        )
        found: dict[str, Any] = conv.facts(FACTS[kernel])
        return found

    @property
    def flops(self) -> float:
        """Of one pass."""
        return 2.0 * self.batch * math.prod(self.size) * self.ci * self.co * math.prod(self.kernel)


class Layer:
    """The phases of a layer's kernel, from its plan and its code.

    Numbers of iterations follow from the work (bytes, matrix instructions) of a tile and of an iteration.
    """

    def __init__(self, shape: Shape, kernel: str, facts: Mapping[str, Any], code: Kernel) -> None:
        self.shape, self.facts, self.code = shape, facts, code
        self.threads = int(facts.get("threads", DEFAULT_THREADS))
        self.rows, self.columns = facts["channels"]
        self.forward, self.wgrad = kernel == "fprop", kernel == "wgrad"
        ci, co = (shape.co, shape.ci) if kernel == "dgrad" else (shape.ci, shape.co)
        self.blocks_k = 1 if self.wgrad else -(-ci // self.columns)
        self.blocks_n = -(-co // self.rows) * (-(-ci // self.columns) if self.wgrad else 1)
        self.depths = shape.kernel[0]
        self.taps = math.prod(shape.kernel) // (self.depths if self.wgrad else 1)
        reach = (1, *shape.kernel[1:]) if self.wgrad else shape.kernel
        self.voxels = math.prod(facts["tile"])
        self.slab = math.prod(t + k - 1 for t, k in zip(facts["tile"], reach, strict=True))
        # taps whose weights are in shared memory at a time
        part = facts.get("part") or math.prod(shape.kernel[1:])
        self.steps = 1 if self.wgrad else self.blocks_k * -(-self.taps // part)
        chunk = 16 // shape.bytes
        self.input_aligned, self.output_aligned = shape.ci % chunk == 0, shape.co % chunk == 0
        self.views = shape.subject.resized > 0 and bool(code.loops("gather"))
        self.twice = not (self.forward or code.reads_map())  # the raw output has a slab, too

    def variants(self) -> list[tuple[int, float, bool]]:
        """Kinds of blocks in the order of their launch: how many, the share of a view, whether they take sums."""
        s, resized = self.shape, self.shape.subject.resized if self.views else 0
        if not self.wgrad:
            return [(self.grid, resized / s.ci if self.forward else 0.0, False)]
        blocks_m = -(-s.co // self.rows)
        groups = self.grid // (self.blocks_n * self.depths)
        found = []
        for depth in range(self.depths):
            for block in range(self.blocks_n // blocks_m):
                first = block * self.columns
                share = max(0, min(resized - first, self.columns)) / min(self.columns, s.ci - first)
                found.append((groups * blocks_m, share, depth == 0 and block == 0))
        return found

    def phases(self, seen: float, summing: bool) -> Iterator[Phase]:
        """Parts of a tile, of which a view has the share ``seen`` of the input's channels."""
        s, code, size = self.shape, self.code, self.shape.bytes
        pending = s.subject.block.layer.input_grad
        a_slab = self.slab * self.columns * size / self.threads * self.blocks_k
        a_tile = self.voxels * self.rows * size / self.threads
        copied = a_slab * (1 - seen)
        if self.wgrad:
            yield from self._copies(copied, self.input_aligned)
            yield from self._copies(a_tile * (1 + self.twice), self.output_aligned)
        else:
            aligned = self.input_aligned if self.forward else self.output_aligned
            yield from self._copies(copied * (1 + self.twice), aligned)
        weights = code.copy("weights", True)
        if weights is not None and not self.facts.get("resident", self.wgrad):
            moved = self.taps * self.rows * self.columns * size * self.blocks_k
            yield Phase("weights", moved / self.threads / weights.bytes, weights)
        if self.facts.get("buffers", 1) == 1:
            here = copied * (1 + self.twice) + (a_tile * (1 + self.twice) if self.wgrad else 0)
            wait = CONSTANTS["map"] * self.blocks_k
            yield Phase(
                "wait", 1, Cost(0, wait + here * self.threads / CONSTANTS["intake"], 0, 0, 0)
            )
        for cost, rows in code.tables():
            if pending or rows == 6:
                channels = self.rows if self.wgrad and rows == 6 else self.columns
                turns = math.ceil(rows * channels / self.threads / cost.bytes * 4)
                yield Phase("tables", turns * self.blocks_k, cost)
        if (self.forward or self.wgrad) and pending:
            for cost, treated in code.affine("input", True, False):
                yield Phase("affine", a_slab * (1 - seen) / treated, cost)
            for cost, turns in code.gather(s.dims == 3) if seen else ():
                yield Phase("gather", a_slab * seen / 16 * turns, cost)
        if not self.forward:
            values, width = (a_tile, self.rows) if self.wgrad else (a_slab, self.columns)
            lanes = 32 * min(1.0, -(-s.co // 8) * 8 / width)
            for cost, treated in code.affine("gradient", self.output_aligned, summing, lanes):
                yield Phase("gradient", values / treated, cost)
        total = self.voxels * self.rows * self.columns * self.blocks_k / 32
        if code.on_tensor_cores:  # 16 by 8 results from 32 bytes
            total *= size / 128
        for cost in code.products():
            turns = total * self.taps / cost.tensor / (self.threads / 32)
            yield Phase("products", turns, cost)
        if not self.wgrad:
            aligned = self.output_aligned if self.forward else self.input_aligned
            shares = code.epilogue(aligned, self.forward)
            for cost in shares:
                yield Phase("epilogue", a_tile / len(shares) / cost.bytes, cost)
        for cost in code.staging():
            yield Phase("epilogue", 2, cost)
        for cost in code.beside():
            yield Phase("epilogue", a_tile / cost.bytes, cost)
            wait = CONSTANTS["map"] + a_tile / 2 * self.threads / CONSTANTS["intake"]
            yield Phase("epilogue", 2, Cost(0, wait, 0, 0, 0))
        outer = (
            (1, self.blocks_k, self.steps)
            if "part" in self.facts
            else (1, self.steps, self.steps * 3)
        )
        for cost, turns in zip(code.containers(), outer, strict=False):
            yield Phase("rest", turns, cost)

    def _copies(self, loads: float, aligned: bool) -> Iterator[Phase]:
        cost = self.code.copy("slab", aligned)
        if loads and cost is not None:
            yield Phase("copies", loads / cost.bytes, cost)

    @property
    def grid(self) -> int:
        """Blocks of the launch; the groups follow from the tiles that a block takes."""
        s, each = self.shape, self.facts["tiles_a_block"]
        tiles = math.prod(-(-n // t) for n, t in zip(s.size, self.facts["tile"], strict=True))
        if self.wgrad:
            return -(-tiles * s.batch // each) * self.blocks_n * self.depths
        return -(-tiles // each) * self.blocks_n * s.batch

    def moved(self) -> tuple[float, float, float]:
        """Bytes of the kernel through memory and through the L2, and of the small kernels around it."""
        s, resized, size = self.shape, self.shape.subject.resized, self.shape.bytes
        voxels = s.batch * math.prod(s.size)
        fine, coarse = size * voxels * resized, size * voxels * resized / 2**s.dims
        x, y = size * voxels * s.ci - fine, size * voxels * s.co
        weight = size * s.ci * s.co * math.prod(s.kernel)
        tiles = self.grid * self.facts["tiles_a_block"]
        loads = self.slab * self.columns * self.blocks_k + self.voxels * self.rows
        if not (self.wgrad or self.facts.get("resident", True)):
            loads += self.taps * self.rows * self.columns * self.blocks_k
        # a resized map that the kernel does not gather is written in front of it
        first, x = (0.0, x + coarse) if self.views else (fine + coarse, x + fine)
        if self.forward:
            return x + y, tiles * size * loads, 3 * weight + first
        if self.wgrad:
            warps = self.threads // 32
            shares = max(1, warps * 32 * 16 // (self.rows * self.columns))
            slots = self.grid / self.blocks_n / self.depths * shares
            return x + 2 * y, tiles * size * loads, slots * weight / size * 8 + first
        # the gradient of a resized map is written at its full size and gathered behind the kernel
        return (
            2 * y + 2 * (x + fine * self.views),
            tiles * size * 2 * loads,
            3 * weight + fine + coarse,
        )


def scheduled(blocks: Iterable[float], places: int) -> float:
    """Clocks until all blocks are done, each of which begins where a place becomes free first."""
    free = [0.0] * places
    for clocks in blocks:
        heapq.heapreplace(free, free[0] + clocks)
    return max(free)


def predict(
    shape: Shape, kernel: str, name: str, facts: Mapping[str, Any], code: Kernel
) -> Prediction:
    """A kernel of a layer on the device ``name``."""
    gpu = GPUS[name]
    layer = Layer(shape, kernel, facts, code)
    warps = layer.threads // 32
    multiply = gpu.hmma if code.on_tensor_cores else gpu.ffma
    held = resident(code.registers, facts["shared_bytes"], warps, gpu.arch)
    sharing = max(1, min(held, -(-layer.grid // gpu.processors)))
    blocks: list[float] = []
    slowest: list[Time] = []
    for count, seen, summing in layer.variants():
        times = [timed(p, warps, multiply) for p in layer.phases(seen, summing)]
        slowest = max(slowest, times, key=lambda ts: sum(t.total for t in ts))
        blocks += [facts["tiles_a_block"] * together(times, sharing) + CONSTANTS["block"]] * count
    clocks = scheduled(blocks, gpu.processors * sharing)
    times = slowest
    dram, l2, around = layer.moved()
    terms = {"kernel": clocks / gpu.clock, "dram": dram / gpu.dram, "l2": l2 / gpu.l2}
    longest = max(terms, key=lambda t: terms[t])
    # one of a kernel beside the convolution: it packs the weights, and sums the weight's gradient
    seconds = terms[longest] + CONSTANTS["launch"] + around / gpu.dram
    parts: dict[str, float] = {}
    for t in times:
        parts[t.name] = parts.get(t.name, 0.0) + t.total
    binding = bound(times, sharing) if longest == "kernel" else longest
    clocks = together(times, sharing) / sharing
    rate = shape.flops / seconds / 1e12
    return Prediction(shape.subject.name, kernel, name, clocks, held, seconds, rate, binding, parts)


Kernels = Mapping[tuple[str, tuple[int, int]], Kernel]


def kernel_of(
    mangled: str, listing: Iterable[str], registers: int, wanted: str = DTYPE
) -> tuple[tuple[str, tuple[int, int]], Kernel] | None:
    """A convolution kernel of a type, by pass and channels of a block; None: another function."""
    name, dtype, channels = name_of(mangled)
    if dtype != wanted or channels is None or name not in PASSES:
        return None
    return (name, channels), Kernel(
        sass.Function(sass.parse(listing)), registers, CONSTANTS, TYPES[dtype][0]
    )


def read(library: Path, target: str) -> dict[tuple[str, tuple[int, int]], Kernel]:
    """The convolution kernels of a library for ``target`` (``sm_90a``)."""
    usage = dict(sass.resources(library, target))
    found = (kernel_of(n, lines, usage[n]["REG"]) for n, lines in sass.functions(library, target))
    return dict(f for f in found if f is not None)


def cases(arch: int) -> Iterator[tuple[Shape, str, str]]:
    """Every deciding layer in every pass that it has, on the devices of an architecture."""
    for subject in SUBJECTS:
        for name in PASSES:
            if name == "dgrad" and not subject.block.layer.input_grad:
                continue
            for device, gpu in GPUS.items():
                if gpu.arch == arch:
                    yield Shape.of(subject), name, device


def prediction(
    kernels: Kernels, module: ModuleType, shape: Shape, name: str, device: str
) -> Prediction:
    """Of one case.

    Raises:
        ValueError: a loop that the kernel must have is not recognised, or the kernel is not there.
    """
    facts = shape.facts(module, GPUS[device], name)
    rows, columns = facts["channels"]
    code = kernels.get((name, (rows, columns)))
    if code is None:
        raise ValueError(f"the library has no {name} of {rows} by {columns} channels")
    return predict(shape, name, device, facts, code)


def static_row(name: str, device: str, predict: Callable[[], Prediction]) -> dict[str, Any]:
    """A row of the static suite; FAILED where the model does not understand the kernel."""
    row = {"suite": "static", "case": f"clock model: {name}", "provider": device, "dtype": DTYPE}
    try:
        p = predict()
    except ValueError as error:
        return row | {"status": f"FAILED: {error}"}
    row |= {"predicted_us": p.seconds * 1e6, "predicted_tflops": p.tflops}
    return row | {"tile_clocks": p.tile_clocks, "binding": p.binding, "status": "ok"}


def rows(kernels: Kernels, module: ModuleType, arch: int) -> list[dict[str, Any]]:
    """Rows of the static suite."""
    return [
        static_row(
            f"{shape.subject.name} {name}",
            device,
            partial(prediction, kernels, module, shape, name, device),
        )
        for shape, name, device in cases(arch)
    ]


if __name__ == "__main__":
    from .clock_table import main

    sys.exit(main())
