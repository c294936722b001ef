"""The process of nnU-Net that ``fastfilm trial`` starts: preparation of its data set, or one seeded training.

    python -m fastfilm.integrations.nnunet.run prepare DATASET CONFIGURATION
    python -m fastfilm.integrations.nnunet.run train DATASET CONFIGURATION FOLD --trainer NAME --seed S --report F

It needs a session of its own and an open standard input: when that ends, the process that started it is gone, and
the whole session is killed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import threading
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.experiment_planning.plan_and_preprocess_api import (
    extract_fingerprints,
    plan_experiments,
    preprocess,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from .settings import settings

PLANS = "nnUNetPlans"

PROCESSES = {"2d": 8, "3d_fullres": 4}
"""Of preprocessing: the defaults of nnUNetv2_plan_and_preprocess."""


def prepare(dataset: str, configuration: str) -> None:
    """What ``nnUNetv2_plan_and_preprocess --verify_dataset_integrity`` does, for one configuration.

    Raises:
        ValueError: nnU-Net's plans have no such configuration.
    """
    number = [convert_dataset_name_to_id(dataset)]
    extract_fingerprints(number, check_dataset_integrity=True, show_progress_bar=False)
    plan_experiments(number)
    plans = os.path.join(nnUNet_preprocessed, dataset, f"{PLANS}.json")
    there = PlansManager(plans).available_configurations
    if configuration not in there:
        raise ValueError(f"nnU-Net plans {', '.join(there)} for {dataset}, not {configuration}")
    workers = min(PROCESSES[configuration], default_num_processes)
    preprocess(
        number, configurations=(configuration,), num_processes=(workers,), show_progress_bar=False
    )


def train(
    dataset: str, configuration: str, fold: int, trainer: str, seed: int, device: str, report: str
) -> None:
    """Trains a fold, or goes on after the last whole epoch, and validates with the weights of the end.

    The trainer is nnU-Net's but for three things: its random numbers start from the seed, a checkpoint is written
    after every epoch (whole or not at all), and ``FASTFILM_NNUNET_EPOCHS`` and ``_ITERATIONS`` hold.

    Args:
        trainer: name of its class.
        report: JSON file that gets ``results`` (nnU-Net's folder of the fold, relative to the file), ``steps``,
            and ``curve``: the mean pseudo Dice after each epoch.
    """
    if device == "cuda":
        # as nnUNetv2_train does
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True
    _seed(seed, 0)
    made = get_trainer_from_args(
        dataset, configuration, fold, trainer, PLANS, device=torch.device(device)
    )
    chosen = settings()
    if chosen.epochs is not None:
        made.num_epochs = chosen.epochs
    if chosen.iterations is not None:
        made.num_iterations_per_epoch = chosen.iterations
        made.num_val_iterations_per_epoch = chosen.iterations
    made.save_every = 1
    _save_whole(made)
    final, latest = (
        os.path.join(made.output_folder, f"checkpoint_{name}.pth") for name in ("final", "latest")
    )
    if os.path.isfile(final):
        made.load_checkpoint(final)
    else:
        if os.path.isfile(latest):
            made.load_checkpoint(latest)
            # else the epochs after it would draw what the first ones drew
            _seed(seed, made.current_epoch)
        made.run_training()
    made.perform_actual_validation(False)
    steps = made.num_iterations_per_epoch
    curve = [
        {"step": (epoch + 1) * steps, "dice_mean": float(dice)}
        for epoch, dice in enumerate(made.logger.get_checkpoint()["mean_fg_dice"])
        if math.isfinite(dice)
    ]
    found = {
        "results": os.path.relpath(made.output_folder, os.path.dirname(report)),
        "steps": made.num_epochs * steps,
        "curve": curve,
    }
    with open(f"{report}.writing", "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1, allow_nan=False)
    os.replace(f"{report}.writing", report)


def _seed(seed: int, epoch: int) -> None:
    a, b, c = np.random.SeedSequence([seed, epoch]).generate_state(3).tolist()
    random.seed(a)
    np.random.seed(b)
    torch.manual_seed(c)


def _save_whole(trainer: Any) -> None:
    """Checkpoints that are written beside and moved into place: a killed process leaves the old one."""
    save = trainer.save_checkpoint

    def whole(filename: str) -> None:
        save(f"{filename}.writing")
        os.replace(f"{filename}.writing", filename)

    trainer.save_checkpoint = whole


def _end_with_the_parent() -> None:
    """Kills this process's session when its standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fastfilm.integrations.nnunet.run")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "train"):
        command = commands.add_parser(name)
        command.add_argument("dataset")
        command.add_argument("configuration", choices=tuple(PROCESSES))
    command.add_argument("fold", type=int)
    command.add_argument("--trainer", required=True)
    command.add_argument("--seed", type=int, required=True)
    command.add_argument("--device", default="cuda")
    command.add_argument("--report", required=True)
    given = vars(parser.parse_args())
    _end_with_the_parent()
    if given.pop("command") == "prepare":
        prepare(**given)
    else:
        train(**given)


if __name__ == "__main__":
    main()
