"""Runs the steps, each as a process with a bound; what they give is kept after each, and a run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..counted import verdicts
from ..counted.processes import follow_parent
from . import bundle, report, results
from .steps import PREPARED, ROOT, Step, filled

OK, FAILED, CUT, SKIPPED = "ok", "FAILED", "cut", "skipped"
"""Ended well; ended with an error; ended by its bound (what it had written counts); not started."""

RESERVED = 10.0
"""Seconds kept for the report and its pictures."""

GRACE = 3.0
"""Seconds between asking a process to end and ending it."""

TRIES = 4
"""How often a suite is started whose process a faulty kernel ends."""

ALONE = """import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable___fastfilm" not in str(f)]
"""
"""sitecustomize of the steps: an editable install lends no extension to the package that is measured."""

SOURCES = ("kernels", "csrc", "fastfilm", "setup.py")


@dataclass
class Done:
    """What became of a step; ``sources``: of which it holds."""

    status: str
    seconds: float = 0.0
    code: int | None = None
    note: str = ""
    sources: str = ""


def fingerprint() -> str:
    """A hash of the sources that the steps' results depend on."""
    digest = hashlib.sha256()
    for name in SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".cu", ".cpp", ".h", ".inc"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str | None:
    """Commit of the checkout, with ``-dirty`` if it has changes; where there is no git, what was prepared."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads((PREPARED / "commit.json").read_text(encoding="utf-8"))
        return known["commit"] if known["sources"] == fingerprint() else f"{known['commit']}-dirty"
    return None


class Campaign:
    """The folder ``work`` of a campaign that goes on, and the folder ``out`` of what is known so far."""

    def __init__(self, out: Path, work: Path, device: str, values: Mapping[str, str]) -> None:
        self.out, self.work, self.device = out, work, device
        self.values = {"python": sys.executable, "work": str(work), **values}
        for name in ("logs", "steps", "tuned"):
            (work / name).mkdir(parents=True, exist_ok=True)
        (work / "site").mkdir(exist_ok=True)
        (work / "site" / "sitecustomize.py").write_text(ALONE)
        self.done: dict[str, Done] = {}
        self.about: dict[str, Any] = {"device": device, "runs": []}
        self.sources = fingerprint()
        state = work / "campaign.json"
        if state.exists():
            data = json.loads(state.read_text(encoding="utf-8"))
            if data["about"]["device"] != device:
                raise ValueError(f"the bundle is of a campaign on {data['about']['device']}")
            self.about = data["about"]
            self.done = {name: Done(**values) for name, values in data["steps"].items()}
        self.about["commit"] = commit()

    def publish(self, wanted: Sequence[Step]) -> str:
        """Brings everything in ``out`` up to date; the report."""
        done = {name: asdict(d) for name, d in self.done.items()}
        bundle.write_json(self.work / "campaign.json", {"about": self.about, "steps": done})
        found = results.collect(self.work, self.about, done, wanted)
        pictures = [p for p in bundle.PICTURES if (self.out / p).exists()]
        text = report.text(found, pictures)
        bundle.replace(self.out / bundle.NAME, bundle.pack(self.work))
        bundle.write_json(self.out / "results.json", found)
        bundle.replace(self.out / "report.md", text)
        return text

    def order(self, wanted: Sequence[Step], only: Sequence[str]) -> list[Step]:
        """What to run: what makes the rest, what never ran or holds no longer, then what was cut short."""

        def rank(step: Step) -> int:
            before = self.done.get(step.name)
            if step.setup:
                return 0 if not (only and step.serves) or {*step.serves, step.name} & {*only} else 3
            if only:
                return 1 if step.name in only else 3
            if before is None or before.status == SKIPPED:
                return 1
            if step.checks and before.sources != self.sources:
                return 1
            return 2 if before.status == CUT else 3

        return [s for s in sorted(wanted, key=rank) if rank(s) < 3]

    def why_not(self, step: Step, left: float) -> str | None:
        """Why a step is not started; None if it is."""
        for name in step.after:
            if name not in self.done or self.done[name].status in (FAILED, CUT, SKIPPED):
                return f"{name} did not succeed" if name in self.done else name
        if left < step.least:
            return f"{max(left, 0):.0f} s left, it needs {step.least:.0f}"
        return None

    def environment(self, step: Step) -> dict[str, str]:
        """The variables of a step: the package from the campaign's own folder, faulty kernels left out."""
        paths = (self.work / "site", ROOT, self.work / "libraries")
        found = {
            **os.environ,
            "MPLBACKEND": "Agg",
            "PYTHONUNBUFFERED": "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "FASTFILM_TUNED": str(self.work / "tuned"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
        }
        checks = results.listed(self.work / "steps" / "smoke.json")
        left_out = found.get("FASTFILM_WITHOUT"), verdicts.without(checks)
        found["FASTFILM_WITHOUT"] = ",".join(filter(None, left_out))
        return found | {n: filled(text, self.values) for n, text in step.environment.items()}

    def run(self, step: Step, seconds: float) -> Done:
        """One step, ended after ``seconds``; started again where one of its cases has ended the process."""
        end = time.monotonic() + seconds
        journal = self.work / "steps" / f"{step.name}.journal"
        journal.unlink(missing_ok=True)
        tries = TRIES if "--journal" in step.command else 1
        for left in range(tries - 1, -1, -1):
            found = self._once(step, max(end - time.monotonic(), 1.0))
            found.seconds = seconds - (end - time.monotonic())
            if found.status != FAILED or not left or not unfinished(journal):
                break
            if end - time.monotonic() < step.least:
                break
        reason = results.why_unreadable(self.work / "steps" / f"{step.name}.json")
        if step.rows and reason:
            found.status, found.note = FAILED, reason[:200]
        return found

    def _once(self, step: Step, seconds: float) -> Done:
        # a process needs some seconds to write what it has
        minutes = f"{max(0.05, (0.95 * seconds - 4) / 60):.2f}"
        command = step.arguments({**self.values, "minutes": minutes})
        log = self.work / "logs" / f"{step.name}.log"
        begun = time.monotonic()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            try:
                code = bounded(command, self.environment(step), file, seconds)
            except OSError as error:
                file.write(f"{error}\n")
                return Done(SKIPPED, 0.0, None, f"{command[0]}: {error.strerror}", self.sources)
        took = time.monotonic() - begun
        if code is None:
            return Done(CUT, took, None, f"ended after {took:.0f} s", self.sources)
        note = last_line(log) if code or step.tells else ""
        return Done(OK if code == 0 else FAILED, took, code, note, self.sources)


def unfinished(journal: Path) -> bool:
    """Whether the last thing that a suite noted is that it began a case."""
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
        return bool(lines) and "begin" in json.loads(lines[-1])
    except (OSError, ValueError):
        return False


def bounded(
    command: Sequence[str], environment: dict[str, str], log: Any, seconds: float
) -> int | None:
    """Exit status of a process, or None if it and all it started had to be ended after ``seconds``."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True, preexec_fn=follow_parent,
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
    """What a process said last, of an error if it said of one, at most 200 characters."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line][-40:]
    errors = [line for line in said if re.search(r"\berror:|Error\b|ERROR", line)]
    return (errors or said or [""])[-1][:200]


def run(
    out: Path,
    device: str,
    seconds: float,
    wanted: Sequence[Step],
    begun_from: Path | None = None,
    only: Sequence[str] = (),
    values: Mapping[str, str] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs a campaign for at most ``seconds``; 0 unless a step FAILED (1).

    Args:
        begun_from: bundle of the campaign that goes on.
        only: names of the steps to run, beside those that make what they need; none: what is not done.

    Raises:
        ValueError: an unknown step, or no bundle of a campaign on this kind of device.
    """
    end = clock() + seconds
    unknown = set(only) - {s.name for s in wanted}
    if unknown:
        names = ", ".join(s.name for s in wanted)
        raise ValueError(f"--only: no step {', '.join(sorted(unknown))}; there are {names}")
    work = Path(tempfile.mkdtemp(prefix="fastfilm-campaign-"))
    try:
        if begun_from is not None:
            bundle.unpack(begun_from, work)
        out.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(out.resolve(), work, device, values or {})
        about = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": seconds}
        about |= {"commit": campaign.about["commit"], "host": platform.node()}
        campaign.about["runs"].append(about)
        _steps(campaign, wanted, only, end, clock)
        draw(campaign)
        text = campaign.publish(wanted)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{text[: report.PRINTED]}")
    failed = [n for n, d in campaign.done.items() if d.status == FAILED]
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _steps(
    campaign: Campaign, wanted: Sequence[Step], only: Sequence[str], end: float, clock: Any
) -> None:
    for group in together(campaign.order(wanted, only)):
        left = end - clock() - RESERVED
        begun = []
        for step in group:
            reason = campaign.why_not(step, left)
            if reason is None:
                print(f"{step.name}: {step.why} …", flush=True)
                begun.append(step)
                continue
            if step.setup or step.name not in campaign.done:
                campaign.done[step.name] = Done(SKIPPED, note=reason)
            print(f"{step.name}: not started, {reason}", flush=True)
        # what was cut short gets all the time that there is
        cut = {n for n, d in campaign.done.items() if d.status == CUT}
        bounds = [left if s.name in cut else min(s.seconds, left) for s in begun]
        for step, found in zip(begun, _run(campaign, begun, bounds), strict=True):
            campaign.done[step.name] = found
            said = f"{step.name}: {found.status}, {found.seconds:.0f} s {found.note}"
            print(said.rstrip(), flush=True)
            if step.setup and found.status in (FAILED, CUT):
                log = (campaign.work / "logs" / f"{step.name}.log").read_text(errors="replace")
                print("\n".join(log.splitlines()[-25:]), flush=True)
        campaign.publish(wanted)


def _run(campaign: Campaign, steps: Sequence[Step], bounds: Sequence[float]) -> list[Done]:
    """What became of steps that are begun at the same time."""
    if len(steps) < 2:  # in this thread, where an interrupt ends it
        return list(map(campaign.run, steps, bounds))
    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(campaign.run, steps, bounds))


def together(ordered: Sequence[Step]) -> list[list[Step]]:
    """Steps that follow one another and may run beside each other, as one group; every other one alone."""
    groups: list[list[Step]] = []
    for step in ordered:
        free = groups and not {s.name for s in groups[-1]} & set(step.after)
        if free and step.beside and groups[-1][-1].beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def draw(campaign: Campaign) -> None:
    """The pictures, by a process of its own: without matplotlib there are none."""
    campaign.values["out"] = str(campaign.out)
    command = "{python} -m benchmarks.campaign.plots {out}"
    campaign._once(Step("pictures", "", command, RESERVED), 2 * RESERVED)
