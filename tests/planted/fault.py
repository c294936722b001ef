"""One fault: a patch of one file, and the tests that must fail with it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A patch as data.

    Attributes:
        name: short and unique, by which ``run.py --only`` finds it.
        file: path from the root of the sources; files in csrc/ are built anew.
        old: text that stands in the file exactly once.
        new: what takes its place.
        tests: arguments of pytest; one of these tests must fail with the fault.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
