"""The runs of a trial: each trains one network and scores its held-out cases; killed at any moment, it goes on."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.plan import PlanFolder
from ..models.folder import load_model
from ..support.console import quiet, say
from ..support.distributed import Processes
from ..support.errors import UserError
from ..support.files import read_json, write_json
from ..support.lock import Busy, locked
from ..support.stopping import Stopped
from ..training.checkpoint import NAME as STATE
from ..training.fold import Start, train
from ..training.record import read_log
from . import nnunet
from .arms import arm_plan, fed_metadata
from .design import Run
from .nnunet_data import ARMS
from .scoring import fed_values, score_cases

SCORES = "scores.json"

MODEL = "model"


@dataclass
class Left:
    """What a pass over the runs has left undone.

    Attributes:
        busy: runs that other processes are at.
        late: the time was over before all were done.
    """

    busy: list[Run] = field(default_factory=list)
    late: bool = False


def done(out: Path, run: Run) -> bool:
    """Whether a run's scores are there."""
    return (out / run.path / SCORES).is_file()


def make_runs(
    out: Path,
    plan: PlanFolder,
    design: dict[str, Any],
    runs: Sequence[Run],
    processes: Processes,
    *,
    deadline: float | None = None,
    options: Sequence[str] = (),
) -> Left:
    """Makes every run that is not there and that no other process is at.

    Args:
        design: as in design.json.
        deadline: in ``time.monotonic()``'s seconds; what is under way is saved when it passes.
        options: of the command line, for the message that says how to go on.

    Raises:
        Stopped: a signal has come; UserError: a run cannot be made.
    """
    left = Left()
    again = shlex.join(["fastfilm", "trial", *options])
    todo = [run for run in runs if not done(out, run)]
    for i, run in enumerate(todo, start=1):
        if deadline is not None and time.monotonic() >= deadline:
            left.late = True
            break
        folder = out / run.path
        try:
            with locked(folder, "fastfilm trial"):
                if done(out, run):
                    continue
                begun = time.monotonic()
                if run.arm in ARMS:
                    device, part = processes.device, design["held_out"]
                    made = nnunet.make(folder, out, plan, run, part, device, deadline, again)
                else:
                    made = _make(folder, plan, design, run, processes, deadline, again)
                scores = {
                    "arm": run.arm,
                    "fold": run.fold,
                    "seed": run.seed,
                    "design": design["sha256"],
                    **made,
                    "seconds": round(time.monotonic() - begun, 1),
                }
                write_json(folder / SCORES, scores)
                # the optimiser's state, larger than the weights: nothing is left to go on with
                (folder / MODEL / STATE).unlink(missing_ok=True)
        except Busy:
            left.busy.append(run)
            continue
        except UserError as error:
            raise UserError(f"{run}: {error}") from error
        except Stopped as stopped:
            if stopped.number == signal.SIGALRM:
                left.late = True
                break
            raise
        mean = mean_dice(scores)
        shown = "no Dice is defined" if mean is None else f"Dice {mean:.4f}"
        say(
            f"{i} of {len(todo)}: {run}: {scores['steps']} steps, {scores['seconds']:.0f} s, {shown}"
        )
    return left


def mean_dice(scores: dict[str, Any]) -> float | None:
    """The endpoint for one network: the mean over cases of their mean over labels; None: none is defined."""
    means = []
    for case in scores["cases"].values():
        values = [m["Dice"] for m in case["metrics"].values() if m["Dice"] is not None]
        if values:
            means.append(sum(values) / len(values))
    return sum(means) / len(means) if means else None


def _make(
    folder: Path,
    plan: PlanFolder,
    design: dict[str, Any],
    run: Run,
    processes: Processes,
    deadline: float | None,
    again: str,
) -> dict[str, Any]:
    """What scores.json says of a network of ours."""
    own = arm_plan(plan, run)
    model_folder = folder / MODEL
    start = Start(
        own,
        run.fold,
        model_folder,
        resume=(model_folder / "model.json").is_file() or (model_folder / STATE).is_file(),
        fed=fed_metadata(plan, run),
        again=again,
    )
    with quiet():
        progress = train(start, processes, deadline)
    model = load_model(model_folder, processes.device, design["weights"])
    cases = own.cases_of(run.fold, design["held_out"])
    keys = {n: k for n, k in own.config.metadata.items() if k.input}
    fed = {}
    if run.arm == "conditioned":
        fed = fed_values(model, keys, own.cases_of(run.fold, "train"))
    found = score_cases(model, own, cases, fed, _in_time(deadline))
    return {
        "steps": progress.step,
        "cases": found,
        "curve": [
            {"step": line["step"], "dice_mean": line["dice_mean"]}
            for line in read_log(model_folder)
            if "dice_mean" in line
        ],
    }


def _in_time(deadline: float | None) -> Callable[[], None]:
    """Raises Stopped (SIGALRM) once the deadline has passed."""

    def check() -> None:
        if deadline is not None and time.monotonic() >= deadline:
            raise Stopped(signal.SIGALRM, "out of time; the network is trained, its cases are not")

    return check


def seconds_of(out: Path, runs: Sequence[Run]) -> list[float]:
    """How long the runs took that are there; a run that was interrupted counts from where it went on."""
    return [float(read_json(out / run.path / SCORES)["seconds"]) for run in runs if done(out, run)]
