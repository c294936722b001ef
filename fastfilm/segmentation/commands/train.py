"""``fastfilm train``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
import yaml

from fastfilm.segmentation.commands.options import Device, Threads
from fastfilm.segmentation.config.schema import (
    Config,
    override,
    parse,
)
from fastfilm.segmentation.data.plan import read_plan
from fastfilm.segmentation.support import threads as cpu
from fastfilm.segmentation.support.console import say
from fastfilm.segmentation.support.distributed import processes
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.hints import did_you_mean
from fastfilm.segmentation.training.fold import Start, train

SECTIONS = ("training", "augmentation")
"""Of the configuration: what a training may set for itself."""


def command(
    plan: Annotated[Path, typer.Argument(help="folder made by fastfilm plan")],
    model: Annotated[Path, typer.Argument(help="model folder to write")],
    fold: Annotated[int, typer.Option(help="which fold is held out")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where an interrupted training stopped")
    ] = False,
    init: Annotated[
        Path | None, typer.Option("--from", help="model folder to start from (fine-tuning)")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of training or augmentation"),
    ] = None,
) -> None:
    """Trains one fold of a plan, on one or (under torchrun) several processes.

    Writes model.json, best, final and last (the state for --resume), log.jsonl and TensorBoard files. Ctrl-C and
    SIGTERM end it after the step under way, with the state saved.
    """
    made = read_plan(plan)
    made.config = _changed(made.config, set_ or [])
    if made.config.training.batch_size is not None:
        made.plan.batch_size = made.config.training.batch_size
    options = [word for text in set_ or [] for word in ("--set", text)]
    for name, value in (("--device", device), ("--threads", threads)):
        options += [] if value is None else [name, str(value)]
    with processes(device) as joined:
        cpu.use(threads, joined.device if joined.first else None)
        done = train(Start(made, fold, model, resume, init, options), joined)
        if joined.first:
            best = (
                ""
                if done.best is None
                else f", best Dice {done.best:.4f} (epoch {done.best_epoch})"
            )
            say(f"{model}: trained for {done.epoch} epochs, {done.step} steps{best}")


def _changed(config: Config, changes: Sequence[str]) -> Config:
    """The plan's configuration with ``--set``'s values."""
    value = config.model_dump(mode="json")
    given: set[str] = set()
    for text in changes:
        key, sign, new = text.partition("=")
        section = key.partition(".")[0]
        if not sign or section not in SECTIONS:
            hint = did_you_mean(section, SECTIONS) or "; the rest is part of the plan"
            raise UserError(
                f"--set takes training.KEY=VALUE or augmentation.KEY=VALUE, got {text!r}{hint}"
            )
        try:
            parsed = yaml.safe_load(new)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--set {key}: {new!r} is not YAML: {reason}") from error
        if key in given:
            raise UserError(f"--set: {key} is given twice")
        given.add(key)
        override(value, key, parsed)
    return parse(value, "--set")
