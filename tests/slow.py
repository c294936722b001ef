"""Tests that take longer than ``SECONDS`` on two cores: ``pytest`` leaves them out, ``pytest --slow`` does not.

    pytest --slow -n 2 --durations=0 | python -m tests.slow      # writes the list anew

A file or a test that is named on pytest's command line always runs.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

SECONDS = 0.8
LIST = Path(__file__).with_name("slow_tests.txt")
_DURATION = re.compile(r"^\s*(\d+\.\d+)s (?:setup|call|teardown)\s+(tests/.+)$")


def listed() -> frozenset[str]:
    """Their node ids."""
    return frozenset(LIST.read_text(encoding="utf-8").splitlines())


def found(lines: Iterable[str]) -> list[str]:
    """Node ids of the slow ones, from pytest's list of durations: set-up, call and teardown together."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for line in lines:
        match = _DURATION.match(line.rstrip("\n"))
        if match:
            seconds[match[2]] += float(match[1])
    return sorted(node for node, s in seconds.items() if s > SECONDS)


if __name__ == "__main__":
    LIST.write_text("".join(f"{node}\n" for node in found(sys.stdin)), encoding="utf-8")
