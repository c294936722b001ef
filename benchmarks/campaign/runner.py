"""Runs the steps, each as a process with a bound; what they give is kept after each, and a run can go on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import machine
from . import report, results
from .steps import BUILD, ROOT, Step, steps

OK, FAILED, CUT, SKIPPED = "ok", "FAILED", "cut", "skipped"
"""Ended well; ended with an error; ended by its bound (what it had written counts); not started."""

RESERVED = 12.0
"""Seconds kept for the report and its pictures."""

GRACE = 5.0
"""Seconds between asking a process to end and ending it."""


@dataclass
class Done:
    """What became of a step."""

    status: str
    seconds: float = 0.0
    code: int | None = None
    note: str = ""
    runs: int = 0


class Campaign:
    """The folder of a campaign.

    ``campaign.json`` says what became of each step; ``logs/`` has their output, ``steps/`` their rows, ``tuned/``
    the table of measured choices, and ``results.json``, ``tuned.json`` and ``report.md`` what comes of it.
    """

    def __init__(self, out: Path, device: str) -> None:
        self.out, self.device = out.resolve(), device
        for name in ("logs", "steps", "tuned"):
            (self.out / name).mkdir(parents=True, exist_ok=True)
        self.done: dict[str, Done] = {}
        self.about: dict[str, Any] = {"device": device, "commit": machine.commit(), "runs": []}
        state = self.out / "campaign.json"
        if state.exists():
            data = json.loads(state.read_text(encoding="utf-8"))
            if data["about"]["device"] != device:
                raise ValueError(
                    f"{out} holds a campaign on {data['about']['device']}, got --device {device}"
                )
            self.about = data["about"]
            self.done = {name: Done(**values) for name, values in data["steps"].items()}

    def write(self) -> None:
        """The state, to a neighbour first: a kill leaves the one from before."""
        data = {"about": self.about, "steps": {n: asdict(d) for n, d in self.done.items()}}
        partial = self.out / "campaign.json.part"
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.out / "campaign.json")

    def collect(self, wanted: Sequence[Step]) -> None:
        """Brings ``results.json`` and ``tuned.json`` up to date."""
        done = {name: asdict(d) for name, d in self.done.items()}
        results.collect(self.out, self.about, done, wanted)

    def order(self, wanted: Sequence[Step], again: Sequence[str]) -> list[Step]:
        """What to run: what never ran, then what was cut short; ``again`` first, whatever became of it."""

        def rank(step: Step) -> int:
            before = self.done.get(step.name)
            if step.name in again:
                return 0
            if before is None or before.status == SKIPPED:
                return 1
            return 2 if before.status == CUT else 3

        return [s for s in sorted(wanted, key=rank) if rank(s) < 3]

    def why_not(self, step: Step, left: float) -> str | None:
        """Why a step is not started; None if it is."""
        for name in step.after:
            if name in self.done and self.done[name].status in (FAILED, CUT):
                return f"{name} did not succeed"
        if left < step.least:
            return f"{max(left, 0):.0f} s left, it needs {step.least:.0f}"
        return None

    def run(self, step: Step, seconds: float) -> Done:
        """One step, ended after ``seconds``."""
        environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
        environment |= {"FASTFILM_TUNED": str(self.out / "tuned"), **step.environment}
        if (self.out / "site").is_dir():
            paths = [str(self.out / "site"), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
            environment["PYTHONSAFEPATH"] = "1"  # the checkout lacks fastfilm.kernels
        command = step.arguments(self.out, seconds)
        log = self.out / "logs" / f"{step.name}.log"
        runs = self.done[step.name].runs if step.name in self.done else 0
        begun = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            code = bounded(command, environment, file, seconds)
        took = time.monotonic() - begun
        if code is None:
            return Done(CUT, took, None, f"ended after {took:.0f} s", runs + 1)
        note = "" if code == 0 else last_line(log)
        return Done(OK if code == 0 else FAILED, took, code, note, runs + 1)


def bounded(
    command: Sequence[str], environment: dict[str, str], log: Any, seconds: float
) -> int | None:
    """Exit status of a process, or None if it and all it started had to be ended after ``seconds``."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE)
                break
        return None
    except BaseException:  # the campaign itself is ended: nothing of it may go on
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def last_line(log: Path) -> str:
    """What a process said last, at most 200 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line]
    return said[-1][:200] if said else ""


def install_apart(campaign: Campaign, seconds: float) -> Done:
    """Where pip cannot install in time: into the campaign's own folder, at worst without C++."""
    done = Done(FAILED, note="no time to build")
    if seconds > 0:
        build = (sys.executable, "setup.py", "build", "--build-lib", "{out}/site")
        done = campaign.run(Step("build", "apart", build, seconds, environment=BUILD), seconds)
    package = campaign.out / "site" / "fastfilm"
    if done.status == OK and (package / "kernels").is_dir():
        done.note = "built into the campaign's folder"
        return done
    shutil.rmtree(campaign.out / "site", ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "kernels")
    shutil.copytree(ROOT / "fastfilm", package, ignore=ignored)
    shutil.copytree(
        ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    return Done(OK, done.seconds, 0, f"copied, no C++ was built: {done.note}"[:200], done.runs)


def main(
    out: Path,
    device: str,
    seconds: float,
    again: Sequence[str] = (),
    wanted: Sequence[Step] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs a campaign for at most ``seconds``; 0 unless a step FAILED (1), 2 for a folder of another device."""
    end = clock() + seconds
    wanted = steps(device) if wanted is None else wanted
    unknown = set(again) - {s.name for s in wanted}
    try:
        if unknown:
            raise ValueError(f"--again: no step {', '.join(sorted(unknown))} in this campaign")
        campaign = Campaign(out, device)
    except (ValueError, OSError) as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 2
    about = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": seconds}
    about |= {"commit": machine.commit(), "host": platform.node()}
    campaign.about["runs"].append(about)
    for step in campaign.order(wanted, again):
        left = end - clock() - RESERVED
        reason = campaign.why_not(step, left)
        if reason is not None:
            if step.name not in campaign.done:
                campaign.done[step.name] = Done(SKIPPED, note=reason)
            print(f"{step.name}: not started, {reason}", flush=True)
            campaign.write()
            continue
        print(f"{step.name}: {step.why} …", end="", flush=True)
        # what was cut short gets all the time that there is
        cut = step.name in campaign.done and campaign.done[step.name].status == CUT
        found = campaign.run(step, left if cut else min(step.seconds, left))
        if step.name == "build" and found.status != OK:
            print(" not into the environment, apart …", end="", flush=True)
            rest = min(step.seconds, end - clock() - RESERVED)
            found = install_apart(campaign, rest if found.status == FAILED else 0.0)
        campaign.done[step.name] = found
        print(f" {found.status}, {found.seconds:.0f} s {found.note}".rstrip(), flush=True)
        campaign.write()
        campaign.collect(wanted)
        report.write(campaign.out)
    campaign.write()
    campaign.collect(wanted)
    report.write(campaign.out, pictures=True)
    print(f"{campaign.out / 'report.md'}, {end - clock():.0f} s of the time left")
    failed = [n for n, d in campaign.done.items() if d.status == FAILED]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
