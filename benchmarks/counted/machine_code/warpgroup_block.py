"""A block of threads of the kernels of warpgroups (csrc/cuda/sm90): who waits for whom, and how long.

In a convolution one warpgroup brings planes and starts the copies of weights, and two multiply. They meet at
mbarriers, and those that multiply share the tensor cores: this is simulated. In the gradient at the weight all
three do the same, and a tile's clocks are a sum. `warpgroup_clocks` says what they do, and what a kernel takes.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections import defaultdict
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from .clock_model import CONSTANTS
from .warpgroup_loops import Turn

WARPGROUPS = {
    # clocks of the tensor cores for 16 channels of a tap and both halves, at 4096 FLOP/clk, and bytes of shared
    # memory that these products read, twice 2 KB of weights and 4 KB of voxels; as the probes rate_* measured
    "slice": 128.0,
    "slice bytes": 12288.0,
    "port": 128.0,  # bytes a clock of shared memory; the probe rate_n64
    "poll": 50.0,  # clocks between two looks at a room while the warpgroup that brings waits; assumed
    # clocks of a block's beginning and end: constants, merging of sums; the other kernels' 12,000, less the
    # first copies and the first transform, which are simulated here
    "ends": 8000.0,
}

NEVER = 1e7
"""Clocks of waiting for a room behind which a block is taken for one that hangs."""

CREW = 128
"""Threads of a warpgroup."""


@dataclass
class Gate:
    """A phase of an mbarrier: it opens with the last of its arrivals."""

    arrivals: int
    opened: bool = False
    waiting: list[Process] = field(default_factory=list)


Process = Generator[float | Gate, None, None]
"""What a warpgroup does: it yields a time until which it is busy, or a gate at which it waits."""


class Timeline:
    """The warpgroups of a block, and the arrivals of copies, in the order of time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Process | Gate]] = []
        self._order = itertools.count()

    def at(self, time: float, what: Process | Gate) -> None:
        """A process goes on, or something arrives at a gate, at a time."""
        heapq.heappush(self._queue, (time, next(self._order), what))

    def arrive(self, gate: Gate) -> None:
        """One arrival, now."""
        gate.arrivals -= 1
        if gate.arrivals == 0:
            gate.opened = True
            for process in gate.waiting:
                self.at(self.now, process)

    def run(self) -> float:
        """Until nothing happens any more; the time of the end."""
        while self._queue:
            self.now, _, what = heapq.heappop(self._queue)
            if isinstance(what, Gate):
                self.arrive(what)
            else:
                self._resume(what)
        return self.now

    def _resume(self, process: Process) -> None:
        for wanted in process:
            if isinstance(wanted, Gate):
                if not wanted.opened:
                    wanted.waiting.append(process)
                    return
            elif wanted > self.now:
                self.at(wanted, process)
                return


def gates(arrivals: int) -> defaultdict[int, Gate]:
    """One for each number."""
    return defaultdict(lambda: Gate(arrivals))


@dataclass(frozen=True)
class Work:
    """What the warpgroups of a block do, in clocks.

    Attributes:
        planes: of a unit, for each whether each warpgroup multiplies it, and its slices of weights.
        around, table, copy, transform: of a plane; ``copy_bytes`` come from the L2.
        slice: clocks of the tensor cores for a slice of one warpgroup.
        group: clocks between a group's end and the next one's beginning, of ``group_slices`` slices.
        epilogue: of one of its ``turns`` a unit; ``ahead``: copies for half of them in front of the products.
        pumps: times that rooms for weights are filled during a transform.
        slots, rooms: for planes and for weights, ``room_slices`` slices in each; no rooms: all weights stay.
    """

    planes: tuple[tuple[tuple[bool, ...], int], ...]
    around: Turn
    table: Turn
    copy: Turn
    copy_bytes: float
    transform: Turn
    slice: float
    slice_bytes: float
    group: Turn
    group_slices: int
    epilogue: Turn
    turns: int
    ahead: Turn
    slots: int
    rooms: int = 0
    room_slices: int = 1
    pumps: int = 0

    @property
    def multiplying(self) -> int:
        """Warpgroups that multiply."""
        return len(self.planes[0][0])


PLANE, ROOM = "waits for a plane", "waits for a room"
"""What a warpgroup that multiplies, and the one that brings, may wait for."""


class Block:
    """A block of threads that computes ``units`` units.

    Args:
        others: share of the clocks in which other warps of a scheduler issue, for one that brings and for one
            that multiplies.
    """

    def __init__(self, work: Work, units: int, others: tuple[float, float] = (0.0, 0.0)) -> None:
        self.work, self.units, self.others = work, units, others
        self.time = Timeline()
        self.free = 0.0  # when the tensor cores are done with what they were given
        self.spent: defaultdict[str, float] = defaultdict(float)
        self.plane_full, self.plane_empty = gates(1), gates(work.multiplying)
        self.room_full, self.room_empty = gates(1), gates(work.multiplying)
        self.started = 0  # rooms of weights
        self.wanted = sum(len(self._rooms(n)) for _, n in self._own()) * units if work.rooms else 0

    def _own(self) -> Iterator[tuple[int, int]]:
        """Planes that the first warpgroup multiplies, with their slices."""
        for number, (multiplied, slices) in enumerate(self.work.planes):
            if multiplied[0]:
                yield number, slices

    def _rooms(self, slices: int) -> list[int]:
        """Slices of a plane, by the rooms in which they come."""
        each = self.work.room_slices
        return [min(each, slices - at) for at in range(0, slices, each)]

    def run(self) -> float:
        """Clocks until all warpgroups are done."""
        self.time.at(0.0, self._bring())
        for number in range(self.work.multiplying):
            self.time.at(0.0, self._multiply(number))
        return self.time.run()

    def _pump(self) -> None:
        """Starts the copies of weights for which there is room."""
        w = self.work
        while self.started < self.wanted:
            before = self.started - w.rooms
            if before >= 0 and not self.room_empty[before].opened:
                return
            come = CONSTANTS["map"] + w.room_slices * 2048 / CONSTANTS["intake"]
            self.time.at(self.time.now + come, self.room_full[self.started])
            self.started += 1

    def _clocks(self, turn: Turn, multiplies: bool) -> float:
        """Of some iterations, beside the other warps of the scheduler."""
        return turn.chain + turn.issue * self.others[multiplies]

    def _bring(self) -> Process:
        w, time = self.work, self.time
        copy, transform = (self._clocks(t, False) for t in (w.copy, w.transform))
        table = self._clocks(w.around + w.table, False)
        arrived = 0.0
        count = self.units * len(w.planes)
        self._pump()
        for plane in range(count):
            begun = time.now
            if plane >= w.slots:
                while not self.plane_empty[plane - w.slots].opened:
                    if time.now > begun + NEVER:
                        raise ValueError("the block never ends: no room for a plane becomes empty")
                    self._pump()
                    yield time.now + WARPGROUPS["poll"]
            self.spent[ROOM] += time.now - begun
            yield time.now + table
            yield arrived
            yield time.now + CONSTANTS["barrier"]
            come = time.now + CONSTANTS["map"] + w.copy_bytes / CONSTANTS["intake"]
            yield time.now + copy
            arrived = max(time.now, come)
            self._pump()
            if plane > 0:
                for _ in range(w.pumps + 1):
                    yield time.now + transform / (w.pumps + 1)
                    self._pump()
                time.arrive(self.plane_full[plane - 1])
        yield arrived
        yield time.now + transform
        time.arrive(self.plane_full[count - 1])
        while self.started < self.wanted:
            self._pump()
            yield time.now + WARPGROUPS["poll"]

    def _multiply(self, number: int) -> Process:
        w, time = self.work, self.time
        ahead, group = self._clocks(w.ahead, True), self._clocks(w.group, True)
        plane = room = 0
        before = 0.0  # end of the group before the last one
        done: list[Gate] = []  # rooms that are empty then

        def spend(what: str, begun: float) -> None:
            self.spent[what] += (time.now - begun) / w.multiplying

        def release() -> None:
            for gate in done:
                time.arrive(gate)
            done.clear()

        for _ in range(self.units):
            begun = time.now
            yield time.now + ahead
            spend("epilogue", begun)
            for multiplied, slices in w.planes:
                begun = time.now
                yield self.plane_full[plane]
                yield time.now + CONSTANTS["barrier"]
                spend(PLANE, begun)
                if not multiplied[number]:
                    time.arrive(self.plane_empty[plane])
                    plane += 1
                    continue
                for some in self._rooms(slices):
                    begun = time.now
                    if w.rooms:
                        yield self.room_full[room]
                    yield time.now + CONSTANTS["barrier"]
                    spend("waits for weights", begun)
                    begun = time.now
                    for at in range(0, some, w.group_slices):
                        self.free = max(self.free, time.now) + w.slice * min(
                            w.group_slices, some - at
                        )
                        ends = self.free
                        yield before
                        release()
                        before = ends
                        yield time.now + group
                    done += [self.room_empty[room]] * bool(w.rooms)
                    spend("products", begun)
                    room += 1
                done.append(self.plane_empty[plane])
                plane += 1
            begun = time.now
            yield before
            release()
            spend("products", begun)
            begun = time.now
            yield from self._epilogue()
            spend("epilogue", begun)

    def _epilogue(self) -> Process:
        """Turn after turn; copies that are ahead of it come in time, or are waited for."""
        w, time = self.work, self.time
        there: list[float] = []
        for turn in range(w.turns):
            if w.ahead.chain and turn >= w.turns // 2:
                yield there[turn - w.turns // 2]
            yield time.now + self._clocks(w.epilogue, True)
            there.append(time.now + CONSTANTS["map"])

    def brings(self) -> dict[str, float]:
        """Clocks of the warpgroup that brings, by what it does."""
        w, planes = self.work, self.units * len(self.work.planes)
        turns = {"own code": w.around, "table": w.table, "copies": w.copy, "transform": w.transform}
        return {f"brings: {n}": planes * self._clocks(t, False) for n, t in turns.items()}

    def issued(self) -> tuple[float, float]:
        """Instructions of a warp that brings, and of one that multiplies."""
        w, planes = self.work, self.units * len(self.work.planes)
        slices = self.units * sum(n * who[0] for who, n in w.planes)
        bring = planes * (w.around + w.table + w.copy + w.transform).issue
        own = self.units * (w.ahead + w.epilogue.times(w.turns)).issue
        return bring, own + slices / w.group_slices * w.group.issue

    def busy(self) -> dict[str, float]:
        """Clocks for which issue slots of a scheduler, tensor cores and shared memory are needed."""
        w, planes = self.work, self.units * len(self.work.planes)
        slices = self.units * sum(n * sum(who) for who, n in w.planes)
        bring, multiply = self.issued()
        moved = planes * (w.table + w.copy + w.transform).shared * CREW + slices * w.slice_bytes
        epilogue = w.ahead + w.epilogue.times(w.turns)
        moved += self.units * w.multiplying * epilogue.shared * CREW
        moved += self.started * w.room_slices * 2048
        return {
            "issue": bring + w.multiplying * multiply,
            "tensor": slices * w.slice,
            "shared memory": moved / WARPGROUPS["port"],
        }


ROUNDS = 3
"""Simulations of a block, each with the share of the issue slots that the one before had."""


@functools.lru_cache(maxsize=256)
def simulated(work: Work, units: int) -> tuple[Block, float]:
    """A block, and its clocks without its beginning and end."""
    others = 0.0, 0.0
    for _ in range(ROUNDS):
        block = Block(work, units, others)
        clocks = max(block.run(), *block.busy().values())
        bring, multiply = block.issued()
        beside = bring + (work.multiplying - 1) * multiply
        others = work.multiplying * multiply / clocks, beside / clocks
    return block, clocks


@dataclass(frozen=True)
class Tile:
    """A tile of a block whose three warpgroups do the same: each starts its products, and fills planes meanwhile.

    Attributes:
        parts: what a warp does, by its name.
        tensor: clocks of the tensor cores.
        moved: bytes through shared memory.
    """

    parts: tuple[tuple[str, Turn], ...]
    tensor: float
    moved: float

    def busy(self) -> dict[str, float]:
        """Clocks for which issue slots of a scheduler, tensor cores and shared memory are needed."""
        return {
            "issue": 3 * sum(turn.issue for _, turn in self.parts),
            "tensor": self.tensor,
            "shared memory": self.moved / WARPGROUPS["port"],
        }

    def clocks(self) -> float:
        """Of a tile: no fewer than a warp needs beside the two others of its scheduler."""
        busy = self.busy()
        chain, least = sum(turn.chain for _, turn in self.parts), max(busy.values())
        clocks = max(chain, least)
        for _ in range(ROUNDS):
            clocks = max(chain + busy["issue"] / 3 * min(1, busy["issue"] * 2 / 3 / clocks), least)
        return clocks
