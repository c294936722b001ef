"""The search for the fastest tiles: for each shape and kernel, the fastest correct candidate enters the table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLate
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fastfilm.ops import choice
from fastfilm.ops.block import recipe
from fastfilm.ops.settings import tables
from fastfilm.ops.settings.tables import FAMILIES, Entry, Table
from fastfilm.ops.spec import Plan

from .clock import Clock, clock_for, median_seconds
from .facts import Compilers, Facts, predicted
from .measure import Subject
from .shapes import Shape, of_model
from .space import RANKED, Candidate, candidates

PROMISE = 2.0
"""A candidate that the cost model gives more than so many times the best one's time is not launched."""

GAIN = 0.98
"""A tile takes the place of the kernel's own choice if its time is below this share of that one's."""

PRUNED, WRONG, SKIPPED, TIMED, RIGHT = "pruned", "wrong", "skipped", "timed", "right"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """One candidate or plan of one shape: what became of it, why, and its seconds if it was timed."""

    shape: Shape
    what: str
    status: str
    reason: str = ""
    seconds: float | None = None
    facts: Facts | None = None

    def __str__(self) -> str:
        time_ = "" if self.seconds is None else f" {self.seconds * 1e6:.1f} us"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.shape}  {self.what}  {self.status}{time_}{reason}"


@dataclass
class Search:
    """A search over shapes, the first ones first, until the time is over.

    Attributes:
        device: "cuda": candidates are checked and timed. "cpu": nothing is timed and no entry is made; candidates
            are compiled for ``arch``, and checked if Triton interprets.
        arch: 80, 90 or 100.
        seconds: bound of the whole search.
        most: candidates of a shape and family.
        processes: that compile; None: one for each core.
        known: buckets to leave out.
        timed: whether candidates are timed; None: on a GPU.
    """

    shapes: Sequence[Shape]
    device: str
    arch: int
    seconds: float = 300.0
    most: int = 16
    processes: int | None = None
    known: frozenset[tables.Key] = frozenset()
    timed: bool | None = None
    say: Say = lambda text: None
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = time.monotonic() + self.seconds
        self._clock: Clock | None = None
        if self.timed is None:
            self.timed = self.device == "cuda"

    def left(self) -> float:
        """Seconds until the end."""
        return self._end - time.monotonic()

    def entries(self) -> Iterator[tuple[tables.Key, Entry]]:
        """Runs the search; gives the entry of each bucket when it is complete."""
        self._end = time.monotonic() + self.seconds
        compilers = Compilers(self.arch, self.processes)
        seen = set(self.known)
        try:
            jobs = {s: self._submitted(s, compilers) for s in self._distinct(seen)}
            for shape, waiting in jobs.items():
                if self.left() <= 0:
                    self._note(Outcome(shape, "shape", SKIPPED, "the time is over"))
                    continue
                entry = self._shape(shape, waiting)
                if entry is not None:
                    yield shape.key, entry
        finally:
            compilers.close()

    def _distinct(self, seen: set[tables.Key]) -> Iterator[Shape]:
        for shape in self.shapes:
            if shape.key not in seen:
                seen.add(shape.key)
                yield shape

    def _submitted(self, shape: Shape, compilers: Compilers) -> dict[Candidate, Future[Facts]]:
        families = [f for f in FAMILIES if f != "dgrad" or shape.affine]
        chosen = [c for f in families for c in candidates(shape, f, self.arch, self.most)]
        return {c: compilers.submit(shape, c) for c in chosen}

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self.say(str(outcome))

    def _shape(self, shape: Shape, waiting: dict[Candidate, Future[Facts]]) -> Entry | None:
        subject = None
        if self.timed or choice.interpreting():
            subject = Subject(shape, self.device, full=bool(self.timed))
        best: dict[str, tuple[float, tuple[int, ...]]] = {}
        for candidate, found in self._worthwhile(shape, waiting):
            outcome = self._candidate(shape, candidate, found, subject)
            self._note(outcome)
            seconds = outcome.seconds
            least = best.get(candidate.family, (float("inf"), ()))[0]
            if seconds is not None and seconds < least:
                best[candidate.family] = seconds, candidate.fields
        if not self.timed:
            return None
        assert subject is not None
        tiles = {}
        for family, (seconds, fields) in best.items():
            own = self._timed(subject.candidate_call(None, family))
            self._note(Outcome(shape, f"{family} with its own tile", TIMED, seconds=own))
            if seconds < GAIN * own:
                tiles[family] = fields
        return self._plans(shape, subject, tiles)

    def _worthwhile(
        self, shape: Shape, waiting: dict[Candidate, Future[Facts]]
    ) -> list[tuple[Candidate, Facts]]:
        """Candidates without a static fault whose waves and traffic promise enough, the most promising first."""
        known: dict[str, list[tuple[float, Candidate, Facts]]] = {}
        for candidate, future in waiting.items():
            found = self._known(shape, candidate, future)
            if found is not None:
                seconds = predicted(shape, candidate, found)
                known.setdefault(candidate.family, []).append((seconds, candidate, found))
        kept = []
        for some in known.values():
            some.sort(key=lambda item: item[0])
            for seconds, candidate, found in some:
                if seconds <= PROMISE * some[0][0]:
                    kept.append((candidate, found))
                    continue
                waves = found.waves(RANKED.processors)
                reason = f"{seconds / some[0][0]:.1f} times the best estimate"
                reason += f" ({waves:.1f} waves, {found.l2 / 2**20:.0f} MiB through the L2)"
                self._note(Outcome(shape, str(candidate), PRUNED, reason, facts=found))
        return kept

    def _known(self, shape: Shape, candidate: Candidate, future: Future[Facts]) -> Facts | None:
        """The candidate's facts; None if they are not to be had in time or forbid a launch."""
        name = str(candidate)
        try:
            found = future.result(timeout=max(self.left(), 0.1))
        except TooLate:
            self._note(Outcome(shape, name, SKIPPED, "not compiled in time"))
            return None
        except Exception as error:  # a compiler process that died takes one candidate with it
            self._note(Outcome(shape, name, SKIPPED, f"{type(error).__name__}: {error}"[:200]))
            return None
        if found.fault:
            self._note(Outcome(shape, name, PRUNED, found.fault, facts=found))
            return None
        return found

    def _candidate(
        self, shape: Shape, candidate: Candidate, found: Facts, subject: Subject | None
    ) -> Outcome:
        name = str(candidate)
        if self.left() <= 0:
            return Outcome(shape, name, SKIPPED, "the time is over", facts=found)
        if subject is None:
            return Outcome(shape, name, SKIPPED, "not run without a GPU", facts=found)
        try:
            reason = subject.why_wrong(candidate)
            if reason is not None:
                return Outcome(shape, name, WRONG, reason, facts=found)
            if not self.timed:
                return Outcome(shape, name, RIGHT, facts=found)
            seconds = self._timed(subject.candidate_call(candidate, candidate.family))
        except Exception as error:  # a launch that fails is a finding about this candidate
            return Outcome(
                shape, name, WRONG, f"{type(error).__name__}: {error}"[:200], facts=found
            )
        return Outcome(shape, name, TIMED, seconds=seconds, facts=found)

    def _timed(self, call: Callable[[], object]) -> float:
        if self._clock is None:
            self._clock = clock_for(self.device)
        return median_seconds(self._clock, call)

    def _plans(
        self, shape: Shape, subject: Subject, tiles: dict[str, tuple[int, ...]]
    ) -> Entry | None:
        times: dict[str, float] = {}
        for plan in plans(shape, self.device):
            with tables.trying({shape.key: Entry(plan, tiles, {})}):
                try:
                    reason = subject.why_wrong_plan(plan)
                    seconds = None if reason else self._timed(subject.plan_call(plan))
                except Exception as error:  # a plan that fails is left out likewise
                    reason, seconds = f"{type(error).__name__}: {error}"[:200], None
            self._note(
                Outcome(shape, plan, WRONG if seconds is None else TIMED, reason or "", seconds)
            )
            if seconds is not None:
                times[plan] = seconds
        if not times:
            return None
        return Entry(min(times, key=lambda plan: times[plan]), tiles, times)


def plans(shape: Shape, device: str) -> list[str]:
    """Every backend and route that serves the shape on ``device``, the reference apart."""
    request = shape.request(device)
    return [
        f"{name}/{route}"
        for name in choice.BACKENDS
        if name != "reference"
        for route in ("fused", "composed")
        if choice.why_not_plan(Plan(name, route), request) is None
    ]


def save(search: Search, path: Path) -> Table:
    """Runs a search and merges each entry into the table at ``path`` as soon as it is known.

    Raises:
        ValueError: the file there is for another architecture, or no table.
    """
    arch = f"sm_{search.arch}"
    table = tables.read(path) if path.exists() else Table(arch)
    for key, entry in search.entries():
        table = tables.merge_into(path, Table(arch, tables.about(), {key: entry}))
    tables.in_force.cache_clear()
    choice.forget()
    recipe.forget()
    return table


def tune(
    call: Callable[..., object],
    *inputs: Tensor,
    minutes: float = 5.0,
    path: Path | None = None,
    say: Say = print,
) -> Table:
    """Tunes the convolutions of ``call(*inputs)``, which may be a network and its input, on the current GPU.

    Args:
        minutes: the time it may take; the costliest convolutions come first.
        path: the table to merge into; None: the user's, which later calls use.

    Returns:
        The table with all that it holds now.

    Raises:
        RuntimeError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a CUDA device, and this machine has none")
    arch = tables.architecture()
    assert arch is not None
    search = Search(of_model(call, *inputs), "cuda", int(arch[3:]), 60 * minutes, say=say)
    return save(search, path or tables.user_path(arch))
