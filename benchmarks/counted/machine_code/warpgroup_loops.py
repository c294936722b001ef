"""The parts of a kernel of warpgroup products (csrc/cuda/sm90) by the work of their loops, and its faults.

A kernel of a convolution has two nests of loops. One multiplies: the innermost loop with HGMMAs is its main loop,
and a loop with stores to global memory behind it the epilogue. The other brings: around copies (LDGSTS), the table
of a plane's voxels and the transform in place. The weight's gradient has all of these in one nest. As in
`kernel_loops`, neither names nor the order of loops count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .kernel_loops import Needs, is_
from .sass import Function, Instruction, Loop, Need, chain

PREFIX = "sm90_"
"""Beginning of these kernels' names."""

TARGET = "90a"
"""The target for which they are compiled; they are empty elsewhere."""

THREADS = {"sm90_fprop": 384, "sm90_dgrad": 384, "sm90_wgrad": 384}
REGISTERS = {name: 65536 // threads // 8 * 8 for name, threads in THREADS.items()}
"""Registers that a thread of one block a multiprocessor can have at its start."""

HGMMA, LOCAL = is_("HGMMA"), re.compile(r"\b(LDL|STL)\b")
COPY = is_("LDGSTS")
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d+)")
ROLES = {"sm90_fprop", "sm90_dgrad"}
"""Kernels whose warpgroups do different things, with registers as each needs them."""

DEMANDED = {
    "USETMAXREG.TRY_ALLOC": "registers are not taken",
    "USETMAXREG.DEALLOC": "registers are not given up",
}

STORES = 16
"""Stores of 16 bytes by a thread that write a unit's products to one map."""

SUMS = (32, 24, 8, 0)
"""FADDs for each such store of an epilogue, from all that training wants to none."""

HALVES = 2
"""Iterations of a loop around the one that writes, if there is one."""

BESIDE = ("FRND", "CALL", "LDG")
"""Instructions that an epilogue has only where less usual things are wanted."""


@dataclass(frozen=True)
class Turn:
    """An iteration of a warp: instructions, clocks if no other were there, a thread's bytes of shared memory."""

    issue: float
    chain: float
    shared: float = 0.0

    def __add__(self, other: Turn) -> Turn:
        return Turn(self.issue + other.issue, self.chain + other.chain, self.shared + other.shared)

    def times(self, turns: float) -> Turn:
        """So many of them, one behind the other."""
        return Turn(self.issue * turns, self.chain * turns, self.shared * turns)


NOTHING = Turn(0, 0)


class Warpgroups:
    """The loops of one kernel.

    Args:
        constants: clocks of latencies by name; see `clock_model.CONSTANTS`.
    """

    def __init__(self, function: Function, registers: int, constants: Mapping[str, float]) -> None:
        self.function, self.registers, self.constants = function, registers, constants
        self._copied: dict[bool, list[tuple[Turn, int]]] = {}
        self._transformed: dict[tuple[str, bool], tuple[Loop, Turn, int]] = {}

    def _own(self, loop: Loop, need: Need) -> int:
        """Instructions of a loop itself, without those of inner loops, that meet a condition."""
        return sum(map(need, self._instructions(loop.own)))

    def _instructions(self, blocks: set[int]) -> Iterator[Instruction]:
        for block in blocks:
            yield from self.function.blocks[block]

    @cached_property
    def main(self) -> Loop:
        """The loop of the products."""
        found = [i for i in self.function.loops if self._own(i, HGMMA)]
        if not found:
            raise ValueError("no loop of the kernel has products of warpgroups")
        return max(found, key=lambda i: self._own(i, HGMMA))

    @cached_property
    def units(self) -> Loop:
        """The loop over units or tiles around the products."""
        return [*self._around(self.main)][-1]

    @staticmethod
    def _around(loop: Loop) -> Iterator[Loop]:
        at: Loop | None = loop
        while at is not None:
            yield at
            at = at.parent

    @cached_property
    def planes(self) -> Loop:
        """The loop that brings: a plane, or a tile, an iteration. Without roles it is that of the products too."""
        commits = is_("LDGDEPBAR")
        if self._own(self.units, commits):
            return self.units
        found = [
            i
            for i in self.function.loops
            if self._own(i, commits)
            and not i.body & self.units.body
            and any(map(COPY, self._instructions(i.body)))
        ]
        if not found:
            raise ValueError("no loop of the kernel copies planes")
        return max(found, key=lambda i: sum(1 for _ in self._around(i)))

    def _copying(self, aligned: bool = True) -> list[Loop]:
        """Loops of asynchronous copies, or of those by loads of values where these have loops of their own."""
        own = [i for i in self.planes.inner if self._own(i, COPY)]
        if not aligned:
            wide = is_("STS", 16, 16)
            other = [i for i in self.planes.inner if self._own(i, wide) and i not in own]
            own = other or own
        return sorted(own, key=lambda i: i.header)

    def _tables(self) -> list[Loop]:
        """Loops that write a plane's table: they store numbers and read no memory."""
        reads = ("LDS", "LDG", "LDGSTS", "SYNCS")
        return [
            i
            for i in self.planes.inner
            if self._own(i, is_("STS", 4, 4)) and not any(self._own(i, is_(n)) for n in reads)
        ]

    def _transforms(self) -> list[Loop]:
        """Those of a plane: they load and store pieces of four channels around arithmetic."""
        piece = is_("STS", 8, 8)
        return [i for i in self.planes.inner if self._own(i, piece) and not self._own(i, COPY)]

    def _turn(self, path: Sequence[Instruction]) -> Turn:
        barriers = sum(i.name == "BAR" for i in path) * self.constants["barrier"]
        # in front of a copy stand loads of shared memory that are never carried out
        moved = sum(
            i.bytes
            for i in path
            if i.name == "LDGSTS" or (i.pipe == "shared" and not (i.predicated and i.bytes == 4))
        )
        return Turn(len(path), chain(path, self._latency, self.constants["read"]) + barriers, moved)

    def _latency(self, i: Instruction) -> float:
        """Clocks until the result of an instruction of variable latency is there."""
        pipes = {"load": "map", "shared": "shared", "constant": "constant"}
        return self.constants[pipes.get(i.pipe, "special")]

    def _activated(self, turn: Turn, values: float) -> Turn:
        """With the instructions of an activation, which the shortest way leaves out."""
        more = self.constants["activation"] * values
        return turn + Turn(more, more + self.constants["branch"])

    @cached_property
    def group(self) -> Turn:
        """A group of products, from the end of the one before the last to the next one."""
        path = self.function.path(self.main, [], HGMMA)
        assert path is not None
        return self._turn(path)

    @cached_property
    def group_products(self) -> int:
        """HGMMAs of a group."""
        path = self.function.path(self.main, [], HGMMA)
        assert path is not None
        return sum(map(HGMMA, path))

    def copies(self, aligned: bool = True) -> list[tuple[Turn, int]]:
        """Each loop of copies in the order of the code, with the chunks that a thread copies in an iteration.

        Args:
            aligned: asynchronously, 16 bytes at a time; else by loads of values.
        """
        if aligned in self._copied:
            return self._copied[aligned]
        found = []
        for loop in self._copying(aligned):
            sites = self._own(loop, COPY)
            work: Needs = [COPY] if aligned else [is_("STS", 16, 16), is_("LDG", 2, 2)]
            many: Needs = [(COPY, sites)]
            path = (self.function.path(loop, many) if aligned else None) or self.function.path(
                loop, work
            )
            if path is None:
                raise ValueError("no way through a loop of copies copies a chunk")
            chunks = sum(i.name == "LDGSTS" or (i.name == "STS" and i.bytes == 16) for i in path)
            found.append((self._turn(path), chunks))
        self._copied[aligned] = found
        return found

    @cached_property
    def find(self) -> Turn:
        """A number of a plane's table."""
        turns = []
        for loop in self._tables():
            if (path := self.function.path(loop, [is_("STS")])) is not None:
                turns.append(self._turn(path))
        if not turns:
            raise ValueError("no loop of the kernel writes a plane's table")
        return max(turns, key=lambda t: t.issue)

    def transform(self, which: str, summing: bool = False) -> tuple[Turn, int]:
        """Of four channels by a thread, with the voxels of an iteration.

        Args:
            which: the "input" in place, or the "gradient", beside which lies the raw output.
            summing: sums of the gradient are taken on the way.
        """
        _, turn, voxels = self._transform(which, summing)
        return turn, voxels

    def _transform(self, which: str, summing: bool) -> tuple[Loop, Turn, int]:
        if (which, summing) in self._transformed:
            return self._transformed[which, summing]
        load, store = is_("LDS", 8, 8), is_("STS", 8, 8)
        found = []
        for loop in self._transforms():
            voxels, loads = self._own(loop, store), self._own(loop, load)
            if (loads > voxels) != (which == "gradient"):
                continue
            needs: Needs = [(load, loads), (store, voxels), is_("FFMA")]
            if (path := self.function.path(loop, needs)) is not None:
                turn = self._activated(self._turn(path), 4 * voxels)
                found.append((loop, turn, voxels))
        if not found:
            raise ValueError(f"no loop of the kernel transforms the {which}")
        one = (max if summing else min)(found, key=lambda f: f[1].issue / f[2])
        self._transformed[which, summing] = one
        return one

    @cached_property
    def plane(self) -> Turn:
        """The code of the bringing loop around all that."""
        held: Needs = [*self._tables(), *self._copying()[:1]]
        path = self.function.path(self.planes, held) or self.function.path(self.planes, [])
        assert path is not None
        return self._turn(path)

    def tile(self, summing: bool) -> Turn:
        """The code around all that in a kernel without roles; ``summing``: in blocks that sum the gradient."""
        transforms = [self._transform(w, summing)[0] for w in ("input", "gradient")]
        held: Needs = [self.main, *self._tables(), *self._copying()[:2], *transforms]
        path = self.function.path(self.planes, held)
        if path is None:
            raise ValueError("no way through the loop of the tiles passes all that a tile needs")
        return self._turn(path)

    @cached_property
    def epilogue(self) -> tuple[Turn, int]:
        """An iteration that writes some of a unit's products, with all that training wants, and their number."""
        for loop in self.units.inner:
            if self._own(loop, _store) and (found := self._writing(loop)) is not None:
                return found
            for inner in loop.inner:
                found = self._writing(inner) if self._own(inner, _store) else None
                path = self.function.path(loop, [inner])
                if found is not None and path is not None:
                    turn, turns = found
                    return self._turn(path) + turn.times(turns / HALVES), HALVES
        raise ValueError("no way through the epilogue writes products")

    def _writing(self, loop: Loop) -> tuple[Turn, int] | None:
        matrix, load = is_("STSM"), is_("LDSM")
        # activations that need more than multiplications are no way to that many, nor older gradients
        path = self.function.path(loop, [matrix], _usual)
        stores = 0 if path is None else sum(map(matrix, path))
        loads = stores if self._own(loop, load) else 0
        for sums in SUMS if stores else ():
            needs: Needs = [(_store, stores), (matrix, stores), (load, loads)]
            path = self.function.path(loop, [*needs, (is_("FADD"), sums * stores)], _usual)
            if path is not None and not any(i.name in BESIDE for i in path):
                turn = self._turn(path)
                # where all values are compared the way has the activation in it
                if sum(map(is_("FSETP"), path)) < 8 * stores:
                    turn = self._activated(turn, 8 * stores)
                return sum((self._once(i) for i in loop.inner), turn), STORES // stores
        return None

    def _once(self, loop: Loop) -> Turn:
        """An iteration of a loop of arithmetic inside an epilogue, mostly its only one; of other loops nothing."""
        for sums in SUMS if self._own(loop, is_("FFMA")) >= SUMS[-2] else ():
            path = self.function.path(loop, [(is_("FADD"), sums)], _usual)
            if path is not None and not any(i.name in BESIDE for i in path):
                return self._turn(path)
        return NOTHING

    @cached_property
    def ahead(self) -> Turn:
        """The copies of half of a unit's x in front of the products; nothing in a forward pass."""
        loops = [i for i in self.units.inner if not self._own(i, _store) and not i.inner]
        # those of less usual maps copy one chunk in an iteration
        loop = max(loops, key=lambda i: self._own(i, COPY), default=None)
        if loop is None or not self._own(loop, COPY):
            return NOTHING
        path = self.function.path(loop, [(COPY, 2)]) or self.function.path(loop, [COPY])
        assert path is not None
        return self._turn(path).times(STORES / 2 / sum(map(COPY, path)))


def _store(i: Instruction) -> bool:
    """Whether an instruction stores 16 bytes of a thread to a map."""
    return i.name in ("STG", "ST") and i.bytes == 16


def _usual(i: Instruction) -> int:
    return -(i.name in BESIDE)


def nest(kernel: Warpgroups) -> set[int]:
    """Blocks of the main loop and of the loops around it, without the epilogue and what else a unit has."""
    around = [*Warpgroups._around(kernel.main)]
    inside = around[-2] if len(around) > 1 else around[0]
    return set(inside.body)


def faults(
    name: str, listing: Sequence[str], function: Function, usage: Mapping[str, int]
) -> list[str]:
    """What is wrong with the machine code of a kernel named ``sm90_...``."""
    text = "".join(listing)
    kernel = Warpgroups(function, usage["REG"], {})
    demanded = DEMANDED if name in ROLES else {}
    found = [why for instruction, why in demanded.items() if instruction not in text]
    if re.search(r"\bHMMA\b", text):
        found.append("HMMA beside HGMMA")
    if usage["REG"] > REGISTERS[name]:
        found.append(f"{usage['REG']} of {REGISTERS[name]} registers")
    if usage["STACK"] or usage.get("LOCAL", 0):
        found.append(f"spills {usage['STACK']} B")
    try:
        main = kernel.main
    except ValueError:
        return [*found, "no HGMMA"]
    inside = {i.address for b in main.body for i in function.blocks[b]}
    around = {i.address for b in nest(kernel) for i in function.blocks[b]}
    closing, waits = 0, 0
    for address, line in _addressed(listing):
        if address in around and LOCAL.search(line):
            found.append(f"local memory in the loops of the products at {address:#x}")
        if address not in inside:
            continue
        if re.search(r"\bLDG\b", line):
            found.append(f"a load from global memory in the main loop at {address:#x}")
        closing += "HGMMA" in line and "gsb0" in line
        if wait := WAIT.search(line):
            waits += 1
            if wait[1] != "0x1":
                found.append(f"the main loop waits for all products at {address:#x}")
    if waits > closing:
        found.append(f"{waits} waits for {closing} groups in the main loop")
    return found


def _addressed(listing: Sequence[str]) -> Iterator[tuple[int, str]]:
    for line in listing:
        if match := re.search(r"/\*([0-9a-f]{4,})\*/", line):
            yield int(match[1], 16), line
