"""Paired, interleaved timing: every provider once a round, so that a drift hits all alike."""

from __future__ import annotations

import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch

from fastfilm.tuning.clock import Call as Call
from fastfilm.tuning.clock import Clock as Clock
from fastfilm.tuning.clock import HostClock as HostClock
from fastfilm.tuning.clock import clock_for as clock_for


@dataclass(frozen=True)
class Effort:
    """How long to measure one case.

    Attributes:
        min_rounds, max_rounds: bounds of the number of rounds.
        seconds: between these bounds, rounds are added until they have taken this long.
        window: a timed region shorter than this is repeated until it is this long.
    """

    min_rounds: int = 5
    max_rounds: int = 30
    seconds: float = 2.0
    window: float = 2e-3


QUICK = Effort(min_rounds=3, max_rounds=15, seconds=0.4)


def calls_a_region(call: Call, clock: Clock, window: float, warmup: int = 2) -> int:
    """How many calls fill ``window`` seconds, with what the clock itself does around each."""
    spans = []
    for _ in range(max(warmup, 1)):
        begun = clock.now()
        clock.time(call, 1)
        spans.append(clock.now() - begun)
    return max(1, round(window / max(min(spans), 1e-7)))


def median_call(call: Call, clock: Clock, effort: Effort = Effort()) -> float:
    """Median seconds of a call over ``min_rounds`` regions."""
    calls = calls_a_region(call, clock, effort.window)
    return statistics.median(clock.time(call, calls) for _ in range(effort.min_rounds))


def paired(
    functions: Mapping[str, Call],
    clock: Clock,
    effort: Effort = Effort(),
    warmup: int = 2,
    budget: Budget | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; the functions take turns within a round.

    The order within a round rotates, so that no function always runs after the same one. Warm-up
    calls are not in the result; the fastest of them, with what the clock does around a call, sets
    the number of calls in a region. When the budget is spent no region is started, and the round
    that is not whole does not count.

    Returns:
        name -> seconds, one entry a round, the same number of rounds for every name.
    """
    names = list(functions)
    times: dict[str, list[float]] = {n: [] for n in names}
    if not names:
        return times
    budget = budget or Budget(None)
    calls = {}
    for name in names:
        if budget.spent():
            return times
        calls[name] = calls_a_region(functions[name], clock, effort.window, warmup)
    start = clock.now()
    for r in range(effort.max_rounds):
        if r >= effort.min_rounds and clock.now() - start >= effort.seconds:
            break
        shift = r % len(names)
        found = {}
        for name in names[shift:] + names[:shift]:
            if budget.spent():
                return times
            found[name] = clock.time(functions[name], calls[name])
        for name in names:
            times[name].append(found[name])
    return times


def quantile(values: Sequence[float], q: float) -> float:
    """Quantile by linear interpolation."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def best(times: Mapping[str, Sequence[float]], names: Sequence[str]) -> str | None:
    """The fastest of the names that were timed: nearest, in the median, to each round's best."""
    timed = [n for n in names if times.get(n)]
    if not timed:
        return None
    least = [min(seconds) for seconds in zip(*(times[n] for n in timed), strict=True)]
    return max(timed, key=lambda n: paired_ratio(least, times[n]))


def paired_ratio(baseline: Sequence[float], other: Sequence[float]) -> float:
    """Median over the rounds of baseline / other: above 1, ``other`` is the faster one."""
    return statistics.median(b / o for b, o in zip(baseline, other, strict=True))


class Budget:
    """Wall-clock time of a run; None is without end."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def earlier(self, seconds: float) -> Budget:
        """A budget that ends ``seconds`` before this one."""
        return Budget(None if self._end is None else self.left() - seconds, self._clock)

    def left(self) -> float:
        """Seconds left (infinite without a budget)."""
        return float("inf") if self._end is None else self._end - self._clock()

    def spent(self) -> bool:
        """Whether no new row should be started."""
        return self.left() <= 0


@contextmanager
def without_search() -> Iterator[None]:
    """cuDNN takes the algorithm that it deems best instead of trying several: for calls that are not timed."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class TookTooLong(Exception):
    """A bounded step ran past its limit."""


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in ``frame`` or in one of its callers."""
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raises TookTooLong inside the block after ``seconds`` (main thread of POSIX systems only)."""
    possible = hasattr(signal, "setitimer") and (
        threading.current_thread() is threading.main_thread()
    )
    if not possible or seconds == float("inf"):
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        if importing(frame):
            return  # half a module would stay behind; the next ring comes in a second
        raise TookTooLong(f"{what} took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    # again every second: an exception that is raised inside a destructor is swallowed
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def saved_bytes(forward: Callable[[], object], exclude: Sequence[torch.Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward()``.

    Every storage that is saved counts once, in full, whichever tensors view it; the storages of
    ``exclude`` (the parameters) do not count. The input counts if it is saved.
    """
    skip = {t.untyped_storage().data_ptr() for t in exclude}
    # the storages themselves are held, so that no address is used twice; holding the tensors would
    # tie an output to its own graph, and neither would ever be freed
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage

    def unpack(_: None) -> torch.Tensor:
        raise RuntimeError("this graph is for counting only")

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        forward()
    return sum(storage.nbytes() for storage in seen.values())


def tensor_peak_bytes(call: Call) -> int:
    """Peak of the tensors' memory on the host during ``call()``, above what was there before it.

    What libraries take for themselves, such as a convolution's working space, is not seen.
    """
    host = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[host], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_bytes(call: Call, device: str) -> int | None:
    """Peak of CUDA memory during ``call()``, above what was allocated before it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
