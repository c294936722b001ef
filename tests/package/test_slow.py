"""The list of slow tests: how it is made, and that it names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from tests import slow

ROOT = Path(__file__).resolve().parents[2]


def test_a_test_is_slow_by_all_of_its_phases_together() -> None:
    lines = [
        "============ slowest durations ============",
        "0.70s call     tests/test_a.py::test_long[a b]",
        "0.60s setup    tests/test_a.py::test_long[a b]",
        "0.75s call     tests/test_a.py::test_short",
        "12.50s call     tests/test_b.py::test_longer",
        "(3 durations < 0.005s hidden.)",
    ]
    assert slow.found(lines) == ["tests/test_a.py::test_long[a b]", "tests/test_b.py::test_longer"]


def test_every_test_of_the_list_is_defined() -> None:
    nodes = {node.partition("[")[0] for node in slow.listed()}
    assert nodes
    for node in nodes:
        path, *_, name = node.split("::")
        assert re.search(rf"def {name}\b", (ROOT / path).read_text(encoding="utf-8")), node
