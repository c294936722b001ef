"""The loops of a convolution kernel by the work they do, and the cost of an iteration.

A loop is recognised by its instructions: products by HMMA (of IEEE float32 by FFMA), copies by LDGSTS (of a slab
with many instructions for each, of weights with few), the affine by loads and stores of shared memory around
arithmetic, the epilogue by stores to global memory, a view by a nest around wide loads from there. Neither names
nor the order of loops count, so the kernels may change without this file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .sass import Function, Instruction, Loop, Need, chain

WIDE = 8
"""Bytes from which on a load is one of several channels of a map, not one of a table."""

BOX = 16
"""Instructions for each copy from which on a loop walks over the voxels of a box; weights lie in a row."""

TYPES = {
    "f": "fp32",
    "NS0_11TensorFloatE": "tf32",
    "NS0_8BFloat16E": "bf16",
    "NS0_7Float16E": "fp16",
}

SUMS = 16
"""FFMAs from which on a loop that stores nothing is one of float32 products."""

Needs = list[Need | Loop | tuple[Need, int]]


def name_of(mangled: str) -> tuple[str, str, tuple[int, int] | None]:
    """Kernel, type and channels of a block of a mangled name."""
    kind = r"(f|NS0_8BFloat16E|NS0_7Float16E|NS0_11TensorFloatE)"
    # of a namespace of their own: kernels of warpgroups, for sm_90a
    found = re.search(rf"entryINS0_4sm90.*?(Convolve|Wgrad)I{kind}(?:Li(\d+)E)?", mangled)
    if found is not None:
        gradient = "sm90_dgrad" if "Backward" in mangled else "sm90_fprop"
        channels = None if found[3] is None else (64, int(found[3]))
        return "sm90_wgrad" if found[1] == "Wgrad" else gradient, TYPES[found[2]], channels
    found = re.search(rf"(Convolve|Wgrad)I{kind}Li(\d+)ELi(\d+)E", mangled)
    if found is not None:
        kernel = "wgrad" if found[1] == "Wgrad" else "dgrad" if "Backward" in mangled else "fprop"
        return kernel, TYPES[found[2]], (int(found[3]), int(found[4]))
    found = re.search(rf"\d+([A-Z][A-Za-z]+)I{kind}(?:E|NS0_(4sm90)?)", mangled)
    if found is not None:
        return found[1] + " of warpgroups" * bool(found[3]), TYPES[found[2]], None
    found = re.search(r"\d([A-Z][A-Za-z]+)EEEvNT_6ParamsE$", mangled)
    return found[1] if found else mangled, "fp32", None


@dataclass(frozen=True)
class Cost:
    """An iteration of a warp.

    Attributes:
        issue: instructions.
        chain: clocks if no other warp were there.
        tensor: HMMAs; of float32 products FFMAs.
        shared: wavefronts of shared memory.
        bytes: of a thread's work; for products the same as ``tensor``.
    """

    issue: float
    chain: float
    tensor: float
    shared: float
    bytes: float


def is_(name: str, least: int = 0, most: int = 16) -> Need:
    """The condition that an instruction has a name and moves from ``least`` to ``most`` bytes a thread."""
    return lambda i: i.name == name and least <= i.bytes <= most


HMMA, FFMA, LDGSTS = is_("HMMA"), is_("FFMA"), is_("LDGSTS")


class Kernel:
    """The loops of one kernel.

    Args:
        constants: clocks of latencies and ways of bank conflicts by name; see `clock_model.CONSTANTS`.
        value: bytes of a number of the maps.
    """

    def __init__(
        self,
        function: Function,
        registers: int,
        constants: Mapping[str, float],
        value: int = 2,
    ) -> None:
        self.function, self.registers, self.constants = function, registers, constants
        self.value = value

    @cached_property
    def tiles(self) -> Loop:
        """The loop over tiles: the outermost one around products."""
        found = [i for i in self.function.loops if i.parent is None and i.body & self.multiplying]
        if not found:
            raise ValueError("no loop of the kernel has products of matrices")
        return found[0]

    @cached_property
    def on_tensor_cores(self) -> bool:
        """Whether products are HMMAs, not FFMAs."""
        return self._has(set(self.function.blocks), HMMA)

    @cached_property
    def multiplying(self) -> set[int]:
        """Blocks of the products."""
        blocks = self.function.blocks
        if self.on_tensor_cores:
            return {b for b in blocks if any(map(HMMA, blocks[b]))}
        found: set[int] = set()
        for loop in self.function.loops:
            names = Counter(i.name for b in loop.own for i in blocks[b])
            stores = names["STS"] + names["STG"] + names["LDGSTS"]
            if names["LDS"] and names["FFMA"] >= SUMS and not stores:
                found |= loop.own
        return found

    @cached_property
    def kinds(self) -> dict[int, str]:
        """Header of a loop inside that over tiles -> what it does."""
        return {loop.header: self._kind(loop) for loop in self._inside(self.tiles)}

    def loops(self, kind: str) -> list[Loop]:
        """All loops of a kind inside the loop over tiles."""
        return [i for i in self._inside(self.tiles) if self.kinds[i.header] == kind]

    def _inside(self, loop: Loop) -> Iterator[Loop]:
        for i in sorted(loop.inner, key=lambda i: i.header):
            yield i
            yield from self._inside(i)

    def _has(self, blocks: set[int], need: Need) -> bool:
        return any(need(i) for b in blocks for i in self.function.blocks[b])

    def _widest(self, loop: Loop, name: str) -> int:
        """Bytes of the widest instruction of a name in a loop itself."""
        return max(
            (i.bytes for b in loop.own for i in self.function.blocks[b] if i.name == name),
            default=0,
        )

    def _kind(self, loop: Loop) -> str:
        own, around = loop.own, loop.parent
        has = {n: self._has(own, is_(n)) for n in ("STG", "LDG", "STS", "LDS", "LDGSTS", "FFMA")}
        if own & self.multiplying:
            return "products"
        if loop.body & self.multiplying:
            return "container"
        if has["STG"]:
            # a maximum's window is a nest of loops inside the epilogue
            nested = around is not None and self._has(around.body - loop.body, is_("STG"))
            return "epilogue" if not nested or around.body & self.multiplying else "window"
        stored = around is not None and self._has(around.body, is_("STG"))
        if has["LDGSTS"] and stored and around is not None and not around.body & self.multiplying:
            return "beside"
        if has["LDGSTS"]:
            path = self.function.path(loop, [LDGSTS])
            each = len(path) / sum(map(LDGSTS, path)) if path is not None else BOX
            return "slab" if each >= BOX else "weights"
        if has["STS"] and has["LDS"] and has["FFMA"]:
            return "affine"
        if self._widest(loop, "LDG") >= WIDE:
            return "gather"
        if has["STS"] and has["LDG"] and not loop.inner:
            return "table"
        if has["STS"] and any(self._has(i.own, is_("STG")) for i in loop.inner):
            return "staging"
        return "other"

    def latency(self, i: Instruction) -> int:
        """Clocks until the result of an instruction of variable latency is there."""
        c = self.constants
        if i.name == "LDG":
            return int(c["map"] if i.bytes >= WIDE else c["table"] if i.bytes == 4 else c["near"])
        if i.pipe == "shared":
            return int(c["shared"])
        return int(c["constant"] if i.pipe == "constant" else c["special"])

    def _far(self, i: Instruction) -> int:
        """The same where narrow loads are of a map, too."""
        return int(self.constants["map"]) if i.name == "LDG" and i.bytes >= 4 else self.latency(i)

    def _near(self, i: Instruction) -> int:
        """The same for taps of a view, which neighbouring threads read too."""
        wide = i.name == "LDG" and i.bytes >= WIDE
        return int(self.constants["near"]) if wide else self.latency(i)

    def cost(
        self,
        path: Sequence[Instruction],
        work: str,
        piece: int = 0,
        conflicts: float = 1,
        latency: Callable[[Instruction], int] | None = None,
    ) -> Cost:
        """Of an iteration along ``path``, whose work are its instructions named ``work``.

        Args:
            piece: bytes of such an instruction; 0: all of them count.
            conflicts: wavefronts of a 4-byte access of shared memory, where those of the work are wider.
        """
        barriers = sum(i.name == "BAR" for i in path) * self.constants["barrier"]
        waves = 0.0
        for i in path:
            if i.name in ("LDS", "STS", "LDSM"):
                waves += i.bytes / 4 * (conflicts if i.bytes == 4 else 1)
            elif i.name == "LDGSTS":
                waves += i.bytes / 4
        return Cost(
            len(path),
            chain(path, latency or self.latency, self.constants["read"]) + barriers,
            sum(i.name == "HMMA" for i in path),
            waves,
            float(sum(i.bytes for i in path if i.name == work and i.bytes >= piece)),
        )

    def products(self) -> list[Cost]:
        """Each loop of products, with all of its matrix instructions (float32: FFMAs) on the way."""
        found = []
        multiply = HMMA if self.on_tensor_cores else FFMA
        for loop in self.loops("products"):
            path = self.function.path(loop, [multiply], multiply)
            assert path is not None
            cost = self.cost(path, "HMMA")
            if not self.on_tensor_cores:
                # threads of a warp read few different words, each load in one wavefront
                count, loads = sum(map(FFMA, path)), sum(i.name == "LDS" for i in path)
                cost = replace(cost, tensor=count, shared=loads, bytes=count)
            found.append(cost)
        return found

    def copy(self, kind: str, aligned: bool) -> Cost | None:
        """Copies of a slab, or of weights; not aligned: by ordinary loads and stores. None: no loop does it."""
        needs: Needs = (
            [LDGSTS] if aligned else [is_("STS", WIDE), is_("LDG", self.value, self.value)]
        )
        paths = [self.function.path(loop, needs) for loop in self.loops(kind)]
        costs = [self.cost(p, "LDGSTS" if aligned else "STS") for p in paths if p is not None]
        return min(costs, key=lambda c: c.issue / c.bytes, default=None)

    def tables(self) -> list[tuple[Cost, int]]:
        """Loops that bring coefficients into shared memory, each form once, with the rows of its table."""
        found: dict[int, tuple[Cost, int]] = {}
        for loop in self.loops("table"):
            narrow = is_("LDG", 4, 4)
            path = self.function.path(loop, [narrow, is_("STS", 4, 4)], narrow)
            if path is not None:
                cost = self.cost(path, "STS")
                rows = 6 if cost.bytes > 4 else 7
                found.setdefault(rows, (cost, rows))
        return list(found.values())

    def reads_map(self) -> bool:
        """Whether the gradient of the moments reads the raw output from global memory, not from a slab."""
        return self._has(self._affine_loop("gradient").own, is_("LDG", WIDE))

    def affine(
        self, which: str, aligned: bool, summing: bool, lanes: float = 32
    ) -> list[tuple[Cost, float]]:
        """The pending affine ("input") or the gradient of the moments ("gradient"), with the loop around it.

        Args:
            summing: sums of the gradient are taken on the way.
            lanes: threads of a warp that have channels.

        Returns:
            Costs with the bytes that an iteration treats; a loop around has chunks of 16.
        """
        loop = self._affine_loop(which)
        piece = self._widest(loop, "STS")
        needs: Needs = [is_("LDS", piece, piece), is_("STS", piece, piece), FFMA]
        width = (WIDE, 16) if aligned else (self.value, self.value)
        if which == "gradient" and self._has(loop.own, is_("LDG", *width)):
            needs.append(is_("LDG", *width))
        if which == "gradient" and summing and piece > 4 and self._has(loop.own, is_("STS", 4, 4)):
            needs.append(is_("STS", 4, 4))
        written = is_("STS", piece, piece)
        sites = sum(written(i) for b in loop.own for i in self.function.blocks[b])
        # of several voxels all are there, unless their stores are alternatives
        many: Needs = [(is_("LDS", piece, piece), sites), (written, sites), *needs[2:]]
        path = self.function.path(loop, many) or self.function.path(loop, needs)
        if path is None:
            raise ValueError(f"no way through the loop of the {which} does its work")
        conflicts = min(self.constants["sums conflict"], lanes) if piece > 4 else 1
        cost = self.cost(path, "STS", piece, conflicts)
        found = [(self._activated(cost, cost.bytes / 2), cost.bytes)]
        around = loop.parent
        if around is not None and self.kinds.get(around.header) == "other":
            outer = self.function.path(around, [loop])
            if outer is not None:
                found.append((self.cost(outer, "STS"), 16.0))
        return found

    def _affine_loop(self, which: str) -> Loop:
        """Of two, that of the gradient gathers nothing, loads from the map or takes sums, or is the later one."""
        loops = self.loops("affine")
        if not loops:
            raise ValueError("the kernel has no affine")

        def rank(loop: Loop) -> tuple[bool, bool, bool, int]:
            gathers = any(self._widest(i, "LDG") >= WIDE for i in self._inside(loop))
            loads = self._widest(loop, "LDG") >= WIDE
            sums = self._has(loop.own, is_("STS", 4, 4)) and self._widest(loop, "STS") > 4
            return not gathers, loads, sums, loop.header

        return max(loops, key=rank) if which == "gradient" else min(loops, key=rank)

    def _activated(self, cost: Cost, values: float) -> Cost:
        """With the instructions of an activation, which the shortest way leaves out."""
        more = self.constants["activation"] * values
        return replace(
            cost,
            issue=cost.issue + more,
            chain=cost.chain + more + self.constants["branch"],
        )

    def gather(self, volume: bool) -> list[tuple[Cost, int]]:
        """The nest of loops over a view's taps, from the voxel to the tap, with the iterations of each."""
        innermost = [i for i in self.loops("gather") if not i.inner]
        if not innermost:
            return []
        loop, counts = innermost[0], ([8, 4, 2, 1] if volume else [4, 2, 1, 1])
        path = self.function.path(loop, [is_("LDG", WIDE), FFMA])
        assert path is not None
        tap = self.cost(path, "LDG", latency=self._near)
        found = [(self._activated(tap, tap.bytes / 2), counts[0])]
        for count in counts[1:]:
            inner, around = loop, loop.parent
            if around is None or around is self.tiles or self.kinds[around.header] == "container":
                break
            loop = around
            path = self.function.path(loop, [inner])
            if path is not None:
                found.append((self.cost(path, "STS"), count))
        return found[::-1]

    def epilogue(self, aligned: bool, forward: bool) -> list[Cost]:
        """The loop that writes a tile's voxels, or several that write a share each.

        In a backward pass every wide store of it writes another voxel, each behind a load and the chain rule; in a
        forward pass stores of a voxel's raw and finished output are alternatives.
        """
        found: list[tuple[Loop, Cost]] = []
        for loop in self.loops("epilogue"):
            piece = self._widest(loop, "STG")
            width = (piece, piece) if aligned else (self.value, self.value)
            stores, loads = is_("STG", *width), is_("LDG", *width)
            needs: Needs = [stores, FFMA]
            # what is copied beside the products is not loaded; loads are of gradients that are added to, then
            loaded = self._has(loop.own, loads) and not self.loops("beside")
            if loaded:
                needs.append(loads)
            path = self.function.path(loop, needs)
            if path is None:
                continue
            sites = sum(stores(i) for b in loop.own for i in self.function.blocks[b])
            sites = sites // 2 if forward else sites
            if aligned and sites > 1:
                path = self._every_voxel(loop, path, stores, loads, sites) or path
            cost = self.cost(path, "STG", 0, self.constants["epilogue conflict"], self._far)
            if piece < WIDE:  # threads have neighbouring channels
                cost = replace(cost, shared=self.cost(path, "STG").shared)
            cost = self._activated(cost, cost.bytes / 2)
            found.append((loop, cost if aligned else replace(cost, bytes=float(piece))))
        if not found:
            raise ValueError("no way through the epilogue writes a voxel")
        around, loops = found[0][0].parent, [loop for loop, _ in found]
        if around is not None and all(i.parent is around for i in loops):
            one_after_the_other: Needs = [*loops]
            if self.function.path(around, one_after_the_other) is not None:
                return [cost for _, cost in found]
        return [min((c for _, c in found), key=lambda c: c.issue / c.bytes)]

    def _every_voxel(
        self, loop: Loop, once: Sequence[Instruction], stores: Need, loads: Need, sites: int
    ) -> list[Instruction] | None:
        """The way of a full tile through an epilogue that has ``sites`` voxels in an iteration.

        The chain rule is there for each of them in turn, or for all of them at once. At once it is where the way
        of one voxel already reads the staged float32 values of all.
        """
        multiplied = sum(map(FFMA, once))
        read = sum(i.bytes for i in once if i.name == "LDS")
        written = next(i.bytes for i in once if stores(i))
        for times in (sites, 1) if read >= 2 * written * sites else (sites,):
            many: Needs = [(stores, sites), (FFMA, times * multiplied)]
            many += [(loads, sites)] if any(map(loads, once)) else []
            # activations that need more than multiplications are no way to that many
            path = self.function.path(loop, many, lambda i: -(i.name == "MUFU"))
            if path is not None and (times == 1 or not any(i.name == "FRND" for i in path)):
                return path
        return None

    def beside(self) -> list[Cost]:
        """Loops that copy values of the map beside the staged products."""
        paths = [self.function.path(loop, [LDGSTS]) for loop in self.loops("beside")]
        return [self.cost(path, "LDGSTS") for path in paths if path is not None]

    def staging(self) -> list[Cost]:
        """Loops around the epilogue, through which the accumulators leave."""
        found = []
        for loop in self.loops("staging"):
            path = self.function.path(loop, [is_("STS"), *loop.inner[:1]])
            if path is not None:
                found.append(self.cost(path, "STS", 0, self.constants["staging conflict"]))
        return found

    def containers(self) -> list[Cost]:
        """Code around the loops, outer loop first: that of a tile, of a block of channels, of some taps."""
        found = []
        for loop in [self.tiles, *self.loops("container")]:
            kinds = ("container", "products", "staging", "epilogue")
            held: Needs = [i for i in loop.inner if self.kinds[i.header] in kinds]
            path = self.function.path(loop, held) or self.function.path(loop, held[:1])
            if path is not None:
                found.append(self.cost(path, "LDG", 0, self.constants["staging conflict"]))
        return found
