"""Measured time of a call: by CUDA events after the L2 cache was overwritten, or by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

Call = Callable[[], object]

FLUSH_BYTES = 512 << 20
"""Size of the fill in front of a call: ten times an H100's L2, and long enough (about 0.2 ms there) that the host
has queued the call before the fill is over."""


class Clock(Protocol):
    """Times calls on one device, in seconds."""

    def each(self, call: Call, calls: int) -> list[float]:
        """Seconds of each of ``calls`` calls in a row."""
        ...

    def time(self, call: Call, calls: int = 1, flush: bool = True) -> float:
        """Mean seconds of ``calls`` calls in a row; not ``flush``: they find their data in the cache."""
        ...

    def now(self) -> float:
        """A monotonic time."""
        ...


class HostClock:
    """Monotonic clock of the host, for work on a CPU. It leaves the caches alone."""

    def each(self, call: Call, calls: int) -> list[float]:
        """Seconds of each call."""
        return [self.time(call) for _ in range(calls)]

    def time(self, call: Call, calls: int = 1, flush: bool = True) -> float:
        """Mean seconds of a call."""
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        return (time.perf_counter_ns() - start) / (calls * 1e9)

    def now(self) -> float:
        """``time.monotonic``."""
        return time.monotonic()


class DeviceClock:
    """CUDA events around each call, the L2 cache overwritten in front of each; one synchronisation at the end.

    Args:
        flush_bytes: size of the fill that overwrites the cache.
    """

    def __init__(self, flush_bytes: int = FLUSH_BYTES, device: str = "cuda") -> None:
        self._flush = torch.empty(flush_bytes, dtype=torch.int8, device=device)

    def each(self, call: Call, calls: int) -> list[float]:
        """Seconds of each call between its two events on the current stream."""
        pairs = [self._events() for _ in range(calls)]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def time(self, call: Call, calls: int = 1, flush: bool = True) -> float:
        """Mean seconds of a call; not ``flush``: of calls back to back, behind one that is not counted."""
        if flush:
            return statistics.fmean(self.each(call, calls))
        start, end = self._events()
        self._flush.zero_()  # the host queues the calls meanwhile
        call()
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / (calls * 1e3)

    def now(self) -> float:
        """``time.monotonic``."""
        return time.monotonic()

    def _events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def clock_for(device: str) -> Clock:
    """The clock of a device."""
    return DeviceClock() if device == "cuda" else HostClock()


def median_seconds(clock: Clock, call: Call, repeats: int = 9) -> float:
    """Median of ``repeats`` calls, behind one that is not counted."""
    call()
    return statistics.median(clock.each(call, repeats))
