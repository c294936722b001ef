"""Plants each fault of the tables, runs its tests, and says which faults no test sees.

    python tests/planted/run.py [--only NAME ...] [--jobs N] [--list]

Works on copies in a temporary folder, never on this tree; see README.md. Exit code 1 if a fault survives, cannot
be planted, or has tests that fail without it.
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder: its tables are no modules of their own

from tests.planted import (  # noqa: E402
    cpu,
    cuda,
    kernels,
    ops,
    package,
    segmentation,
)
from tests.planted.fault import Fault  # noqa: E402
from tests.planted.workshop import Stale, Workshop  # noqa: E402

FAULTS: tuple[Fault, ...] = (
    *cpu.FAULTS,
    *cuda.FAULTS,
    *kernels.FAULTS,
    *ops.FAULTS,
    *package.FAULTS,
    *segmentation.FAULTS,
)
Task, Result = TypeVar("Task"), TypeVar("Result")
CLEAN_LIMIT = 1200
"""Seconds that tests may take without a fault."""


def clean(workshop: Workshop, tests: str) -> float | str:
    """Seconds that tests take without a fault; what they end with if they fail, or if none of them runs."""
    found = workshop.test(tests, CLEAN_LIMIT)
    if found.code == 0 and re.search(r"\b\d+ passed", found.output):
        return found.seconds
    return f"the tests {tests!r} end with {found.code} without a fault\n{found.output[-2000:]}"


def verdict(workshop: Workshop, fault: Fault, limit: float) -> tuple[str, str]:
    """Whether a fault is seen, SURVIVES, is STALE or has NO END in time, and by what test, or why."""
    try:
        with workshop.planted(fault):
            found = workshop.test(fault.tests, limit)
    except Stale as why:
        return "STALE", str(why)
    if found.code == 0:
        return "SURVIVES", fault.tests
    if found.code is None:
        return "NO END", f"within {limit:.0f} s"
    if found.code < 0 or found.code > 5:
        return "seen", f"the process ended with {found.code}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", found.output, re.MULTILINE)
    if found.code != 1 or failed is None:
        return "STALE", f"pytest ended with {found.code}: {found.output[-500:]}"
    return "seen", failed[1]


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names or patterns (cpu-*)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies at work")
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    options = parser.parse_args(arguments)
    names = [f.name for f in FAULTS]
    assert len(set(names)) == len(names), "two faults have one name"
    faults = [
        f for f in FAULTS if not options.only or any(fnmatch(f.name, o) for o in options.only)
    ]
    if not faults:
        parser.error(f"no fault is called {' or '.join(options.only)}")
    if options.list:
        for f in faults:
            print(f"{f.name:44} {f.file:34} {f.tests}")
        return 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        emulated = any("cuda" in f.file + f.tests for f in faults)
        first = Workshop(ROOT, Path(folder, "0"), emulated=emulated)
        free: queue.Queue[Workshop] = queue.Queue()
        free.put(first)
        for job in range(1, min(options.jobs, len(faults))):
            free.put(Workshop(ROOT, Path(folder, str(job)), first))

        def with_one(work: Callable[[Workshop, Task], Result]) -> Callable[[Task], Result]:
            def call(task: Task) -> Result:
                workshop = free.get()
                try:
                    return work(workshop, task)
                finally:
                    free.put(workshop)

            return call

        def plant(workshop: Workshop, fault: Fault) -> str:
            begun = time.monotonic()
            # the machine may be busier now than it was then
            found, why = verdict(workshop, fault, 60 + 5 * seconds[fault.tests])
            took = time.monotonic() - begun
            print(f"{found:9} {fault.name:56} {took:4.0f} s  {why}", flush=True)
            return found

        with ThreadPoolExecutor(free.qsize()) as pool:
            # "seen" means something where the tests pass without a fault
            each = list(dict.fromkeys(f.tests for f in faults))
            times = dict(zip(each, pool.map(with_one(clean), each), strict=True))
            wrong = [t for t in times.values() if isinstance(t, str)]
            if wrong:
                print(*wrong, sep="\n")
                while not free.empty():
                    free.get().close()
                return 1
            seconds = {k: float(t) for k, t in times.items()}
            print(f"tests pass without a fault ({time.monotonic() - start:.0f} s)", flush=True)
            found = list(pool.map(with_one(plant), faults))
        while not free.empty():
            free.get().close()
    missed = [f.name for f, v in zip(faults, found, strict=True) if v != "seen"]
    minutes = (time.monotonic() - start) / 60
    print(f"{len(faults) - len(missed)} of {len(faults)} faults are seen ({minutes:.0f} minutes)")
    if missed:
        print("not seen:", *missed)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
