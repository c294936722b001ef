"""Candidate tiles of a shape: those that fit the GPU's limits, ranked by the cost model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from fastfilm.ops.settings.tables import FAMILIES

from . import cost
from .binary import SHARED_LIMIT
from .shapes import Shape

EDGES = ((8, 8), (8, 16), (16, 16), (4, 32))
ACCUMULATORS = (8, 128)
"""Least and most float32 sums that a thread holds: fewer do not pay for its loads, more spill."""

SHARE = 0.1
"""Of the matrix rate that Triton's convolutions reach: median of ten layers on an H200."""

RANKED = replace(cost.H200, l2=5.5e12)
"""Ceilings that candidates are ranked with; the L2's is assumed. Only the order matters."""


class Candidate(NamedTuple):
    """A tile of a kernel family: the fields of its ``Config``."""

    family: str
    fields: tuple[int, ...]

    def __str__(self) -> str:
        *tile, warps, stages = self.fields
        return f"{self.family} {'x'.join(map(str, tile))} w{warps} s{stages}"


def candidates(shape: Shape, family: str, arch: int, most: int = 16) -> list[Candidate]:
    """The ``most`` promising tiles, best first; a tile's next warps and stages stand two places behind it.

    Raises:
        ValueError: an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    made = _wgrad(shape, arch) if family == "wgrad" else _conv(shape, family, arch)
    by_tile: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for fields in made:
        by_tile.setdefault(fields[:-2], []).append(fields)
    # of equal candidates the one with the longer inner product
    ranked = sorted(by_tile, key=lambda tile: (estimated(shape, family, tile), -tile[-1]))
    order = sorted(
        (rank + 2 * variant, rank, fields)
        for rank, tile in enumerate(ranked)
        for variant, fields in enumerate(by_tile[tile])
    )
    return [Candidate(family, fields) for _, _, fields in order[:most]]


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _sizes(channels: int, most: int) -> list[int]:
    """Blocks of channels: up to the power of two that holds them all, the two or three largest."""
    top = max(16, min(most, _power(channels)))
    return [s for s in (16, 32, 64, 128) if top // 4 <= s <= top]


def _roles(shape: Shape, family: str) -> tuple[int, int]:
    """Channels that a program writes and that it sums over."""
    ci, co = shape.channels
    return (co, ci) if family == "fprop" else (ci, co)


def _conv(shape: Shape, family: str, arch: int) -> Iterator[tuple[int, ...]]:
    out, inner = _roles(shape, family)
    *_, height, width = shape.output
    itemsize = shape.convolution().itemsize
    for (th, tw), bn, bk in product(EDGES, _sizes(out, 128), _sizes(inner, 64)):
        voxels = th * tw
        if _waste(height, th) * _waste(width, tw) > 2 and (th, tw) != (8, 8):
            continue
        for warps, stages in _variants():
            sums = voxels * bn // (32 * warps)
            shared = stages * (voxels + bn) * bk * itemsize
            if ACCUMULATORS[0] <= sums <= ACCUMULATORS[1] and shared <= SHARED_LIMIT[arch]:
                yield th, tw, bn, bk, warps, stages


def _wgrad(shape: Shape, arch: int) -> Iterator[tuple[int, ...]]:
    ci, co = shape.channels
    itemsize = shape.convolution().itemsize
    # the matrix instructions of sm_90 and later take 64 rows
    rows = _sizes(co, 128) if arch < 90 else [s for s in (64, 128) if s <= max(64, _power(co))]
    for bm, bn, bp in product(rows, _sizes(ci, 64), (32, 64, 128)):
        for warps, stages in _variants():
            sums = bm * bn // (32 * warps)
            shared = stages * (bm + bn) * bp * itemsize
            if sums <= ACCUMULATORS[1] and shared <= SHARED_LIMIT[arch]:
                yield bm, bn, bp, warps, stages


def _variants() -> list[tuple[int, int]]:
    # first the depth of most tiles that ship, then deeper pipelines
    return [(8, 2), (4, 2), (8, 3), (4, 3), (8, 4), (4, 4)]


def _waste(length: int, tile: int) -> float:
    return math.ceil(length / tile) * tile / length


def estimated(shape: Shape, family: str, tile: tuple[int, ...], whole_waves: bool = True) -> float:
    """Seconds by the cost model (``th, tw, bn, bk`` or ``bm, bn, bp``), one program a multiprocessor.

    Without ``whole_waves`` the work counts as spread evenly.
    """
    c = shape.convolution()
    if family == "wgrad":
        bm, bn, _ = tile
        blocks = -(-c.cout // bm) * -(-c.cin // bn)
        voxels = c.batch * math.prod(c.output)
        moved = c.itemsize * c.taps * blocks * voxels * (bm + bn)
        flops = 2 * voxels * c.taps * blocks * bm * bn
        dram = c.x_bytes + c.y_bytes
    else:
        th, tw, bn, bk = tile
        if family == "dgrad":
            # the roles of input and output change places
            c = replace(c, cin=c.cout, cout=c.cin, output=c.size, size=c.output)
        t = cost.Tile(th * tw, bn, bk, (th, tw))
        moved, flops = cost.l2_bytes(c, t), cost.padded_flops(c, t)
        if whole_waves:
            flops = int(flops * cost.tail(cost.programs(c, t), RANKED.processors))
        dram = c.x_bytes + c.y_bytes
    kernel = cost.Kernel(family, dram, moved, flops, SHARE)
    terms = cost.time(kernel, shape.products, RANKED)
    # a tile may gain on the terms that do not limit it, so they count a little
    return terms.total + 0.1 * (terms.l2 + terms.matrix)
