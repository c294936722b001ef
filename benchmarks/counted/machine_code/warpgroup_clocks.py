"""Clocks of the convolutions by warpgroup products (csrc/cuda/sm90) without a GPU, for the ten layers that decide.

A block of threads of a convolution is simulated: one warpgroup that brings planes, two that multiply, the tensor
cores that these share, and the mbarriers at which they meet. What a warp needs for an iteration of each loop comes
from the machine code (`warpgroup_loops`, `sass.chain`), how many there are from the plan. Warpgroups wait for
each other as in the kernel, and no more: one's products hide the other's epilogue where the planes and the weights
are there in time. On each of the four schedulers is one warp of every warpgroup: an instruction waits for a clock
as often as another warp issues one.

A block takes no less than its warps have instructions for a scheduler, and than all that passes through shared
memory: operands of the products, copies, transform, staging. A kernel takes no less than its bytes through L2 and
memory. What it writes value by value, where channels do not fill 16 bytes, counts as if they did.
``python -m benchmarks.counted.machine_code.clock_model`` prints both models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from . import sass
from .clock_model import CONSTANTS, DTYPE, GPUS, Prediction, Shape, cases, scheduled, static_row
from .kernel_loops import name_of
from .warpgroup_block import CREW, PLANE, ROOM, WARPGROUPS, Tile, Work, simulated
from .warpgroup_loops import NOTHING, PREFIX, TARGET, Turn, Warpgroups

ROW_TAPS = 3
"""Taps of a row of the kernel, which a warpgroup of the weight's gradient has."""

NEARLY = 0.95
"""Share of a block's clocks from which on a unit's capacity binds it."""


class Plan:
    """The work of a layer's kernel: from its facts and its code."""

    def __init__(
        self, shape: Shape, kernel: str, facts: Mapping[str, Any], code: Warpgroups
    ) -> None:
        self.shape, self.kernel, self.facts, self.code = shape, kernel, facts, code
        self.rows, self.columns = facts["channels"]
        self.depths = shape.kernel[0]
        self.backward = kernel == "dgrad"
        self.crew = 3 * CREW if kernel == "wgrad" else CREW  # threads that bring
        self.ci, self.co = (shape.co, shape.ci) if self.backward else (shape.ci, shape.co)
        self.blocks_n = -(-self.co // self.rows)
        if kernel == "wgrad":
            self.blocks_n *= -(-self.ci // self.columns) * self.depths

    @property
    def pending(self) -> bool:
        """Whether an affine is pending on the input."""
        return self.shape.subject.block.layer.input_grad

    def _input(self, voxels: int) -> Turn:
        """Copies of a plane of the input."""
        copy, chunks = self.code.copies(self.shape.ci % 8 == 0)[0]
        return copy.times(voxels * self.columns / 8 / self.crew / chunks)

    def _gradient(self, voxels: int, channels: int) -> Turn:
        """Copies of a plane of the gradient and of the raw output beside it, by a loop each or both by one."""
        loops = self.code.copies(self.shape.co % 8 == 0)[self.kernel == "wgrad" :]
        most = max(chunks for _, chunks in loops)
        both = [(copy, chunks / 2) for copy, chunks in loops if chunks == most]
        alone = len(loops) == 1 or most > min(chunks for _, chunks in loops)
        used = both[:1] if alone else loops[:2]
        turns = voxels * channels / 8 / self.crew
        return sum((copy.times(turns / chunks) for copy, chunks in used), NOTHING)

    def _found(self, voxels: int, rounded: int) -> Turn:
        """The table of a plane, whose numbers fill ``rounded``."""
        return self.code.find.times(math.ceil(-(-voxels // rounded) * rounded / self.crew))

    def _turns(self, voxels: int, columns: int, which: str, summing: bool = False) -> int:
        """Iterations of a plane's transform."""
        _, each = self.code.transform(which, summing)
        return math.ceil(voxels / (each * (self.crew // (columns // 4))))

    def _transformed(self, voxels: int, columns: int, which: str, summing: bool = False) -> Turn:
        turn, _ = self.code.transform(which, summing)
        return turn.times(self._turns(voxels, columns, which, summing))

    def work(self) -> Work:
        """Of a block of a convolution."""
        facts, code, columns = self.facts, self.code, self.columns
        voxels = math.prod(facts["plane"])
        taps = (self.shape.kernel[1] + facts["shifts"] - 1) * self.shape.kernel[2]
        blocks_k = -(-self.ci // columns)
        planes = []
        for k in range(blocks_k):
            slices = -(-min(columns, self.ci - k * columns) // 16)
            for j in range(self.depths + 1):
                own = tuple(0 <= j - number < self.depths for number in range(2))
                planes.append((own, taps * slices))
        copy = self._gradient(voxels, columns) if self.backward else self._input(voxels)
        epilogue, turns = code.epilogue
        transform, pumps = NOTHING, 0
        if self.backward or self.pending:
            which = "gradient" if self.backward else "input"
            transform = self._transformed(voxels, columns, which)
            pumps = self._turns(voxels, columns, which) // 2
        return Work(
            planes=tuple(planes),
            around=code.plane,
            table=self._found(voxels, 4096 // columns),
            copy=copy,
            copy_bytes=voxels * min(columns, self.ci) * 2.0 * (1 + self.backward),
            transform=transform,
            slice=WARPGROUPS["slice"],
            slice_bytes=WARPGROUPS["slice bytes"],
            group=code.group,
            group_slices=code.group_products // 2,
            epilogue=epilogue,
            turns=turns,
            ahead=code.ahead,
            slots=facts["slots"],
            rooms=0 if facts["resident"] else facts["stages"],
            room_slices=facts["part"],
            pumps=pumps,
        )

    def tile(self, summing: bool) -> Tile:
        """Of the gradient at the weight; ``summing``: of a block that takes the sums of the gradient."""
        code, columns = self.code, self.columns
        (voxels, outputs), taps = self._tile_voxels(), self.shape.kernel[1]
        one = taps == 1
        steps = outputs / 16 / (3 if one else 1)
        # of a group of products by a warpgroup: a row of the taps
        groups = 3 * steps * (1 if one else ROW_TAPS)
        transform = self._transformed(outputs, self.rows, "gradient", summing)
        if self.pending:
            transform += self._transformed(voxels, columns, "input")
        parts = {
            "own code": code.tile(summing),
            "starts products": code.group.times(steps),
            "table": self._found(voxels, 4 * self.crew * 8 // columns)
            + self._found(outputs, 4 * self.crew * 8 // self.rows),
            "copies": self._input(voxels) + self._gradient(outputs, self.rows),
            "transform": transform,
        }
        bytes_a_group = (self.rows + columns) * 16 * 2.0
        moved = sum(turn.shared for turn in parts.values()) * self.crew + groups * bytes_a_group
        # 64 rows by N columns by 16 take N / 2 clocks
        return Tile(tuple(parts.items()), groups * columns / 2, moved)

    def _tile_voxels(self) -> tuple[int, int]:
        """Voxels of the input and of the gradient that a tile of the gradient at the weight has."""
        _, h, w = self.facts["tile"]
        return (h + self.shape.kernel[1] - 1) * (w + self.shape.kernel[2] - 1), h * w

    def blocks(self) -> list[tuple[int, int, bool]]:
        """Kinds of blocks: how many, their units, and whether they take the sums of the gradient."""
        each, groups = self.facts["tiles_a_block"], self.facts["groups"]
        weight = self.kernel == "wgrad"
        units = math.prod(
            -(-n // t) for n, t in zip(self.shape.size, self.facts["tile"], strict=True)
        )
        units *= self.shape.batch if weight else 1
        times = self.blocks_n * (1 if weight else self.shape.batch)
        last = units - (groups - 1) * each
        shares = [(groups - 1, each), (1, last)] if last != each else [(groups, each)]
        summing = -(-self.co // self.rows) if weight else 0
        found = [(n * summing, u, True) for n, u in shares if n and summing]
        return found + [
            (n * (times - summing), u, False) for n, u in shares if n and times > summing
        ]

    def moved(self) -> tuple[float, float, float]:
        """Bytes of the kernel through memory and through the L2, and of the small kernels around it."""
        s, resized = self.shape, self.shape.subject.resized
        voxels = s.batch * math.prod(s.size)
        around = 2.0 * voxels * resized * (1 + 1 / 2**s.dims)  # a resized map is written in front
        x, y = 2.0 * voxels * s.ci, 2.0 * voxels * s.co
        weight = 2.0 * s.ci * s.co * math.prod(s.kernel)
        blocks = self.blocks()
        units, launched = sum(n * u for n, u, _ in blocks), sum(n for n, _, _ in blocks)
        if self.kernel == "wgrad":
            slots, (inputs, outputs) = self.facts["groups"], self._tile_voxels()
            copied = inputs * min(self.columns, s.ci) + 2 * outputs * min(self.rows, s.co)
            return x + 2 * y, units * copied * 2.0, slots * weight * 4 + around
        work = self.work()
        loads = units * len(work.planes) * work.copy_bytes
        slices = sum(n for who, n in work.planes if who[0])
        loads += (units if work.rooms else launched) * slices * 2048.0
        if self.backward:
            return 2 * (x + y), loads + 2 * x, 3 * weight + around
        return x + y, loads + y, 3 * weight + around


Spent = tuple[float, dict[str, float], str]
"""Clocks of a block without its beginning and end, its parts, and which of them binds."""


def _tiles(tile: Tile, tiles: int) -> Spent:
    """A block of the gradient at the weight. Its first tile waits for its copies."""
    each, busy = tile.clocks(), tile.busy()
    parts = {name: turn.chain * tiles for name, turn in tile.parts}
    most = max(busy, key=lambda n: busy[n])
    why = most if busy[most] >= NEARLY * each else max(parts, key=lambda n: parts[n])
    first = each + CONSTANTS["map"]
    return each * tiles + first, parts | {n: c * tiles for n, c in busy.items()}, why


def _block(plan: Plan, units: int) -> Spent:
    """A block of a convolution."""
    block, needed = simulated(plan.work(), units)
    busy = block.busy()
    most = max(busy, key=lambda n: busy[n])
    spent, brings = {n: block.spent[n] for n in sorted(block.spent)}, block.brings()
    # what the warpgroups that multiply are at, and if they wait, what the one that brings is at
    why = max((n for n in spent if n != ROOM), key=lambda n: spent[n])
    why = max(brings, key=lambda n: brings[n]) if why == PLANE else why
    return needed, spent | brings | busy, most if busy[most] >= NEARLY * needed else why


def predict(
    shape: Shape, kernel: str, device: str, facts: Mapping[str, Any], code: Warpgroups
) -> Prediction:
    """A kernel of a layer on a device."""
    gpu, plan = GPUS[device], Plan(shape, kernel, facts, code)
    clocks: list[float] = []
    parts: dict[str, float] = {}
    why, longest, tile = "", 0.0, 0.0
    for count, units, summing in plan.blocks():
        needed, spent, binding = (
            _tiles(plan.tile(summing), units) if kernel == "wgrad" else _block(plan, units)
        )
        taken = needed + WARPGROUPS["ends"]
        clocks += [taken] * count
        if taken > longest:
            longest, tile, why = taken, taken / units, binding
            parts = {n: c / units for n, c in spent.items()}
    dram, l2, around = plan.moved()
    terms = {
        "kernel": scheduled(sorted(clocks, reverse=True), gpu.processors) / gpu.clock,
        "dram": dram / gpu.dram,
        "l2": l2 / gpu.l2,
    }
    slowest = max(terms, key=lambda t: terms[t])
    seconds = terms[slowest] + CONSTANTS["launch"] + around / gpu.dram
    name, rate = PREFIX + kernel, shape.flops / seconds / 1e12
    binding = why if slowest == "kernel" else slowest
    return Prediction(shape.subject.name, name, device, tile, 1, seconds, rate, binding, parts)


Kernels = Mapping[tuple[str, int], Warpgroups]
"""Kernel and, of the weight's gradient, input channels of a block (else 0) -> its loops."""


def kernel_of(
    mangled: str, listing: Iterable[str], registers: int, wanted: str = DTYPE
) -> tuple[tuple[str, int], Warpgroups] | None:
    """A kernel of warpgroups of a type; None: another function."""
    name, dtype, channels = name_of(mangled)
    if not name.startswith(PREFIX) or dtype != wanted:
        return None
    key = name, channels[1] if channels is not None else 0
    return key, Warpgroups(sass.Function(sass.parse(listing)), registers, CONSTANTS)


def read(library: Path) -> dict[tuple[str, int], Warpgroups]:
    """The kernels of a library; none where it is not compiled for them."""
    target = f"sm_{TARGET}"
    usage = dict(sass.resources(library, target))
    names = [n for n in usage if name_of(n)[0].startswith(PREFIX)]
    listings = sass.functions(library, target, names) if names else ()
    found = (kernel_of(n, lines, usage[n]["REG"]) for n, lines in listings)
    return dict(f for f in found if f is not None)


def prediction(
    kernels: Kernels, module: ModuleType, shape: Shape, name: str, device: str
) -> Prediction:
    """Of one case.

    Raises:
        ValueError: a loop that the kernel must have is not recognised, or the kernel is not there.
    """
    facts = shape.facts(module, GPUS[device], name, "always")
    if facts.get("instruction") != "wgmma":
        raise ValueError(facts.get("why_not_wgmma", "the library has no kernels of warpgroups"))
    key = PREFIX + name, facts["channels"][1] if name == "wgrad" else 0
    if key not in kernels:
        raise ValueError(f"the library has no {key[0]} of {facts['channels']} channels")
    return predict(shape, name, device, facts, kernels[key])


def predictions(kernels: Kernels, module: ModuleType) -> Iterator[Prediction]:
    """Every deciding layer in every pass that it has, on the devices that have warpgroup products."""
    if kernels:
        for shape, name, device in cases(90):
            yield prediction(kernels, module, shape, name, device)


def taken(module: ModuleType) -> list[tuple[str, str]]:
    """Layers and passes where the plan takes these kernels."""
    plans = ((s, n, s.facts(module, GPUS[device], n, "where faster")) for s, n, device in cases(90))
    found = [(s.subject.name, n) for s, n, facts in plans if facts.get("instruction") == "wgmma"]
    return list(dict.fromkeys(found))


def rows(kernels: Kernels, module: ModuleType) -> list[dict[str, Any]]:
    """Rows of the static suite."""
    return [
        static_row(
            f"{shape.subject.name} {PREFIX}{name}",
            device,
            partial(prediction, kernels, module, shape, name, device),
        )
        for shape, name, device in (cases(90) if kernels else ())
    ]
