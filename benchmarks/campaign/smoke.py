"""Is each kernel right? One family and type after the other against float64, in processes that may die.

    python -m benchmarks.campaign.smoke --out ROWS.json --logs FOLDER

A check that ends its process, or takes longer than the bound, is named and the checks after it go on in another
process. On a GPU each check has a process of its own; on a CPU those of a backend share one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..counted.verdicts import BAD, DIED, DTYPES, HUNG, keys, without
from . import bundle


def groups(wanted: Sequence[str], device: str) -> list[list[str]]:
    """The checks of each process, as long as nothing goes wrong in it."""
    if device == "cuda":
        return [[key] for key in wanted]
    backends = dict.fromkeys(key.split(":")[0] for key in wanted)
    return [[k for k in wanted if k.startswith(f"{b}:")] for b in backends]


class Judge:
    """Runs checks in processes, and says of each what became of it.

    Attributes:
        seconds: of one check, the process's start included.
        on_result: is given each row as soon as it is known.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        logs: Path,
        on_result: Callable[[dict[str, Any]], None],
    ) -> None:
        self.command, self.seconds, self.logs, self.on_result = command, seconds, logs, on_result
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, wanted: Sequence[str]) -> None:
        """The checks of one group; a process for those that are left after each one that ended it."""
        left = list(wanted)
        while left:
            left = left[self._process(left) :]

    def _process(self, wanted: Sequence[str]) -> int:
        """How many of the checks are settled."""
        log = self.logs / f"{wanted[0].replace(':', '-')}.log"
        settled = 0
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*self.command, ",".join(wanted)], stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
            )  # fmt: skip
            assert process.stdout is not None
            for key in wanted:
                begun, hung = time.monotonic(), threading.Event()
                timer = threading.Timer(self.seconds, _end, (process, hung))
                timer.start()
                line = _row_of(key, process.stdout)
                timer.cancel()
                settled += 1
                if line is None:
                    _end(process)
                    line = _ended(key, process.wait(), hung.is_set(), self.seconds, log)
                self.on_result({**line, "seconds": round(time.monotonic() - begun, 2)})
                if line["status"] in BAD:
                    break  # memory that it may have overwritten is nobody's evidence
            _end(process)
            process.wait()
        return settled


def _end(process: subprocess.Popen[str], told: threading.Event | None = None) -> None:
    if process.poll() is None:
        if told is not None:
            told.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _row_of(key: str, lines: Iterator[str]) -> dict[str, Any] | None:
    """The line that a process prints of a check; None if it ends without it. Other output is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.get("check") == key:
                return row
    return None


def _ended(key: str, code: int, hung: bool, seconds: float, log: Path) -> dict[str, Any]:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = f": {lines[-1][:160]}" if lines else ""
    if hung:
        return {"check": key, "status": HUNG, "note": f"ended after {seconds:.0f} s{said}"}
    return {"check": key, "status": DIED, "note": f"exit status {code}{said}"}


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that ran is right, else 1."""
    p = argparse.ArgumentParser(
        prog="benchmarks.campaign.smoke", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--backends", default="cuda,triton", help="with commas")
    p.add_argument("--types", default=",".join(DTYPES), help="with commas")
    p.add_argument("--only", default="", help="checks that start so, with commas; default: all")
    p.add_argument(
        "--library", help="the CUDA kernels built for a CPU (benchmarks/counted/emulation.py)"
    )
    p.add_argument("--out", type=Path, help="file of the rows")
    p.add_argument("--logs", type=Path, default=Path("smoke-logs"))
    p.add_argument("--seconds", type=float, default=20.0, help="of one check")
    p.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1))
    args = p.parse_args(argv)
    only = tuple(filter(None, args.only.split(",")))
    every = keys(args.backends.split(","), args.types.split(","))
    wanted = [k for k in every if k.startswith(only or "")]
    if not wanted:
        p.error(f"--only {args.only}: no such check; there are {', '.join(every)}")
    rows: list[dict[str, Any]] = []
    lock = threading.Lock()

    def tell(row: dict[str, Any]) -> None:
        with lock:
            rows.append(row)
            error = f" error {row['error']:.1e}" if "error" in row else ""
            print(f"{row['check']:<30} {row['status']:<8}{error} {row.get('note', '')}", flush=True)
            if args.out:
                ordered = sorted(rows, key=lambda r: wanted.index(r["check"]))
                bundle.write_json(args.out, ordered)

    command = [sys.executable, "-m", "benchmarks.counted.kernel_checks", "--device", args.device]
    command += ["--library", args.library] if args.library else []
    judge = Judge(command, args.seconds, args.logs, tell)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(judge.run, groups(wanted, args.device)))
    bad = without(rows)
    print(f"left out from here on: {bad}" if bad else "nothing is left out")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
