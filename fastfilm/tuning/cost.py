"""What a convolution with its block should cost on a GPU: an analytic estimate from measured ceilings.

A layer is a list of *kernels*, one for each launch of a route. A kernel's time is the largest of three terms, and
the launch is added (the terms overlap inside a kernel, launches of small kernels do not):

    dram    bytes that must come from or go to memory / bandwidth of a copy that is larger than the L2
    l2      bytes that the multiprocessors read or write through the L2 / bandwidth of a copy inside the L2
    matrix  2 · voxels · Ci · Co · K, padded to whole tiles and whole waves / (share · rate of a matrix product)

A convolution written as an implicit matrix product reads each input voxel once for every tap and every block of
output channels, and each weight once for every tile: all of that goes through the L2, and once through memory.

The *floor* of a layer counts each convolution's input, weight and output once and its arithmetic at the full rate.
No version runs faster, unless it computes something else (Winograd).

What is assumed and not measured: the share of the matrix rate that a convolution reaches, that a multiprocessor
holds one program of a convolution at a time, and that taps find nothing in the L1: the L2's term is an upper
bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

PASSES = ("fprop", "dgrad", "wgrad")
LIMITERS = ("dram", "l2", "matrix", "launch")

FUSED_SHARE = 0.1
VENDOR_SHARE = 0.6
"""Shares of the matrix rate of Triton's fused convolutions and the vendor's: medians of ten layers on an H200."""

VENDOR_TILE = (128, 128, 64)
"""Voxels, output and input channels of a tile that the vendor's convolution is taken to have."""

FLOAT32 = 4


@dataclass(frozen=True)
class Ceilings:
    """What a device can do at most.

    Attributes:
        bandwidth: bytes/s of a large copy, read plus written.
        matrix: FLOP/s of a large matrix product by dtype.
        l2: bytes/s of a copy that stays in the L2; None: not known, the term is left out.
        launch: seconds that a launch takes when nothing hides it.
        processors: multiprocessors.
    """

    bandwidth: float
    matrix: Mapping[str, float]
    l2: float | None = None
    launch: float = 0.0
    processors: int = 1

    def rate(self, dtype: str) -> float:
        """FLOP/s of a dtype; the slowest one known if that dtype is not."""
        return self.matrix.get(dtype) or min(self.matrix.values())


H200 = Ceilings(4.3e12, {"bfloat16": 790e12, "float16": 790e12}, processors=132)
"""Copy and dense bfloat16 product, both measured on one; what is not known is left out."""


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
    """One launch: bytes through memory and L2, FLOPs (padded, with the last wave's tail), share of the rate."""

    name: str
    dram: float
    l2: float = 0.0
    flops: float = 0.0
    share: float = 1.0


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
        """What the time goes to: the largest of the terms."""
        return max(LIMITERS, key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Estimate:
    """A layer in one mode.

    Attributes:
        floor: seconds that no version can go below.
        terms: seconds of each limiter over all its kernels; ``terms.total`` is the estimate.
        kernels: name -> seconds of each launch.
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
    """Terms of one launch."""
    dram = kernel.dram / ceilings.bandwidth
    l2 = kernel.l2 / ceilings.l2 if ceilings.l2 else 0.0
    matrix = kernel.flops / (kernel.share * ceilings.rate(dtype))
    return Terms(dram, l2, matrix, ceilings.launch, max(dram, l2, matrix) + ceilings.launch)


def _map(name: str, *moved: float) -> Kernel:
    """A pointwise pass: all it moves goes through L2 and memory."""
    return Kernel(name, sum(moved), sum(moved))


def _tile_for(c: Convolution, route: str) -> Tile:
    if route != "fused":
        voxels, out, inner = VENDOR_TILE
        return Tile(voxels, _channels(c.cout, out), _channels(c.cin, inner))
    return Tile(8 * 16, _channels(c.cout, 64), _channels(c.cin, 64), (8, 16))


def _channels(count: int, most: int) -> int:
    return max(16, min(most, 1 << max(count - 1, 0).bit_length()))


def _convolution(
    name: str, c: Convolution, route: str, processors: int, tile: Tile | None
) -> Kernel:
    """One pass of a convolution. Both halves of the backward pass are as much work as the forward pass."""
    shape = tile or _tile_for(c, route)
    maps = {
        "fprop": c.x_bytes + c.y_bytes,
        # the fused one reads the raw input again for the chain rule of what is pending on it
        "dgrad": c.y_bytes + c.x_bytes * (2 if route == "fused" and c.affine else 1),
        "wgrad": c.y_bytes + c.x_bytes,
    }[name]
    count = programs(c, shape)
    partials = 0
    if route == "fused" and name == "fprop" and c.moments:
        # mean and squared deviations of each tile, written and read again
        partials = 2 * 2 * FLOAT32 * count // -(-c.cout // shape.out) * c.cout
    # a weight's gradient has its sum over voxels split until the device is full
    waste = 1.0 if name == "wgrad" else tail(count, processors)
    return Kernel(
        name,
        maps + c.w_bytes + partials,
        l2_bytes(c, shape) + partials,
        padded_flops(c, shape) * waste,
        FUSED_SHARE if route == "fused" else VENDOR_SHARE,
    )


def kernels(
    c: Convolution, route: str, mode: str, processors: int = 1, tile: Tile | None = None
) -> list[Kernel]:
    """The launches of a route.

    Args:
        route: "fused" (affine in the prologue, moments in the epilogue), "composed" (a pass for either, the
            vendor's convolution between) or "floor" (the convolutions alone).
        mode: "inference", "training", "backward".
        tile: of the fused kernels; None: the usual one.
    """
    if route not in ("fused", "composed", "floor"):
        raise ValueError(f"route must be one of fused, composed, floor, got {route!r}")
    shape = tile if route == "fused" else None
    parts = {n: _convolution(n, c, route, processors, shape) for n in c.passes(mode)}
    if route == "floor":
        return list(parts.values())
    composed, x, y = route == "composed", c.x_bytes, c.y_bytes
    found: list[Kernel] = []
    if "fprop" in parts:
        if composed and c.affine and mode != "inference":
            found.append(_map("apply", x, x))
        found.append(parts["fprop"])
        if composed and c.moments:
            found.append(_map("apply", y, y) if mode == "inference" else _map("moments", y))
    if "wgrad" not in parts:
        return found
    if c.moments:
        found.append(_map("moments_backward", y, y, y))
    if composed and c.affine:
        found.append(_map("apply", x, x))
    if "dgrad" in parts:
        found.append(parts["dgrad"])
        if composed and c.affine:
            found.append(_map("apply_backward", x, x, x))
    return [*found, parts["wgrad"]]


def floor(c: Convolution, mode: str, dtype: str, ceilings: Ceilings) -> float:
    """Seconds: max(compulsory bytes / bandwidth, FLOPs / rate), times the convolutions of the mode."""
    once = max(
        (c.x_bytes + c.y_bytes + c.w_bytes) / ceilings.bandwidth, c.flops / ceilings.rate(dtype)
    )
    return len(c.passes(mode)) * once


def estimate(
    c: Convolution,
    route: str,
    mode: str,
    dtype: str,
    ceilings: Ceilings,
    tile: Tile | None = None,
) -> Estimate:
    """Floor and estimated time of a layer by a route."""
    timed = [
        (k.name, time(k, dtype, ceilings))
        for k in kernels(c, route, mode, ceilings.processors, tile)
    ]
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
