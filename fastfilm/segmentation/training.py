"""Training one fold of a plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .cache import cached
from .checkpoint import NAME
from .config import write_config
from .console import bar, say
from .distributed import Processes
from .errors import Problems, UserError
from .files import write_json
from .finetuning import freeze_all_but_generator, start_from
from .metadata import MetadataEncoder, MetadataError
from .model_folder import LabelInfo, ModelInfo, save_model
from .network import divisor
from .optimisation import Progress
from .plan import PlanFolder
from .sources import Case
from .trainer import Trainer


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        plan, fold: the data.
        folder: the model folder to write.
        resume: go on from its last.safetensors.
        init: model folder to fine-tune.
    """

    plan: PlanFolder
    fold: int
    folder: Path
    resume: bool = False
    init: Path | None = None


def train(start: Start, processes: Processes) -> Progress:
    """Trains, validates and writes the model folder.

    Raises:
        UserError: settings or data that do not fit, a loss that is not finite, a folder that cannot be written.
    """
    config = start.plan.config
    last = start.folder / NAME
    resuming = start.resume and last.is_file()
    if last.exists() and not start.resume:
        raise UserError(
            f"{start.folder}: holds a training already; --resume goes on with it, or choose another folder"
        )
    batch = start.plan.plan.batch_size
    if batch % (processes.world * config.training.accumulate):
        raise UserError(
            f"the batch of {batch} cannot be shared by {processes.world} processes in"
            f" {config.training.accumulate} parts each (training.batch_size, training.accumulate)"
        )
    torch.manual_seed(config.training.seed)
    if processes.device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    train_cases, val_cases = (start.plan.cases_of(start.fold, part) for part in ("train", "val"))
    if not train_cases:
        raise UserError(f"fold {start.fold} of {start.plan.path} has no training cases")
    info, network = _model(start, train_cases)
    _check_metadata([*train_cases, *val_cases], info)
    if processes.first:
        for left in start.folder.glob(".writing-*"):
            # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        save_model(start.folder, info)
        write_config(config, start.folder / "config.yaml")
        write_json(start.folder / "splits.json", start.plan.folds[start.fold])
    cache = start.plan.path / "cache"
    arguments = (config.data, info.preprocessing, cache)
    # the first process makes what is missing, the others find it
    if processes.first:
        with bar("preprocessing") as progress:
            cached([*train_cases, *val_cases], *arguments, progress)
    processes.wait()
    trainer = Trainer(
        config=config,
        info=info,
        network=network,
        folder=start.folder,
        processes=processes,
        batch_size=batch,
        train_cases=cached(train_cases, *arguments),
        val_cases=cached(val_cases, *arguments),
        identity=identity(start, info),
    )
    if resuming:
        trainer.state.load(start.folder, trainer.identity)
        if processes.first:
            where = "has ended" if trainer.state.progress.finished else "goes on"
            say(f"{start.folder}: training {where} at step {trainer.state.progress.step}")
    if not trainer.state.progress.finished:
        trainer.run()
    return trainer.state.progress


def identity(start: Start, info: ModelInfo) -> str:
    """Of everything that decides the result; a state of another one is not gone on with."""
    config = start.plan.config.model_dump(mode="json")
    # how often is saved and who loads changes nothing
    for key in ("checkpoint_minutes", "checkpoint_steps", "workers"):
        del config["training"][key]
    del config["data"]["root"]
    model = info.model_dump(mode="json", exclude={"fastfilm", "training"})
    fold = start.plan.folds[start.fold]
    value = [config, model, fold, start.plan.plan.batch_size, str(start.init or "")]
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _model(start: Start, cases: Sequence[Case]) -> tuple[ModelInfo, nn.Module]:
    """The model's description with the encoder fitted on the training cases, and its network."""
    config, plan = start.plan.config, start.plan.plan
    task = config.output.mode == "task"
    rows: dict[str, dict[str, Any]] = {c.id: dict(c.metadata) for c in cases}
    names = list(config.data.labels)
    for i, row in enumerate(rows.values()):
        if task:
            row[config.output.task_key] = names[i % len(names)]
    taken: set[int] = set()
    labels = []
    for i, (name, label) in enumerate(config.data.labels.items(), start=1):
        value = (label.values or [i])[0]
        value = value if value not in taken else max(taken) + 1
        taken.add(value)
        labels.append(LabelInfo(name=name, values=label.values or [], value=value))
    single = config.data.combine == "samples"
    info = ModelInfo(
        network=plan.network,
        spatial_dims=plan.spatial_dims,
        in_channels=1 if single else len(config.data.contrasts),
        contrasts=config.data.contrasts,
        combine=config.data.combine,
        missing_contrast=config.data.missing_contrast,
        labels=labels,
        output=config.output.mode,
        task_key=config.output.task_key if task else None,
        metadata=MetadataEncoder.fit(rows, start.plan.keys()),
        preprocessing=plan.preprocessing,
        patch_size=plan.patch_size,
        divisor=divisor(plan.network),
        training={"fold": start.fold, "cases": len(cases)},
    )
    if start.init is not None:
        return start_from(start.init, info, cases, config)
    network = info.build(pretrained=True)
    if config.training.freeze == "all_but_generator":
        freeze_all_but_generator(network)
    return info, network


def _check_metadata(cases: Sequence[Case], info: ModelInfo) -> None:
    """Everything that the loaders would stumble over, at once."""
    wrong, encoder = [], info.metadata
    for case in cases:
        values = {k: v for k, v in case.metadata.items() if k in encoder.names()}
        if info.task_key is not None:
            values[info.task_key] = info.labels[0].name
        try:
            encoder.encode(values)
        except MetadataError as error:
            wrong.append(f"{case.id}: {error}")
    if wrong:
        raise Problems("problems in the metadata", wrong)
