"""Loops of a compiled kernel, read from its disassembly: their nesting, and the clocks of an iteration.

The last 64 bits of an instruction's encoding say how long the scheduler waits behind it and which scoreboard
it sets and waits for (Jia et al., "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", 2018;
the same up to sm_90). So the clocks that one warp needs for a sequence of instructions follow from the listing
and a table of latencies.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType

EXTENSION = "fastfilm.ops.launchers.cuda._CUDA"

LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);\s*/\* 0x[0-9a-f]{16} \*/"
)
CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
NO_SCOREBOARD = 7
TURNS = 3
"""Iterations after which all are alike."""

PIPES = {
    "tensor": "HMMA HGMMA",
    "shared": "LDS LDSM STS STSM",
    "load": "LDG LD",
    "store": "STG ST RED",
    "copy": "LDGSTS",
    "special": "MUFU I2F F2I F2F I2FP",
    "constant": "LDC ULDC LDCU",
    "barrier": "BAR",
    "branch": "BRA BRX EXIT RET CALL BSSY BSYNC JMP WARPSYNC",
}
"""Instructions by the unit that executes them; all others belong to "alu"."""

_PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: name with suffixes.
        predicated: it has a condition.
        target: of a branch.
        stall: clocks until the warp may issue the next one.
        result, operands: scoreboards that are set until the result is there and until the operands are read.
        waits: scoreboards that must be clear before, a bit each.
    """

    address: int
    opcode: str
    predicated: bool = False
    target: int | None = None
    stall: int = 1
    result: int = NO_SCOREBOARD
    operands: int = NO_SCOREBOARD
    waits: int = 0

    @cached_property
    def name(self) -> str:
        """Opcode without suffixes."""
        return self.opcode.partition(".")[0]

    @cached_property
    def pipe(self) -> str:
        """Unit that executes it."""
        return _PIPE.get(self.name, "alu")

    @cached_property
    def bytes(self) -> int:
        """Bytes a thread of a load, a store or a copy."""
        if self.name == "LDSM":
            return 16 if self.opcode.endswith(".4") else 8 if self.opcode.endswith(".2") else 4
        for size in (128, 64):
            if f".{size}" in self.opcode:
                return size // 8
        return (
            2 if "16" in self.opcode else 1 if ".U8" in self.opcode or ".S8" in self.opcode else 4
        )


def parse(lines: Iterable[str]) -> list[Instruction]:
    """Instructions of one function of a listing by ``cuobjdump -sass``."""
    found: list[Instruction] = []
    pending: tuple[int, str, bool, int | None] | None = None
    for line in lines:
        if match := LINE.search(line):
            address, guard, opcode, operands = match.groups()
            target = None
            if opcode.startswith(("BRA", "CALL", "JMP")) and (jump := TARGET.search(operands)):
                target = int(jump[1], 16)
            # the condition of some branches is an operand
            conditional = guard is not None or (target is not None and "P" in operands)
            pending = int(address, 16), opcode, conditional, target
        elif pending is not None and (match := CONTROL.match(line)):
            word = int(match[1], 16)
            control = word >> 41 & 15, word >> 46 & 7, word >> 49 & 7, word >> 52 & 63
            found.append(Instruction(*pending, *control))
            pending = None
    return found


def extension() -> Path | None:
    """The file of the CUDA extension; None where it was not built."""
    spec = importlib.util.find_spec(EXTENSION)
    return None if spec is None or spec.origin is None else Path(spec.origin)


def load(library: Path) -> ModuleType:
    """The module of a CUDA extension, which need not be the installed one."""
    if library == extension():
        return importlib.import_module(EXTENSION)
    spec = importlib.util.spec_from_file_location("_CUDA", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tool() -> str:
    """The disassembler in Triton's package."""
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def resources(library: Path, target: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Mangled name of each function of a library for ``target``, and its registers, stack and the like."""
    command = [tool(), "-arch", target, "-res-usage", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pattern = r"Function (\S+):\s+(REG:.*)"
    for name, usage in re.findall(pattern, done.stdout + done.stderr):
        yield name, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", usage)}


def functions(
    library: Path, target: str, only: Sequence[str] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Mangled name and listing of each function of a library for ``target`` (``sm_90a``), or of those named."""
    named = ["-fun", ",".join(only)] if only else []
    command = [tool(), "-arch", target, "-sass", *named, str(library)]
    # of a library's parts all but one lack a function that is named, and it says so
    quiet = subprocess.DEVNULL if only else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        assert process.stdout is not None
        name, lines = "", list[str]()
        for line in process.stdout:
            if "Function :" in line:
                if name:
                    yield name, lines
                name, lines = line.split(":")[1].strip(), []
            else:
                lines.append(line)
        if name:
            yield name, lines
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")


@dataclass
class Loop:
    """A natural loop: the blocks of its body, and the loops directly inside of it."""

    header: int
    body: set[int]
    latches: set[int]
    parent: Loop | None = None
    inner: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> set[int]:
        """Blocks that belong to no inner loop."""
        return self.body - set().union(*(i.body for i in self.inner))


Need = Callable[[Instruction], bool]


@dataclass
class Function:
    """Basic blocks of a function, the edges between them, and its loops."""

    instructions: Sequence[Instruction]

    @cached_property
    def blocks(self) -> dict[int, list[Instruction]]:
        """First address -> instructions."""
        starts = {self.instructions[0].address} if self.instructions else set()
        for here, after in itertools.pairwise(self.instructions):
            if here.target is not None or here.name in ("EXIT", "BRX", "RET"):
                starts.add(after.address)
            if here.target is not None:
                starts.add(here.target)
        found: dict[int, list[Instruction]] = {}
        for i in self.instructions:
            if i.address in starts:
                found[i.address] = []
                here_list = found[i.address]
            here_list.append(i)
        return found

    @cached_property
    def edges(self) -> dict[int, list[int]]:
        """Block -> blocks that may follow.

        A call returns, but one with a condition is how sm_80 leaves a loop. An indirect branch is taken to fall
        through.
        """
        order, found = list(self.blocks), {}
        for at, following in itertools.zip_longest(order, order[1:]):
            last = self.blocks[at][-1]
            jumps = last.name != "CALL" or last.predicated
            to = [last.target] if last.target in self.blocks and jumps else []
            ends = last.name in ("EXIT", "RET", "BRA", "JMP") and not last.predicated
            if following is not None and not ends and following not in to:
                to.append(following)
            found[at] = to
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, outer ones first; those with a common header are one."""
        before: dict[int, set[int]] = {b: set() for b in self.blocks}
        for b, following in self.edges.items():
            for f in following:
                before[f].add(b)
        found: dict[int, Loop] = {}
        for b, header in self._back_edges():
            loop = found.setdefault(header, Loop(header, {header}, set()))
            loop.latches.add(b)
            work = [b]
            while work:
                at = work.pop()
                if at not in loop.body:
                    loop.body.add(at)
                    work += before[at]
        ordered = sorted(found.values(), key=lambda loop: -len(loop.body))
        for i, loop in enumerate(ordered):
            around = [o for o in ordered[:i] if loop.body < o.body]
            if around:
                loop.parent = around[-1]
                loop.parent.inner.append(loop)
        return ordered

    def _back_edges(self) -> Iterator[tuple[int, int]]:
        """Edges to a block that is still being visited; compiled loops have one entry, so these close loops."""
        if not self.blocks:
            return
        root = next(iter(self.blocks))
        stack, active, seen = [(root, iter(self.edges[root]))], {root}, {root}
        while stack:
            at, following = stack[-1]
            for to in following:
                if to in active:
                    yield at, to
                elif to not in seen:
                    seen.add(to)
                    active.add(to)
                    stack.append((to, iter(self.edges[to])))
                    break
            else:
                stack.pop()
                active.discard(at)

    def path(
        self,
        loop: Loop,
        needs: Sequence[Need | Loop | tuple[Need, int]],
        most: Callable[[Instruction], int] | None = None,
    ) -> list[Instruction] | None:
        """The shortest way through a loop's body that meets every need; None: there is none.

        Instructions of inner loops are left out. A need is a condition that an instruction, or so many of them,
        must meet, or an inner loop that the way has to pass. Of all ways, those whose instructions have the
        largest sum of ``most`` come first.
        """
        inside = {b: i for i in loop.inner for b in i.body}
        wanted = tuple(n[1] if isinstance(n, tuple) else 1 for n in needs)

        def node(b: int) -> int:
            return inside[b].header if b in inside else b

        def count(need: Need | Loop | tuple[Need, int], b: int) -> int:
            if isinstance(need, Loop):
                return int(inside.get(b) is need)
            condition = need[0] if isinstance(need, tuple) else need
            return 0 if b in inside else sum(map(condition, self.blocks[b]))

        costs = {}
        for b in {node(b) for b in loop.body}:
            size = 0 if b in inside else len(self.blocks[b])
            more = 0 if most is None or b in inside else -sum(map(most, self.blocks[b]))
            costs[b] = tuple(count(n, b) for n in needs), (more, size)
        following: dict[int, set[int]] = {}
        for b in loop.body:
            to = {node(f) for f in self.edges[b] if f in loop.body and f != loop.header}
            following.setdefault(node(b), set()).update(to - {node(b)})

        # at each block, the cheapest way to it for each count of what is needed, and the step before it
        State = tuple[int, tuple[int, ...]]
        met, first = costs[loop.header]
        start: State = loop.header, tuple(map(min, met, wanted))
        best: dict[State, tuple[tuple[int, int], State | None]] = {start: (first, None)}
        at_block: dict[int, list[State]] = {loop.header: [start]}
        for b in self._topological(loop.header, following):
            for state in at_block.get(b, ()):
                have, length = best[state][0]
                for to in following.get(b, ()):
                    met, (work, size) = costs[to]
                    seen = tuple(
                        min(s + m, w) for s, m, w in zip(state[1], met, wanted, strict=True)
                    )
                    reached, value = (to, seen), (have + work, length + size)
                    if reached not in best:
                        at_block.setdefault(to, []).append(reached)
                    if reached not in best or value < best[reached][0]:
                        best[reached] = value, state
        ends = [(best[s][0], s) for s in ((node(b), wanted) for b in loop.latches) if s in best]
        if not ends:
            return None
        chosen: list[int] = []
        at: State | None = min(ends)[1]
        while at is not None:
            chosen.append(at[0])
            at = best[at][1]
        return [i for b in reversed(chosen) if b not in inside for i in self.blocks[b]]

    @staticmethod
    def _topological(root: int, following: Mapping[int, set[int]]) -> list[int]:
        done: list[int] = []
        seen, stack = {root}, [(root, iter(following.get(root, ())))]
        while stack:
            at, rest = stack[-1]
            for to in rest:
                if to not in seen:
                    seen.add(to)
                    stack.append((to, iter(following.get(to, ()))))
                    break
            else:
                done.append(at)
                stack.pop()
        return done[::-1]


def pipes(path: Iterable[Instruction]) -> Counter[str]:
    """How many instructions go to each unit."""
    return Counter(i.pipe for i in path)


def chain(
    path: Sequence[Instruction], latency: Callable[[Instruction], float], read: float = 20
) -> float:
    """Clocks that one warp alone needs for an iteration of ``path`` in a long loop.

    Args:
        latency: clocks until the result of an instruction that sets a scoreboard is there.
        read: clocks until its operands are read.
    """
    ready = [0.0] * (NO_SCOREBOARD + 1)
    now, begun = 0.0, 0.0
    for _ in range(TURNS):
        begun = now
        for i in path:
            for board in range(NO_SCOREBOARD):
                if i.waits >> board & 1:
                    now = max(now, ready[board])
            ready[i.result] = max(ready[i.result], now + latency(i))
            ready[i.operands] = max(ready[i.operands], now + read)
            now += max(i.stall, 1)
    return now - begun
