"""The clock of benchmarks and tuning: what happens around a call, and in which order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastfilm.tuning import clock


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a device clock does, with stand-ins for CUDA's events: the n-th record happens at n seconds."""
    found: list[str] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.name = ("start", "end")[Event.made % 2]
            Event.made += 1

        def record(self) -> None:
            found.append(self.name)
            self.at = sum(name in ("start", "end", "call") for name in found)

        def elapsed_time(self, end: Event) -> float:
            assert found[-1] == "synchronize"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: found.append("synchronize"))
    return found


def device_clock(log: list[str]) -> clock.DeviceClock:
    made = clock.DeviceClock(16, device="cpu")
    stand_in: Any = SimpleNamespace(zero_=lambda: log.append("flush"))
    made._flush = stand_in
    return made


def test_the_cache_is_overwritten_before_each_call_and_the_device_is_waited_for_once(
    log: list[str],
) -> None:
    seconds = device_clock(log).each(lambda: log.append("call"), 3)
    assert log == ["flush", "start", "call", "end"] * 3 + ["synchronize"]
    assert seconds == [2.0] * 3


def test_a_mean_is_that_of_the_calls_without_the_flushes(log: list[str]) -> None:
    assert device_clock(log).time(lambda: log.append("call"), 4) == 2.0
    assert log.count("flush") == 4


def test_calls_that_keep_the_cache_stand_between_one_pair_of_events(log: list[str]) -> None:
    seconds = device_clock(log).time(lambda: log.append("call"), 3, flush=False)
    assert log == ["flush", "call", "start", "call", "call", "call", "end", "synchronize"]
    assert seconds == pytest.approx(4 / 3)


def test_the_median_is_behind_a_call_that_is_not_counted() -> None:
    class Fake(clock.HostClock):
        def each(self, call: clock.Call, calls: int) -> list[float]:
            called.append("each")
            return [9.0, 1.0, 2.0][:calls]

    called: list[str] = []
    assert clock.median_seconds(Fake(), lambda: called.append("warm"), 3) == 2.0
    assert called == ["warm", "each"]


def test_the_host_clock_times_calls_as_they_are() -> None:
    called: list[int] = []
    host = clock.clock_for("cpu")
    assert host.time(lambda: called.append(1), 5) > 0 and len(called) == 5
    assert len(host.each(lambda: called.append(1), 2)) == 2 and len(called) == 7
    assert host.now() <= host.now()
