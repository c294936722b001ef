"""``fastfilm train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from fastfilm.segmentation.config import override, parse
from fastfilm.segmentation.console import say
from fastfilm.segmentation.distributed import processes
from fastfilm.segmentation.errors import UserError
from fastfilm.segmentation.plan import read_plan
from fastfilm.segmentation.training import Start, train


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
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1; none: what is there")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of training or augmentation"),
    ] = None,
) -> None:
    """Trains one fold of a plan, on one or (under torchrun) several processes.

    Writes model.json, best, final and last (the state for --resume), log.jsonl and TensorBoard files.
    """
    made = read_plan(plan)
    value = made.config.model_dump(mode="json")
    for text in set_ or []:
        key, sign, new = text.partition("=")
        section = key.partition(".")[0]
        if not sign or section not in ("training", "augmentation"):
            raise UserError(
                f"--set takes training.KEY=VALUE or augmentation.KEY=VALUE, got {text!r};"
                " the rest is part of the plan"
            )
        override(value, key, yaml.safe_load(new))
    made.config = parse(value, "--set")
    if made.config.training.batch_size is not None:
        made.plan.batch_size = made.config.training.batch_size
    with processes(device) as joined:
        done = train(Start(made, fold, model, resume, init), joined)
        if joined.first:
            best = (
                ""
                if done.best is None
                else f", best Dice {done.best:.4f} (epoch {done.best_epoch})"
            )
            say(f"{model}: trained for {done.epoch} epochs, {done.step} steps{best}")
