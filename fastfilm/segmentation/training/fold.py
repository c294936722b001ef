"""Training one fold of a plan."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastfilm

from ..config.schema import decisive, write_config
from ..data.cache import cached
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..metadata.encoder import MetadataEncoder, MetadataError
from ..models.folder import (
    LabelInfo,
    ModelInfo,
    read_info,
    save_model,
)
from ..models.network import divisor
from ..support.console import bar, say
from ..support.distributed import Processes
from ..support.errors import Problems, UserError
from ..support.files import write_json
from ..support.lock import locked
from ..support.offline import refuse_fetching
from ..support.stopping import (
    Stop,
    Stopped,
    signals,
)
from .checkpoint import NAME, Saved
from .finetuning import freeze_all_but_generator, start_from
from .loop import Trainer
from .optimisation import Progress


@dataclass(frozen=True)
class Start:
    """What a training starts from.

    Attributes:
        plan, fold: the data.
        folder: the model folder to write.
        resume: go on from its last.safetensors.
        init: model folder to fine-tune.
        options: further ones of the command line, for the message that says how to go on.
        fed: case -> metadata that training feeds in place of the case's own; None: its own.
        again: the command that goes on with it; None: that of ``fastfilm train``.
    """

    plan: PlanFolder
    fold: int
    folder: Path
    resume: bool = False
    init: Path | None = None
    options: Sequence[str] = ()
    fed: Mapping[str, Mapping[str, Any]] | None = None
    again: str | None = None

    def command(self) -> str:
        """What goes on with this training."""
        if self.again is not None:
            return self.again
        words = [
            "fastfilm",
            "train",
            str(self.plan.path),
            str(self.folder),
            "--fold",
            str(self.fold),
        ]
        init = [] if self.init is None else ["--from", str(self.init)]
        return shlex.join([*words, *init, *self.options, "--resume"])


def train(start: Start, processes: Processes, deadline: float | None = None) -> Progress:
    """Trains, validates and writes the model folder, which no other process writes to meanwhile.

    In one process (not under torchrun), SIGINT and SIGTERM end it after the step under way.

    Args:
        deadline: in ``time.monotonic()``'s seconds; training ends after the step in which it passes.

    Raises:
        UserError: settings or data that do not fit, a loss that is not finite, a folder that cannot be written or
            is being written to, nothing to resume.
        Stopped: a signal has come, or the deadline has passed.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(signals(processes.world == 1))
        stop.deadline = deadline
        if processes.first:
            stack.enter_context(locked(start.folder, "fastfilm train"))
        trainer = _prepare(start, processes, stop)
        if not trainer.state.progress.finished:
            stop.patient = True
            _run(trainer, start)
        return trainer.state.progress


def _prepare(start: Start, processes: Processes, stop: Stop) -> Trainer:
    """Checks everything, writes what describes the model, and fills the cache."""
    config = start.plan.config
    batch = start.plan.plan.batch_size
    if batch % (processes.world * config.training.accumulate):
        raise UserError(
            f"the batch of {batch} cannot be shared by {processes.world} processes in"
            f" {config.training.accumulate} parts each (training.batch_size, training.accumulate)"
        )
    if (start.folder / "plan.json").exists():
        raise UserError(f"{start.folder}: holds a plan: train into another folder")
    saved = _saved(start)
    torch.manual_seed(config.training.seed)
    if processes.device.type == "cuda":
        torch.backends.cudnn.deterministic = True
    train_cases, val_cases = (start.plan.cases_of(start.fold, part) for part in ("train", "val"))
    if not train_cases:
        raise UserError(f"fold {start.fold} of {start.plan.path} has no training cases")
    info, network = describe(start, train_cases)
    _check_metadata([*train_cases, *val_cases], info)
    decides, around = identity(start, info), surroundings(processes)
    if saved is not None:
        saved.check(decides)
    if processes.first:
        if start.resume and saved is None:
            _check_never_saved(start, info)
        for left in start.folder.glob(".writing-*"):
            # by a run that was killed while it wrote
            left.unlink(missing_ok=True)
        written = [start.folder / n for n in ("model.json", "config.yaml", "splits.json")]
        written = [p for p in written if not p.exists()]
        if saved is None or not saved.progress.finished:
            save_model(start.folder, info)
            write_config(config, start.folder / "config.yaml")
            write_json(start.folder / "splits.json", start.plan.folds[start.fold])
    cache = start.plan.path / "cache"
    arguments = (config.data, info.preprocessing, cache)
    # the first process makes what is missing, the others find it
    if processes.first:
        try:
            with bar("preprocessing") as progress:
                cached([*train_cases, *val_cases], *arguments, progress)
        except UserError:
            # not a model folder yet
            for path in written:
                path.unlink(missing_ok=True)
            raise
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
        identity=decides,
        surroundings=around,
        stop=stop,
        fed=start.fed,
    )
    if saved is not None:
        trainer.state.restore(saved)
        if processes.first:
            where = "has ended" if trainer.state.progress.finished else "goes on"
            say(f"{start.folder}: training {where} at step {trainer.state.progress.step}")
            if (line := saved.surroundings_differ(around)) and where == "goes on":
                say(line)
    return trainer


def _saved(start: Start) -> Saved | None:
    """The state to go on from; None: there is none, and the folder may be written.

    Raises:
        UserError: there is one and ``--resume`` is not given, or it is damaged; a model without its state.
    """
    if (start.folder / NAME).is_file():
        if start.resume:
            return Saved.read(start.folder)
        raise UserError(
            f"{start.folder}: holds a training already; --resume goes on with it, or choose another folder"
        )
    for name in ("best", "final"):
        path = start.folder / f"{name}.safetensors"
        if path.exists():
            what = f"nothing to resume: it has no {NAME}, but" if start.resume else "holds a model:"
            raise UserError(f"{start.folder}: {what} {path.name}; choose another folder")
    return None


def _check_never_saved(start: Start, info: ModelInfo) -> None:
    """``--resume`` where no state is: right only for this very training, killed before it saved one."""
    hint = "without --resume a training starts"
    if not (start.folder / "model.json").is_file():
        raise UserError(f"{start.folder}: nothing to resume: it has no {NAME}; {hint}")
    there = read_info(start.folder)
    if there.model_copy(update={"fastfilm": info.fastfilm}) != info:
        raise UserError(
            f"{start.folder}: nothing to resume: it has no {NAME}, and its model.json is of another plan, fold or"
            f" configuration; {hint}"
        )
    say(f"{start.folder}: was interrupted before its first save; starts at step 0")


def _run(trainer: Trainer, start: Start) -> None:
    """Trains; every end but the right one says how to go on."""

    def on() -> str:
        there = (start.folder / NAME).is_file()
        return f"; go on with:\n  {start.command()}" if there else ""

    try:
        trainer.run()
    except Stopped as stopped:
        raise Stopped(
            stopped.number, f"{start.folder}: {stopped.text or 'interrupted at once'}{on()}"
        ) from None
    except (UserError, MemoryError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(f"{reason}{on()}") from error


def _reason(error: Exception) -> str | None:
    """What the user can do something about; None: a fault of the program."""
    text = str(error)
    if "Original Traceback" in text and "errors.UserError: " in text:
        # of a loading process: the rest is its traceback
        return text.rpartition("errors.UserError: ")[2].strip()
    if isinstance(error, UserError):
        return text
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return (
            "not enough memory for a step; a new training with a smaller training.batch_size or"
            " preprocessing.patch_size, or with training.accumulate, needs less"
        )
    if "DataLoader worker" in text:
        return "a process that loads data was killed, perhaps for want of memory; fewer training.workers need less"
    return None


def identity(start: Start, info: ModelInfo) -> dict[str, Any]:
    """Everything that decides the result, name -> value; a state of another one is not gone on with."""
    config = decisive(start.plan.config)
    del config["trial"]
    model = info.model_dump(mode="json", exclude={"fastfilm", "training"})
    return {
        "fold": start.fold,
        "batch": start.plan.plan.batch_size,
        "--from": None if start.init is None else str(start.init),
        **_flat(config),
        **({} if start.fed is None else {"metadata that are fed": _sha(start.fed)}),
        "subjects of the fold": _sha(start.plan.folds[start.fold]),
        "encoder, preprocessing or patch size": _sha(model),
    }


def surroundings(processes: Processes) -> dict[str, Any]:
    """What the rounding of the result depends on beside its identity."""
    device = processes.device
    gpu = device.type == "cuda"
    return {
        "fastfilm": fastfilm.__version__,
        "PyTorch": torch.__version__,
        "processes": processes.world,
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        **({} if gpu else {"number of threads": torch.get_num_threads()}),
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys with dots between."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= (
            _flat(inner, f"{before}{key}.")
            if isinstance(inner, dict)
            else {f"{before}{key}": inner}
        )
    return found


def _sha(value: Any) -> str:
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()}"


def describe(start: Start, cases: Sequence[Case]) -> tuple[ModelInfo, nn.Module]:
    """The model's description with the encoder fitted on the training cases, and its network."""
    config, plan = start.plan.config, start.plan.plan
    task = config.output.mode == "task"
    fed = start.fed or {}
    rows: dict[str, dict[str, Any]] = {c.id: dict(fed.get(c.id, c.metadata)) for c in cases}
    names = list(config.data.labels)
    for i, row in enumerate(rows.values()):
        if task:
            row[config.output.task_key] = names[i % len(names)]
    taken: set[int] = set()
    labels = []
    for i, (name, label) in enumerate(config.data.labels.items(), start=1):
        wanted = itertools.chain(label.values or [i], itertools.count(1))
        value = next(n for n in wanted if n not in taken)
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
        dicom_column=config.data.dicom_column,
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
    refuse_fetching(plan.network.arguments)
    network = info.build()
    if config.training.freeze == "all_but_generator":
        say(
            "note: training.freeze without --from: all weights but the generators' stay as they were drawn"
        )
        freeze_all_but_generator(network)
    return info, network


def _check_metadata(cases: Sequence[Case], info: ModelInfo) -> None:
    """Everything that the loaders would stumble over, at once."""
    wrong, encoder = [], info.metadata
    for case in cases:
        values = {k: v for k, v in case.metadata.items() if k in encoder.names()}
        if info.task_key is not None:
            values[info.task_key] = info.labels[0].name
        wrong += case.changed_vectors()
        try:
            encoder.encode(values)
        except MetadataError as error:
            wrong.append(f"{case.id}: {error}")
    if wrong:
        raise Problems("problems in the metadata", wrong)
