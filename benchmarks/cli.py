"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .counted.roofline import DTYPES
from .measure import machine, summary, table
from .measure.harness import QUICK, Budget, Effort, TookTooLong, clock_for, time_limit
from .measure.journal import Journal
from .measure.record import NO_TIME, Record
from .measure.session import Case, Session
from .measure.volume import InputError, load
from .suites import explain, profile, static, timetable

SUITES = ("model", "memory", "ops", "static")
"""What ``--suite all`` runs, in this order."""

ALONE = (
    "peers",
    "host",
    "coverage",
    "shares",
    "converted",
    "scaling",
    "ceilings",
    "profile",
    "routes",
    "gate",
    "explain",
)
COMPILE: dict[str, tuple[str, ...] | None] = {
    "all": None,
    "none": (),
    "default": ("compile", "compile-contiguous"),
    "max-autotune": ("compile-max-autotune",),
}
"""``--compile`` -> the providers that it leaves in."""

FOLDER = "build/benchmarks"
"""Where results go by default, below the current folder; git ignores it in a checkout."""

EXIT_FAILED, EXIT_USAGE = 1, 2


class Parser(argparse.ArgumentParser):
    """Answers a wrong argument with one line instead of the usage text."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n")


def _dtypes(text: str) -> list[str]:
    names = [n.strip() for n in text.split(",") if n.strip()]
    known = [n for n in DTYPES if n != "float64"]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"unknown dtype {name!r}; choose {', '.join(known)}")
    return names


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value


def parser() -> Parser:
    """The command line's parser."""
    p = Parser(
        prog="benchmarks/run.py",
        description="fastfilm beside eager PyTorch, torch.compile and the paper's form.",
    )
    suites = (*SUITES, *ALONE, "all")
    p.add_argument("--suite", choices=suites, help=f"default: all ({', '.join(SUITES)})")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument(
        "--dtype",
        type=_dtypes,
        action="append",
        metavar="NAME[,NAME]",
        help="float32, bfloat16, float16, tf32 (CUDA); repeatable",
    )
    p.add_argument("--quick", action="store_true", help="small and short: under a minute on a CPU")
    p.add_argument(
        "--explain",
        action="store_true",
        help="model: floor, estimate, time and limiter of each layer, and steps on several GPUs",
    )
    p.add_argument("--volume", metavar="FILE.nii.gz", help="3D image to cut patches from")
    p.add_argument(
        "--json", metavar="OUT", default=f"{FOLDER}/run.json", help="default: %(default)s"
    )
    p.add_argument(
        "--plot", metavar="OUT.png", default=f"{FOLDER}/run.png", help="default: %(default)s"
    )
    p.add_argument(
        "--minutes", type=_minutes, help="end after this time; what does not fit is named"
    )
    p.add_argument(
        "--graphs", action="store_true", help="model: steps replayed from CUDA graphs, too"
    )
    p.add_argument(
        "--compile",
        choices=COMPILE,
        help="which forms of torch.compile to measure (default: all; without --suite: default)",
    )
    p.add_argument(
        "--journal", metavar="FILE", help="go on in its run, without what ended the process there"
    )
    p.add_argument("--static", metavar="FILE", help="gate: rows of a run of the static suite")
    p.add_argument("--update-gate", action="store_true", help="gate: write its figures down")
    p.add_argument(
        "--ceilings", metavar="FILE", help="rows of a run on this machine: take its ceilings"
    )
    p.add_argument("--one", metavar="N:M", help=argparse.SUPPRESS)  # what profile runs under ncu
    return p


def choose_dtypes(
    given: list[list[str]] | None, device: str, suite: str, quick: bool = False
) -> list[str]:
    """The dtypes asked for, or the usual ones of a device and suite."""
    if given:
        return list(dict.fromkeys(name for names in given for name in names))
    if device == "cpu":
        return ["float32"] if quick and suite == "peers" else ["float32", "bfloat16"]
    return (
        ["bfloat16", "float16", "tf32", "float32"]
        if suite in ("peers", "ceilings")
        else ["bfloat16", "float32"]
    )


def main(argv: Sequence[str] | None = None, started: float | None = None) -> int:
    """Runs what was asked for; 0: all rows pass, 1: a row FAILED, 2: wrong arguments.

    Args:
        started: ``time.monotonic()`` at the start of the process, from which the run's time counts.
    """
    started = time.monotonic() if started is None else started
    p = parser()
    args = p.parse_args(argv)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: this machine has no CUDA device")
    suite = args.suite or "all"
    if args.explain and suite not in ("model", "all"):
        p.error(f"--explain goes with --suite model, got --suite {suite}")
    dtypes = choose_dtypes(args.dtype, device, suite, args.quick)
    if device == "cpu" and "tf32" in dtypes:
        p.error("--dtype tf32 exists on CUDA devices only")
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path == p.get_default(name.removeprefix("--")):
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                p.error(
                    f"{name}: cannot make the folder {FOLDER}: {error.strerror}; name another file"
                )
        elif not Path(path).resolve().parent.is_dir():
            p.error(f"{name}: no such folder: {Path(path).parent}")
    try:
        if args.volume is not None:
            load(args.volume)
        return run(args, device, suite, dtypes, started)
    except InputError as error:
        p.error(str(error))


def run(
    args: argparse.Namespace, device: str, suite: str, dtypes: list[str], started: float
) -> int:
    """Runs the suites, prints the table, writes the files."""
    limit = args.minutes * 60 if args.minutes else None
    bounded = args.suite is None or (args.quick and suite == "peers")
    if limit is None and bounded:
        limit = (timetable.QUICK_END if args.suite is None and args.quick else timetable.ROWS_END)[
            device
        ]
    left = None if limit is None else limit - (time.monotonic() - started)
    session = prepare(args, device, dtypes, left)
    print(table.header(session.record.machine), flush=True)
    if args.one is not None:
        profile.one(session, args.one)
        return 0
    if suite == "all":
        waiting: list[timetable.Part] = []

        def cut() -> None:
            timetable.cut(session, waiting)
            finish(session, args, started, plot=False)

        over = None if left is None else left + timetable.GRACE
        if left is not None:  # the static suite has a bound of its own
            over = max(left, timetable.END[device] - (time.monotonic() - started)) + timetable.GRACE
        watchdog = timetable.Watchdog(over, cut)
        timetable.run(session, limit, waiting)
        static_last(session, args, device, started)
        watchdog.cancel()
    elif suite != "ceilings":  # they stand in the header of every run
        importlib.import_module(f"benchmarks.suites.{suite}").run(session)
    if args.explain:
        explain.run(session)
    return finish(session, args, started)


def finish(session: Session, args: argparse.Namespace, started: float, plot: bool = True) -> int:
    """Prints the table and what was left out, writes the files; the exit status."""
    record = session.record
    record.machine["seconds"] = round(time.monotonic() - started, 1)
    record.machine["load_end"] = machine.load()
    record.write()
    shown = [
        r for r in record.rows if r.suite not in ("explain", "gate", "shares")
    ]  # these print their own
    if args.suite is None:
        summary.show(record.rows, record.machine)
    print(table.table(shown))
    wrote = f"\nwrote {args.json}"
    if plot:
        reason = table.plot(record.rows, record.machine, Path(args.plot))
        wrote += f"; no plot: {reason}" if reason else f" and {args.plot}"
    print(wrote)
    missing = table.left_out(record.rows)
    if missing:
        print(missing)
    if record.failed:
        print("FAILED: a row above is wrong or over its limit", file=sys.stderr)
    return EXIT_FAILED if record.failed else 0


def prepare(
    args: argparse.Namespace, device: str, dtypes: list[str], left: float | None
) -> Session:
    """Describes the machine, measures its ceilings and opens the record; ``left``: seconds of the run."""
    budget = Budget(left)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    clock = clock_for(device)
    about: dict[str, Any] = machine.describe(device)
    suite = args.suite or "all"
    ceilings = machine.Ceilings(1.0, {d: 1.0 for d in dtypes})
    if suite not in ("memory", "static", "gate", "shares") and args.one is None:
        known = machine.known_ceilings(args.ceilings, about, dtypes)
        ceilings = known or machine.ceilings(device, dtypes, clock, args.quick)
        about |= machine.as_json(ceilings)
    journal = Journal(Path(args.journal) if args.journal else None)
    record = Record(about, Path(args.json))
    if journal.continued:
        record.resume()
    # without an end in time everything is compiled that can be
    kinds = args.compile or ("all" if left is None or args.suite else "default")
    return Session(
        device=device,
        dtypes=dtypes,
        quick=args.quick,
        effort=QUICK if args.quick else Effort(min_rounds=7),
        budget=budget,
        record=record,
        journal=journal,
        clock=clock,
        ceilings=ceilings,
        volume=args.volume,
        compile_kinds=COMPILE[kinds],
        static_rows=args.static,
        update_gate=args.update_gate,
        compile_seconds=120.0 if device == "cuda" else 30.0 if args.suite else 15.0,
        graphs=args.graphs,
    )


def static_last(session: Session, args: argparse.Namespace, device: str, started: float) -> None:
    """The static suite, where the run leaves it time; named where not."""
    if args.quick and args.suite is None:
        print("static: not part of a quick run; --suite static builds the kernels")
        return
    seconds = float("inf")
    if session.budget.left() != seconds:
        end = max(timetable.END[device], 60 * (args.minutes or 0.0))
        seconds = end - (time.monotonic() - started)
    case = Case("static", "all", "", "")
    if seconds < timetable.STATIC_LEAST:
        session.skip(case, "all", NO_TIME)
        return
    session.running = case, "all"
    try:
        with time_limit(seconds, "building"):
            static.run(session, quick=args.quick or args.suite is None)
    except TookTooLong as error:
        session.skip(case, "all", f"{NO_TIME}: {error}")
