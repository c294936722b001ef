"""The time of a convolution with its block on a GPU, by route: the package's one cost model.

A layer is a list of *kernels*, those of a route. A kernel's time is the largest of three terms, and its launches
are added (the terms overlap inside a kernel, launches of small kernels do not):

    dram    bytes that must come from or go to memory / bandwidth of a copy that is larger than the L2
    l2      bytes that the multiprocessors read or write through the L2 / bandwidth of a copy inside the L2
    matrix  the vendor's convolution: 2 · voxels · Ci · Co · K, in whole blocks of channels / (share · rate of a
            matrix product); a CUDA convolution of ours: clocks of its tiles / clock rate

The clocks are figures of the clock model (``clocks.json``, made from the CUDA kernels' machine code by
``python -m benchmarks.counted.machine_code.clock_figures``). Assumed are the vendor's share of the matrix rate and
the share of the bandwidth that passes with sums reach: medians of what an H200 did in bfloat16. What is measured
takes the place of both: ceilings of a device, and tables of plans (``fastfilm tune``), which decide before any
estimate.

The *floor* of a layer counts each convolution's input, weight and output once and its arithmetic at the full rate.
No version runs faster, unless it computes something else (Winograd).

Tiles of Triton's kernels are ranked by the same terms (`space`). A convolution written as an implicit matrix
product reads each input voxel once for every tap and every block of output channels, and each weight once for
every tile: all of that counts for the L2, as if taps found nothing in the L1.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

PASSES = ("fprop", "dgrad", "wgrad")
LIMITERS = ("dram", "l2", "matrix", "launch")

VENDOR_SHARE = {"fprop": 0.62, "dgrad": 0.62, "wgrad": 0.51}
"""Share of the matrix rate that the vendor's convolution reaches, by pass: medians of ten layers on an H200."""

SUMMING_SHARE = 0.6
"""Share of a copy's bandwidth of our passes that take sums over a map: 0.5 to 0.7 on an H200."""

VENDOR_CHANNELS = (64, 32)
"""Channels that the vendor's convolution produces and sums over at a time, as its times on an H200 say."""

NARROW = 8
"""Channels below which a map is read by values, and the vendor copies the other map to another layout."""

TILE_VOXELS = 256
"""Voxels of a tile of the CUDA kernels (``csrc/cuda/plan.h``)."""

WIDE = 64
"""Output channels of a CUDA block where a map has enough tiles for all multiprocessors, half of it elsewhere."""

PARTIALS = 4096
"""Sums of a tap that a block of the CUDA weight gradient writes."""

FIGURES = Path(__file__).parent / "clocks.json"
FLOAT32 = 4


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of a device: rates and bandwidths that it reaches at most.

    Attributes:
        bandwidth: bytes/s of a large copy, read plus written.
        matrix: FLOP/s of a large matrix product by dtype.
        l2: bytes/s of a copy that stays in the L2; None: not known, the term is left out.
        launch: seconds that a launch takes when nothing hides it.
        processors: multiprocessors.
        arch: 10 · compute capability; the figures of the CUDA kernels are those of the nearest one.
    """

    bandwidth: float
    matrix: Mapping[str, float]
    l2: float | None = None
    launch: float = 0.0
    processors: int = 1
    arch: int = 90

    def rate(self, dtype: str) -> float:
        """FLOP/s of a dtype; the slowest one known if that dtype is not."""
        return self.matrix.get(dtype) or min(self.matrix.values())


H200 = Ceilings(
    4.3e12,
    {"bfloat16": 790e12, "float16": 790e12, "tf32": 415e12, "float32": 51e12},
    launch=4e-6,
    processors=132,
)
"""Copy, dense products and a launch, all measured on one; what is not known is left out."""


@dataclass(frozen=True)
class Convolution:
    """A convolution on one batch; ``size`` and ``output`` are spatial sizes, ``itemsize`` bytes a value.

    Attributes:
        affine: something is pending on the input (a norm, an activation, FiLM).
        moments: a norm behind it takes statistics of the output.
        input_grad: a training step needs the gradient of the input.
    """

    batch: int
    cin: int
    cout: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    size: tuple[int, ...]
    output: tuple[int, ...]
    itemsize: int = 2
    transposed: bool = False
    affine: bool = True
    moments: bool = True
    input_grad: bool = True

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel)

    @property
    def flops(self) -> int:
        """Of one pass, forward or either half of backward (a multiply-add is two)."""
        places = math.prod(self.size if self.transposed else self.output)
        return 2 * self.batch * places * self.cin * self.cout * self.taps

    @property
    def x_bytes(self) -> int:
        """The input, once."""
        return self.itemsize * self.batch * self.cin * math.prod(self.size)

    @property
    def y_bytes(self) -> int:
        """The output, once."""
        return self.itemsize * self.batch * self.cout * math.prod(self.output)

    @property
    def w_bytes(self) -> int:
        """The weight, once."""
        return self.itemsize * self.cin * self.cout * self.taps

    @property
    def moved(self) -> int:
        """Bytes of input, weight and output, once each."""
        return self.x_bytes + self.y_bytes + self.w_bytes

    def passes(self, mode: str) -> tuple[str, ...]:
        """The convolutions of a mode: "inference" or "forward", "backward", "training"."""
        backward = PASSES[1:] if self.input_grad else PASSES[2:]
        if mode in ("training", "forward+backward"):
            return (PASSES[0], *backward)
        return backward if mode == "backward" else PASSES[:1]


class Tile(NamedTuple):
    """A program's part of the result: ``voxels`` by ``out`` channels, ``inner`` channels summed at a time.

    ``edge``: height and width of the voxels where they are a rectangle of one sample and depth; None: they follow
    each other over the whole batch.
    """

    voxels: int
    out: int
    inner: int
    edge: tuple[int, int] | None = None


def whole(value: int, step: int) -> int:
    """``value`` rounded up to a multiple of ``step``."""
    return -(-value // step) * step


def programs(c: Convolution, tile: Tile) -> int:
    """Programs of a forward pass: one for each tile of voxels and block of output channels."""
    blocks = -(-c.cout // tile.out)
    if tile.edge is None:
        return -(-c.batch * math.prod(c.output) // tile.voxels) * blocks
    *depth, height, width = c.output
    th, tw = tile.edge
    return c.batch * math.prod(depth) * -(-height // th) * -(-width // tw) * blocks


def waves(count: int, processors: int, resident: int = 1) -> float:
    """How often ``count`` programs fill the device."""
    return count / (processors * resident)


def tail(count: int, processors: int, resident: int = 1) -> float:
    """Time of whole waves over that of the work spread evenly: 2 for one program more than fits."""
    exact = waves(count, processors, resident)
    return math.ceil(exact) / exact if exact else 1.0


def l2_bytes(c: Convolution, tile: Tile) -> int:
    """Bytes through the L2 of an implicit matrix product: inputs for every tap, weights for every tile."""
    count = programs(c, tile)
    inputs = count * tile.voxels * c.taps * whole(c.cin, min(tile.inner, c.cin))
    weights = count * c.taps * c.cin * min(tile.out, c.cout)
    return c.itemsize * (inputs + weights) + c.y_bytes


def padded_flops(c: Convolution, tile: Tile) -> int:
    """Arithmetic of whole tiles: channels and voxels rounded up."""
    return 2 * programs(c, tile) * tile.voxels * tile.out * whole(c.cin, tile.inner) * c.taps


@dataclass(frozen=True)
class Kernel:
    """Bytes through memory and L2; padded FLOPs and their share of the rate.

    Attributes:
        busy: seconds of the multiprocessors, where they are known and FLOPs are not.
        launches: with those of small kernels around it.
    """

    name: str
    dram: float
    l2: float = 0.0
    flops: float = 0.0
    share: float = 1.0
    busy: float = 0.0
    launches: int = 1


@dataclass(frozen=True)
class Terms:
    """Seconds by limiter, and the time they come to."""

    dram: float
    l2: float
    matrix: float
    launch: float
    total: float

    @property
    def limiter(self) -> str:
        """The largest of the terms, which most of the time goes to."""
        return max(LIMITERS, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Estimate:
    """A layer in one mode.

    Attributes:
        floor: seconds that no version can go below.
        terms: seconds of each limiter over all its kernels; ``terms.total`` is the estimate.
        kernels: name -> seconds of each kernel.
    """

    floor: float
    terms: Terms
    kernels: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """The estimate."""
        return self.terms.total

    @property
    def limiter(self) -> str:
        """The term whose kernels take most of the time."""
        return self.terms.limiter


def time(kernel: Kernel, dtype: str, ceilings: Ceilings) -> Terms:
    """Terms of one kernel."""
    dram = kernel.dram / ceilings.bandwidth
    l2 = kernel.l2 / ceilings.l2 if ceilings.l2 else 0.0
    matrix = kernel.busy + kernel.flops / (kernel.share * ceilings.rate(dtype))
    launch = kernel.launches * ceilings.launch
    return Terms(dram, l2, matrix, launch, max(dram, l2, matrix) + launch)


def vendor_flops(c: Convolution, name: str) -> int:
    """Arithmetic of a pass of the vendor's convolution in whole blocks of channels.

    Both halves of the backward pass are as much work as the forward pass.
    """
    least, inner = VENDOR_CHANNELS
    produced, summed = (c.cin, c.cout) if name == "dgrad" else (c.cout, c.cin)
    return c.flops // (c.cin * c.cout) * whole(produced, least) * whole(summed, inner)


@functools.lru_cache(maxsize=1)
def figures() -> dict[str, Any]:
    """The clock model's figures of the CUDA kernels."""
    found: dict[str, Any] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return found


def _class(channels: int, known: Iterable[int]) -> int:
    """The class of a number of channels: the least one that holds it, or the largest; 1 for fewer than 8."""
    ordered = sorted(known)
    if channels < NARROW:
        return ordered[0]
    return next((n for n in ordered if n >= channels), ordered[-1])


def ours(c: Convolution, name: str, dtype: str, ceilings: Ceilings) -> tuple[float, int]:
    """Seconds that a pass of a CUDA convolution keeps the multiprocessors busy, and its blocks of threads.

    Kernels of a stride are taken for those of stride 1 on its output, and its input's gradient for one of 1 × 1:
    they take longer than that.
    """
    known = figures()
    arch = min(known["clocks"], key=lambda a: (abs(int(a) - ceilings.arch), a))
    taps = 1 if name == "dgrad" and max(c.stride) > 1 else c.taps
    table = known["clocks"][arch]["bfloat16" if dtype == "float16" else dtype][f"{name} {taps}"]
    produced, summed = (c.cin, c.cout) if name == "dgrad" else (c.cout, c.cin)
    tiles = -(-math.prod(c.size if name == "dgrad" else c.output) // TILE_VOXELS)
    classes = [tuple(map(int, key.split("x"))) for key in table]
    if c.batch * tiles * -(-produced // WIDE) < ceilings.processors:
        classes = [k for k in classes if k[0] < WIDE]
    out = _class(produced, {k[0] for k in classes})
    inner = _class(summed, {k[1] for k in classes})
    rows, columns, alone, shared, further = table[f"{out}x{inner}"]
    blocks = -(-produced // rows)
    if name == "wgrad":
        tiles *= c.batch
        blocks *= -(-summed // columns) * (c.kernel[0] if len(c.kernel) == 3 else 1)
    else:
        blocks *= c.batch
    # groups of tiles fill the places of the device, two on a multiprocessor
    places = 2 * ceilings.processors
    each = -(-tiles // max(1, min(tiles, places // blocks)))
    blocks *= -(-tiles // each)
    longer = 1 + further / shared * max(0, -(-(summed - inner) // columns))
    once = alone if blocks <= ceilings.processors else 2 * shared * -(-blocks // places)
    return float((known["block"] + each * once * longer) / known["clock"][arch]), blocks


def _ours(name: str, c: Convolution, dtype: str, ceilings: Ceilings) -> Kernel:
    """One pass of the fused route, with the small kernels around it: packed weights, merged sums."""
    x, y = c.x_bytes, c.y_bytes
    # the raw input is read for the chain rule of what is pending on it, the raw output for that of the moments
    maps = {
        "fprop": x + y,
        "dgrad": x * (1 + c.affine) + y * (1 + c.moments),
        "wgrad": x + y * (1 + c.moments),
    }
    busy, blocks = ours(c, name, dtype, ceilings)
    around = 3 * c.w_bytes
    if name == "wgrad":
        around = 2 * FLOAT32 * PARTIALS * math.prod(c.kernel[-2:]) * blocks
    return Kernel(name, maps[name] + around, busy=busy, launches=2)


def _vendors(name: str, c: Convolution) -> list[Kernel]:
    """One pass of the vendor's convolution."""
    found = [Kernel(name, c.moved, flops=vendor_flops(c, name), share=VENDOR_SHARE[name])]
    if min(c.cin, c.cout) < NARROW:
        wide = max(c.x_bytes, c.y_bytes)
        found.append(_pass("layout", wide, wide))
    return found


def _pass(name: str, *moved: float, summing: bool = False, launches: int = 1) -> Kernel:
    """A pass over maps; one with sums has small kernels behind it."""
    return Kernel(name, sum(moved) / (SUMMING_SHARE if summing else 1), launches=launches)


def kernels(
    c: Convolution, route: str, mode: str, dtype: str = "bfloat16", ceilings: Ceilings = H200
) -> list[Kernel]:
    """The kernels of a route.

    Args:
        route: "fused" (the CUDA kernels: affine in the prologue, moments in the epilogue) or "composed" (a pass
            for either, the vendor's convolution between).
        mode: "inference", "forward", "training", "backward".

    Raises:
        ValueError: another route.
    """
    if route not in ("fused", "composed"):
        raise ValueError(f"route must be one of fused, composed, got {route!r}")
    if route == "fused":
        return [_ours(name, c, dtype, ceilings) for name in c.passes(mode)]
    parts = {name: _vendors(name, c) for name in c.passes(mode)}
    x, y = c.x_bytes, c.y_bytes
    found: list[Kernel] = []
    if "fprop" in parts:
        if c.affine and mode != "inference":
            found.append(_pass("apply", x, x))
        found += parts["fprop"]
        if c.moments and mode == "inference":
            found.append(_pass("apply", y, y))
        elif c.moments:
            found.append(_pass("moments", y, summing=True, launches=3))
    if "wgrad" not in parts:
        return found
    if c.moments:
        found.append(_pass("moments_backward", y, y, y, summing=True, launches=2))
    if c.affine:
        found.append(_pass("apply", x, x))
    if "dgrad" in parts:
        found += parts["dgrad"]
        if c.affine:
            found.append(_pass("apply_backward", x, x, x, summing=True, launches=2))
    return [*found, *parts["wgrad"]]


def floor(c: Convolution, mode: str, dtype: str, ceilings: Ceilings) -> float:
    """Seconds: max(compulsory bytes / bandwidth, FLOPs / rate), times the convolutions of the mode."""
    once = max(c.moved / ceilings.bandwidth, c.flops / ceilings.rate(dtype))
    return len(c.passes(mode)) * once


def estimate(c: Convolution, route: str, mode: str, dtype: str, ceilings: Ceilings) -> Estimate:
    """Floor and estimated time of a layer by a route; ``dtype`` "tf32" or "float32" for float32 maps."""
    timed = [(k.name, time(k, dtype, ceilings)) for k in kernels(c, route, mode, dtype, ceilings)]
    return Estimate(floor(c, mode, dtype, ceilings), total(t for _, t in timed), _by_name(timed))


def _by_name(timed: Sequence[tuple[str, Terms]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, terms in timed:
        found[name] = found.get(name, 0.0) + terms.total
    return found


def added(terms: Iterable[Terms]) -> Terms:
    """Sum of terms, one by one."""
    found = dict.fromkeys((*LIMITERS, "total"), 0.0)
    for t in terms:
        for name in found:
            found[name] += getattr(t, name)
    return Terms(**found)


def total(terms: Iterable[Terms]) -> Terms:
    """Sum of kernels; each one's time counts for the term that limits it, and its launch for the launch."""
    return added(_attributed(t) for t in terms)


def _attributed(t: Terms) -> Terms:
    parts = {"dram": t.dram, "l2": t.l2, "matrix": t.matrix}
    busiest = max(parts, key=lambda name: parts[name])
    rest = {name: value if name == busiest else 0.0 for name, value in parts.items()}
    return Terms(**rest, launch=t.launch, total=t.total)
