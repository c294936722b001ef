"""The training loop: steps, validation, checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from fastfilm.nn import sync_batch_norm

from ..config.schema import Config
from ..data.cache import CachedCase
from ..models.folder import LoadedModel, ModelInfo, save_model, save_weights
from ..models.network import call
from ..support.console import bar, say
from ..support.distributed import Processes
from ..support.errors import UserError
from ..support.stopping import Stop, Stopped
from .augment import Augment, is_flat
from .checkpoint import NAME, State, seed_step
from .dataset import Batch, Samples, collate, quiet_worker
from .losses import KnownLoss
from .optimisation import Average, Progress, learning_rate, make_optimizer
from .record import Record
from .sampling import Draws, Steps, groups_by
from .validation import Validated, validate

MOST_STEPS = 250
"""Steps of an epoch at most if ``steps_per_epoch`` is not set."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer:
    """The training loop over one fold; ``fold.train`` prepares its arguments."""

    def __init__(
        self,
        *,
        config: Config,
        info: ModelInfo,
        network: nn.Module,
        folder: Path,
        processes: Processes,
        batch_size: int,
        train_cases: Sequence[CachedCase],
        val_cases: Sequence[CachedCase],
        identity: Mapping[str, Any],
        surroundings: Mapping[str, Any],
        stop: Stop,
        fed: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.config, self.info, self.folder = config.training, info, folder
        self.processes, self.identity, self.surroundings = processes, identity, surroundings
        self.stop, self.fed = stop, fed
        self.labels = list(config.data.labels)
        self.train_cases, self.val_cases = list(train_cases), list(val_cases)
        self.batch_size = batch_size
        device = processes.device
        self.frozen = self.config.freeze != "none"
        network = network.to(device)
        if self.config.channels_last:
            network = _channels_last(network, info.spatial_dims)
        if processes.world > 1:
            network = sync_batch_norm(network)
        self.network = network
        self.parallel: nn.Module = (
            DistributedDataParallel(network) if processes.world > 1 else network
        )
        self.loss = KnownLoss(self.config, exclusive=info.output == "classes")
        self.dtype = DTYPES[_precision(self.config.precision, device)]
        self.state = State(
            network=network,
            optimizer=make_optimizer(network, self.config),
            progress=Progress(),
            average=None if self.config.ema is None else Average(network, self.config.ema),
            scaler=torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16),
        )
        self.dataset = self._dataset(config)
        self.epoch_steps = self.config.steps_per_epoch or self._epoch_steps(config)
        self.steps = self.epoch_steps * self.config.epochs

    def run(self) -> None:
        """Trains from the state's step to the end.

        Raises:
            Stopped: a signal has come, or the deadline has passed; the state after the last step is saved.
        """
        first, progress = self.processes.first, self.state.progress
        if progress.step == 0:
            # from here on, --resume is possible
            self._save()
        record = Record(self.folder, progress.step) if first else None
        loader = self._loader(progress.step)
        batches = iter(loader)
        saved = time.monotonic()
        try:
            while progress.epoch < self.config.epochs and not self._stopped():
                clock = _Clock()
                left = (progress.epoch + 1) * self.epoch_steps - progress.step
                title = f"epoch {progress.epoch + 1}/{self.config.epochs}"
                with bar(title, first) as start:
                    tick = start(left)
                    while progress.step < (progress.epoch + 1) * self.epoch_steps:
                        with clock.waiting():
                            batch = self._next(batches)
                        self._step(batch)
                        self._stop_if_asked()
                        tick(f"{title}  loss {progress.loss_sum / progress.loss_steps:.4f}")
                        if self._due(saved) and progress.step % self.epoch_steps:
                            self._save()
                            saved = time.monotonic()
                self._end_of_epoch(record, clock)
                saved = time.monotonic()
            self._finish()
        finally:
            del batches
            if record is not None:
                record.close()

    def _next(self, batches: Iterator[Batch]) -> Batch:
        try:
            return next(batches)
        except (RuntimeError, OSError, EOFError):
            # a signal to the whole process group ends the loading processes, too, even in the middle of a batch
            self._stop_if_asked()
            raise

    def _step(self, batch: Batch) -> None:
        """One optimiser step on this process's share of a batch."""
        config, state, world = self.config, self.state, self.processes.world
        progress = state.progress
        # what is frozen does not change, and neither do its statistics of batch norm
        self.parallel.train(not self.frozen)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(config, progress, self.steps)
        seed_step(config.seed, progress.step, self.processes.rank)
        batch = batch.to(self.processes.device)
        weights = self.loss.weights(batch.known).items()
        totals = {k: self.processes.sum(v.to(self.processes.device)) for k, v in weights}
        total = torch.zeros((), device=self.processes.device)
        state.optimizer.zero_grad(set_to_none=True)
        for i in range(config.accumulate):
            part = batch.part(i, config.accumulate)
            # gradients are exchanged after the last part; only DDP has no_sync
            no_sync = getattr(self.parallel, "no_sync", contextlib.nullcontext)
            with no_sync() if i + 1 < config.accumulate else contextlib.nullcontext():
                loss = self._forward(part, totals)
                # DDP takes the mean over processes; the losses of the parts add up to one mean
                state.scaler.scale(loss * world).backward()
            total = total + loss.detach()
        value = float(self.processes.sum(total))
        if not math.isfinite(value):
            self._not_finite(value, batch)
        state.scaler.unscale_(state.optimizer)
        if config.clip_gradient is not None:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip_gradient)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update(self.network, progress.step)
        progress.step += 1
        progress.loss_sum += value
        progress.loss_steps += 1

    def _forward(self, part: Batch, totals: dict[str, Tensor]) -> Tensor:
        image = part.image
        if self.config.channels_last:
            last = {4: torch.channels_last, 5: torch.channels_last_3d}[image.dim()]
            image = image.contiguous(memory_format=last)
        with torch.autocast(
            self.processes.device.type, self.dtype, enabled=self.dtype is not torch.float32
        ):
            logits = call(self.parallel, image, part.rows)
        return self.loss(logits, part.masks, part.known, totals)

    def _not_finite(self, value: float, batch: Batch) -> None:
        bad = (~batch.image.isfinite().flatten(1).all(1)).tolist()
        cases = [c for c, b in zip(batch.cases, bad, strict=True) if b] or batch.cases
        every = sorted({c for part in self.processes.gather(cases) for c in part})
        files = {c.case.id: c.case for c in self.train_cases}
        names = ", ".join(str(p) for c in every for p in files[c].images if p is not None)
        raise UserError(
            f"step {self.state.progress.step}: the loss is {value}. The batch was of {names}."
            f" {NAME} is the state of an earlier step; a lower training.learning_rate or training.clip_gradient,"
            " or precision bfloat16 or float32, may help if the images are fine"
        )

    def _stopped(self) -> bool:
        """Whether training stops early, as the Dice has not improved."""
        patience = self.config.early_stopping
        return patience is not None and self.state.progress.waited >= patience

    def _end_of_epoch(self, record: Record | None, clock: _Clock) -> None:
        """Validates, logs and saves, and then prints a line."""
        config, progress = self.config, self.state.progress
        seconds, share = clock.read()
        begun = time.monotonic()
        # an interrupted validation is repeated: the epoch counts only when it is done
        found = self._validation(progress.epoch + 1)
        validation_seconds = time.monotonic() - begun
        progress.epoch += 1
        line: dict[str, Any] = {
            "epoch": progress.epoch,
            "step": progress.step,
            "loss": progress.loss_sum / max(1, progress.loss_steps),
            "learning_rate": learning_rate(
                config, replace(progress, step=progress.step - 1), self.steps
            ),
            "seconds": round(seconds, 3),
            "loader_wait": round(share, 4),
        }
        progress.loss_sum, progress.loss_steps = 0.0, 0
        if found is not None:
            line |= {"dice_mean": found.mean, "dice": found.labels}
            line["validation_seconds"] = round(validation_seconds, 3)
            if progress.validated(found.mean, config) and self.processes.first:
                save_weights(self.folder, "best", self._weights(), self.info)
        if record is not None:
            record.epoch(line)
        self._save()
        if record is not None:
            say(_summary(line, config.epochs, progress))
            if self._stopped():
                say(f"stopped early: no better Dice for {progress.waited} epochs")

    def _validation(self, epoch: int) -> Validated | None:
        """The validation at the end of an epoch; None if it has none."""
        config = self.config
        if not self.val_cases or (epoch < config.epochs and epoch % config.validate_every):
            return None
        model = LoadedModel(self._evaluated(), self.info, self.processes.device, self.folder)
        return validate(
            model,
            self.val_cases,
            self.labels,
            self.processes,
            config.validation_overlap,
            self._stop_if_asked,
        )

    def _stop_if_asked(self) -> None:
        """Saves and raises Stopped if a signal has come; called after each step and before each validated case."""
        if (number := self.stop.due()) is not None:
            self._save()
            step = self.state.progress.step
            raise Stopped(number, f"interrupted after step {step}, the state is saved")

    def _finish(self) -> None:
        progress = self.state.progress
        if self.processes.first:
            save_weights(self.folder, "final", self._weights(), self.info)
            if progress.best is None:
                # without validation cases, the last weights are taken as the best
                save_weights(self.folder, "best", self._weights(), self.info)
            self.info.training |= {
                "epochs": progress.epoch,
                "steps": progress.step,
                "best_dice": progress.best,
                "best_epoch": progress.best_epoch,
            }
            save_model(self.folder, self.info)
        # set last: a run that is killed before this line writes its end again
        progress.finished = True
        self._save()
        self.processes.wait()

    def _save(self) -> None:
        if self.processes.first:
            self.state.save(self.folder, self.identity, self.surroundings)

    def _due(self, saved: float) -> bool:
        config, step = self.config, self.state.progress.step
        if config.checkpoint_steps is not None:
            return step % config.checkpoint_steps == 0
        return time.monotonic() - saved > 60 * config.checkpoint_minutes

    def _weights(self) -> dict[str, Tensor]:
        average = self.state.average
        return dict(self.network.state_dict() if average is None else average.state)

    def _evaluated(self) -> nn.Module:
        """The network in evaluation mode, with the averaged weights if there are any."""
        network = self.network
        if self.state.average is not None:
            network = self.info.build().to(self.processes.device)
            if self.config.channels_last:
                network = _channels_last(network, self.info.spatial_dims)
            network.load_state_dict(self.state.average.state)
        return network.eval()

    def _dataset(self, config: Config) -> Samples:
        training, tasks = config.training, config.output.mode == "task"
        groups = None
        if training.balance is not None and not (tasks and training.balance == "label"):
            groups = groups_by(self.train_cases, training.balance)
        known = [c.known for c in self.train_cases]
        draws = Draws(
            known,
            groups=groups,
            tasks=tasks,
            together=config.output.tasks_per_case == "all",
            seed=training.seed,
        )
        return Samples(
            self.train_cases,
            draws,
            self.info.metadata,
            labels=self.labels,
            patch_size=self.info.patch_size,
            foreground=training.foreground,
            augment=Augment(
                config.augmentation,
                spatial_dims=self.info.spatial_dims,
                slice_axis=self.info.preprocessing.slice_axis,
                flat=is_flat([c.spacing for c in self.train_cases]),
            ),
            task_key=self.info.task_key,
            fed=self.fed,
        )

    def _epoch_steps(self, config: Config) -> int:
        """Steps for every case (in 2D, each of its slices; each of its tasks) once, at most ``MOST_STEPS``."""
        samples = 0
        for c in self.train_cases:
            each = c.shape[0] if self.info.spatial_dims == 2 else 1
            samples += each * (sum(c.known) if config.output.mode == "task" else 1)
        return min(MOST_STEPS, max(1, samples // self.batch_size))

    def _loader(self, step: int) -> DataLoader[Batch]:
        p, workers = self.processes, self.config.workers
        return DataLoader(
            self.dataset,
            batch_sampler=Steps(step, self.steps, self.batch_size, p.rank, p.world),
            num_workers=workers,
            collate_fn=collate,
            worker_init_fn=quiet_worker,
            pin_memory=p.device.type == "cuda",
            prefetch_factor=4 if workers else None,
        )


class _Clock:
    """Measures an epoch's steps, and the share of time spent waiting for the loader."""

    def __init__(self) -> None:
        self.begun, self.waited = time.monotonic(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.waited += time.monotonic() - begun

    def read(self) -> tuple[float, float]:
        """Seconds since the start, and the share of them spent waiting."""
        seconds = time.monotonic() - self.begun
        return seconds, self.waited / max(seconds, 1e-9)


def _summary(line: dict[str, Any], epochs: int, progress: Progress) -> str:
    text = f"epoch {line['epoch']}/{epochs}  loss {line['loss']:.4f}"
    if "dice_mean" in line:
        each = ", ".join(f"{k} {v:.4f}" for k, v in line["dice"].items())
        text += f"  Dice {line['dice_mean']:.4f} ({each})"
        text += "  best" if progress.best_epoch == progress.epoch else ""
    left = (line["seconds"] + line.get("validation_seconds", 0.0)) * (epochs - line["epoch"])
    return (
        f"{text}  {line['seconds']:.1f} s, {line['loader_wait']:.1%} of it waiting for data"
        f"  {left / 60:.0f} min left"
    )


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    good = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if good else "float32"


def _channels_last(network: nn.Module, dims: int) -> nn.Module:
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    for p in network.parameters():
        if p.dim() == dims + 2:
            p.data = p.data.contiguous(memory_format=layout)
    return network
