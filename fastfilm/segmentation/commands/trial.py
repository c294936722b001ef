"""``fastfilm trial``."""

from __future__ import annotations

import math
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastfilm.segmentation.config.schema import read_config
from fastfilm.segmentation.config.settings import settings
from fastfilm.segmentation.data.plan import PlanFolder
from fastfilm.segmentation.support import threads as cpu
from fastfilm.segmentation.support.console import bar, say
from fastfilm.segmentation.support.distributed import processes
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.files import read_json, write_json
from fastfilm.segmentation.support.lock import Busy, locked
from fastfilm.segmentation.trial.cost import cost_of, said
from fastfilm.segmentation.trial.design import runs, selected
from fastfilm.segmentation.trial.folder import open_trial
from fastfilm.segmentation.trial.runs import done, make_runs, seconds_of

AUDIT = "audit.json"


def command(
    config: Annotated[Path, typer.Argument(help="configuration (.yaml), as of fastfilm plan")],
    out: Annotated[Path, typer.Argument(help="folder of the trial; goes on if it is there")],
    arm: Annotated[
        list[str] | None, typer.Option(help="only runs of this arm; repeat for several")
    ] = None,
    fold: Annotated[list[int] | None, typer.Option(help="only runs of this fold; repeat")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="only runs of this seed; repeat")] = None,
    budget: Annotated[
        float | None, typer.Option(help="hours after which it stops, with all that is done saved")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="write the design, say what it costs, train nothing")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; none: what is there")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="of the CPU; none: OMP_NUM_THREADS, or one a core")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of the configuration, e.g. trial.seeds=5"),
    ] = None,
) -> None:
    """Answers whether the metadata help: trains with and without them, and compares.

    Every arm is trained on the same folds, seeds and steps, by a design that is written to OUT/design.json before
    the first step. The command can be interrupted at any time and goes on when it is given again; several
    processes with the same OUT share the work. The verdict and OUT/report.html come when all networks are there.
    """
    begun = time.monotonic()
    if config.suffix not in (".yaml", ".yml"):
        raise UserError(f"{config}: expected a .yaml configuration (docs/trial.md shows one)")
    if budget is not None and not (budget > 0 and math.isfinite(budget)):
        raise UserError(f"--budget must be a number of hours above 0, got {budget}")
    wanted = read_config(config, settings(set_ or []))
    with bar("checking") as task:
        plan, design, notes = open_trial(wanted, out, task)
    for note in notes:
        say(f"note: {note}")
    chosen = selected(design, arm or (), fold or (), seed or ())
    every = list(runs(design))
    say(
        f"{len(every)} networks: {', '.join(design['arms'])}; {design['folds']} folds,"
        f" {len(design['seeds'])} seeds; design {design['sha256'][:12]}"
    )
    if dry:
        cpu.use(threads)
        for line in said(cost_of(plan, chosen, device), chosen):
            say(line)
        return
    words = [str(config), str(out)]
    given: list[tuple[str, Any]] = [("--device", device), ("--threads", threads)]
    given += [("--set", text) for text in set_ or []]
    words += [str(w) for option, value in given if value is not None for w in (option, value)]
    with processes(device) as joined:
        if joined.world > 1:
            raise UserError(
                "a trial takes one device a process: start it several times with the same OUT instead of torchrun"
            )
        cpu.use(threads, joined.device)
        deadline = None if budget is None else begun + 3600 * budget
        left = make_runs(out, plan, design, chosen, joined, deadline=deadline, options=words)
        missing = [run for run in every if not done(out, run)]
        if not missing:
            finish(out, plan)
            return
    hours = _hours(out, every, len(missing))
    if left.late:
        say(f"the budget of {budget:g} hours is spent")
    for run in left.busy:
        say(f"another process is at {run}")
    say(
        f"{len(every) - len(missing)} of {len(every)} networks are there, {len(missing)} are missing{hours}; the"
        f" verdict comes when all are:\n  {shlex.join(['fastfilm', 'trial', *words])}"
    )


def _hours(out: Path, every: list[Any], missing: int) -> str:
    """How long the missing runs will take, by those that are there."""
    seconds = seconds_of(out, every)
    if not seconds:
        return ""
    return f" (about {sum(seconds) / len(seconds) * missing / 3600:.2g} hours)"


def finish(out: Path, plan: PlanFolder) -> None:
    """The audit, the results, the page, and the verdict in five lines."""
    from fastfilm.segmentation.audit import audit
    from fastfilm.segmentation.trial.page import write_page
    from fastfilm.segmentation.trial.results import collect
    from fastfilm.segmentation.trial.verdict import verdict

    try:
        with locked(out, "fastfilm trial"):
            path = out / AUDIT
            if not path.is_file():
                write_json(path, audit(plan))
            results = collect(out)
            page = write_page(out, results, read_json(path))
    except Busy:
        say("another process is at the results")
        return
    say("")
    for line in verdict(results).sentences:
        say(line)
    say(f"written to {page.resolve()}")
