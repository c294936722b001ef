"""The arms of nnU-Net: its own planning, preprocessing and training on the trial's folds, scored as the others.

OUT/nnunet/preprocessed/    made once for all runs; splits_final.json is written last
OUT/nnunet/prepare.log      nnU-Net's output while it was made
RUN/results/                nnU-Net's results, its final validation of the held-out cases among them
RUN/nnunet.log              nnU-Net's output
RUN/metadata.csv            arm nnunet_conditioned: what its trainer reads
RUN/nnunet.json             written when training and final validation are done
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastfilm

from ..data.plan import PlanFolder
from ..data.sources import Case
from ..evaluation.metrics import case_metrics
from ..images.labels import mask_of, whole_labels
from ..images.nifti import read_volume
from ..support.errors import Problems, UserError
from ..support.files import read_json, write_json
from ..support.lock import locked
from ..support.stopping import (
    Stop,
    Stopped,
    signals,
)
from .design import Run
from .nnunet_data import DATASET, ENDING, FOLDER, configuration, names, splits, write_table
from .scoring import METRICS, cluster_of, truths

MODULE = "fastfilm.integrations.nnunet.run"

TRAINERS = {"nnunet": "nnUNetTrainer", "nnunet_conditioned": "nnUNetTrainerFastFiLM"}

REPORT = "nnunet.json"

DEVICES = ("cpu", "cuda", "mps")

SHOWN = 15
"""Lines of a log that a message shows."""

POLL, GRACE = 0.2, 30.0
"""Seconds between two looks at a process, and that it gets to end in order."""


def make(
    folder: Path,
    out: Path,
    plan: PlanFolder,
    run: Run,
    part: str,
    device: torch.device,
    deadline: float | None,
    again: str,
) -> dict[str, Any]:
    """Trains a run's network, or goes on with it, and scores its held-out cases.

    Args:
        folder: of the run.
        out: of the trial.
        part: the held-out one, see ``PlanFolder.held_out``.
        deadline: in ``time.monotonic()``'s seconds; nnU-Net is ended when it passes, and goes on later with the
            epoch that was under way.
        again: the command that goes on with the trial.

    Returns:
        ``steps``, ``cases`` and ``curve`` of scores.json. The curve is nnU-Net's pseudo Dice: of patches of the
        held-out cases, which chooses nothing.

    Raises:
        Stopped: a signal has come, or the deadline has passed.
        UserError: nnU-Net has failed, with its last words; a device that it has not.
        Busy: another process prepares the data.
    """
    if device.type not in DEVICES:
        raise UserError(f"{run}: nnU-Net computes on {', '.join(DEVICES)}, not on {device}")
    try:
        _prepare(out, plan, part, device, deadline)
        if not (folder / REPORT).is_file():
            _train(folder, out, plan, run, part, device, deadline)
    except Stopped as stopped:
        text = f"{stopped.text}; go on with:\n  {again}"
        raise Stopped(stopped.number, text) from None
    report = read_json(folder / REPORT)
    predictions = folder / report["results"] / "validation"
    return {
        "steps": report["steps"],
        "cases": score_files(plan, plan.cases_of(run.fold, part), predictions),
        "curve": report["curve"],
    }


def score_files(plan: PlanFolder, cases: Sequence[Case], folder: Path) -> dict[str, Any]:
    """What scores.json holds under ``cases``, of nnU-Net's predictions in a folder.

    Masks alone are compared: there are no probabilities for the reliability, nor predictions under other metadata.

    Raises:
        Problems: predictions that are missing, or of another shape than the image.
    """
    name, found, wrong = names(plan), {}, []
    for case in cases:
        path = folder / f"{name[case.id]}{ENDING}"
        try:
            found[case.id] = _scores(plan, case, path)
        except UserError as error:
            wrong.append(f"{case.id}: {error}")
    if wrong:
        raise Problems("held-out cases that cannot be scored", wrong)
    return found


def _scores(plan: PlanFolder, case: Case, path: Path) -> dict[str, Any]:
    true, grid = truths(plan, case)
    # nnU-Net writes voxels in the order of the image's file, whatever its header says of their places
    labels = whole_labels(path, read_volume(path).array)[0]
    metrics = {}
    for i, label in enumerate(plan.config.data.labels, start=1):
        if labels.shape != true[label].shape:
            raise UserError(f"{path}: has shape {labels.shape}, the label {true[label].shape}")
        every = case_metrics(mask_of(path, labels, [i]), true[label], grid)
        metrics[label] = {m: every[m] for m in METRICS}
    return {
        "subject": case.subject,
        "cluster": cluster_of(plan, case),
        "metadata": dict(case.metadata),
        "metrics": metrics,
        "swaps": {},
        "reliability": {},
    }


def _prepare(
    out: Path, plan: PlanFolder, part: str, device: torch.device, deadline: float | None
) -> None:
    """nnU-Net's plans and preprocessed cases, once for all runs; what was interrupted begins anew."""
    folder = out / FOLDER
    done = folder / "preprocessed" / DATASET / "splits_final.json"
    if done.is_file():
        return
    with locked(folder, "fastfilm trial"):
        if done.is_file():
            return
        shutil.rmtree(folder / "preprocessed", ignore_errors=True)
        environment = _environment(out, folder / "results", device)
        if environment.get("nnUNet_n_proc_DA") == "0":
            # what trains without processes that load is no number of threads for nnU-Net's planner
            environment["nnUNet_n_proc_DA"] = "1"
        log = folder / "prepare.log"
        log.unlink(missing_ok=True)
        words = ["prepare", DATASET, configuration(plan)]
        call(words, environment, log, deadline, "its preprocessing begins anew")
        write_json(done, splits(plan, part))


def _train(
    folder: Path,
    out: Path,
    plan: PlanFolder,
    run: Run,
    part: str,
    device: torch.device,
    deadline: float | None,
) -> None:
    environment = _environment(out, folder / "results", device)
    if run.arm == "nnunet_conditioned":
        table = folder / "metadata.csv"
        columns = write_table(plan, run.fold, part, table)
        environment["FASTFILM_NNUNET_TABLE"] = str(table.resolve())
        environment["FASTFILM_NNUNET_COLUMNS"] = ",".join(columns)
    report = folder / REPORT
    words = ["train", DATASET, configuration(plan), str(run.fold)]
    words += ["--trainer", TRAINERS[run.arm], "--seed", str(run.seed)]
    words += ["--device", device.type, "--report", str(report.resolve())]
    log = folder / "nnunet.log"
    call(words, environment, log, deadline, "its last whole epoch is saved")
    if not report.is_file():
        raise UserError(f"{log}: nnU-Net has ended without {report.name}")


def _environment(out: Path, results: Path, device: torch.device) -> dict[str, str]:
    """Of nnU-Net's process: its folders, the device, and of the trainer's variables those of the design only."""
    found = dict(os.environ)
    for name in ("TABLE", "COLUMNS", "META"):
        found.pop(f"FASTFILM_NNUNET_{name}", None)
    shared = (out / FOLDER).resolve()
    found["nnUNet_raw"] = str(shared / "raw")
    found["nnUNet_preprocessed"] = str(shared / "preprocessed")
    found["nnUNet_results"] = str(results.resolve())
    package = Path(fastfilm.__file__).parent
    found["nnUNet_extTrainer"] = str(package / "integrations" / "nnunet" / "trainers")
    if device.type == "cuda":
        # nnU-Net takes the first GPU that it sees
        there = [g for g in found.get("CUDA_VISIBLE_DEVICES", "").split(",") if g]
        index = device.index or 0
        found["CUDA_VISIBLE_DEVICES"] = there[index] if there else str(index)
    else:
        found["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    return found


def call(
    words: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    deadline: float | None,
    kept: str,
) -> None:
    """nnU-Net in a process and session of its own, whose output goes to the end of ``log``.

    A signal to this process, or the deadline, interrupts it as Ctrl-C would. It ends by itself when this process
    is gone: it sees the end of its input.

    Args:
        deadline: in ``time.monotonic()``'s seconds.
        kept: for the message after an interruption: what of the work stays.

    Raises:
        Stopped: it was interrupted. UserError: it has failed.
    """
    with signals() as stop, open(log, "ab") as file:
        stop.deadline = deadline
        stop.patient = True
        with subprocess.Popen(
            [sys.executable, "-m", MODULE, *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                status = _wait(process, stop, f"{log.parent}: nnU-Net was interrupted; {kept}")
            finally:
                # processes that load may be left, and after a second signal all of them
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    if status != 0:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise UserError(f"nnU-Net has failed ({how}); the last lines of {log}:\n{_tail(log)}")


def _wait(process: subprocess.Popen[bytes], stop: Stop, text: str) -> int:
    """The process's status; Stopped with ``text`` after an interruption."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL)
        if (number := stop.due()) is not None:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise Stopped(number, text)


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-SHOWN:])
