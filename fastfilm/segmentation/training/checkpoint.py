"""Checkpoints: the state of a training in one safetensors file, which is replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastfilm.nn.blocks import former_names

from ..models.folder import load_weights
from ..support.errors import UserError
from ..support.files import read_tensors, write_tensors
from ..support.records import differences
from .optimisation import Average, Progress, load_optimizer, optimizer_tensors

NAME = "last.safetensors"


@dataclass
class State:
    """All that changes during training.

    Random numbers and the loader's samples are functions of the seed and the step, so that ``progress.step`` is
    their whole state.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    average: Average | None
    scaler: torch.amp.GradScaler

    def save(
        self, folder: Path, identity: Any, surroundings: Mapping[str, Any] | None = None
    ) -> None:
        """Writes last.safetensors.

        Args:
            identity: all settings that the result depends on, name -> value.
            surroundings: further circumstances that its rounding depends on.
        """
        tensors: dict[str, Tensor] = {
            f"network/{k}": v for k, v in self.network.state_dict().items()
        }
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.network, self.optimizer)}
        if self.average is not None:
            tensors |= {f"average/{k}": v for k, v in self.average.state.items()}
        rest = {
            "identity": identity,
            "surroundings": dict(surroundings or {}),
            "progress": vars(self.progress),
            "scaler": self.scaler.state_dict(),
        }
        write_tensors(folder / NAME, tensors, {"state": json.dumps(rest)})

    def restore(self, saved: Saved) -> None:
        """Sets network, optimiser and the rest to a saved state.

        Raises:
            UserError: the saved weights do not fit the network.
        """
        former = former_names(self.network)
        tensors = {_renamed(k, former): v for k, v in saved.tensors.items()}
        load_weights(self.network, _below(tensors, "network"), str(saved.path))
        load_optimizer(self.network, self.optimizer, _below(tensors, "optimizer"))
        if self.average is not None:
            for k, v in _below(tensors, "average").items():
                self.average.state[k].copy_(v)
        if saved.rest["scaler"]:
            self.scaler.load_state_dict(saved.rest["scaler"])
        self.progress = saved.progress


@dataclass(frozen=True)
class Saved:
    """The content of last.safetensors."""

    path: Path
    tensors: dict[str, Tensor]
    rest: dict[str, Any]
    progress: Progress

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """The saved state in ``folder``.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = folder / NAME
        tensors, header = read_tensors(path)
        try:
            rest: dict[str, Any] = json.loads(header["state"])
            progress = Progress(**rest["progress"])
            _ = rest["identity"], rest["scaler"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a training state: {error!r}") from error
        return cls(path, tensors, rest, progress)

    def check(self, identity: Any) -> None:
        """Raises UserError, with the differences, unless the state is of a training with this ``identity``."""
        before = self.rest["identity"]
        if before == identity:
            return
        if not (isinstance(before, Mapping) and isinstance(identity, Mapping)):
            raise UserError(
                f"{self.path}: was made with another plan, fold, configuration or batch, or by an earlier version;"
                " train into a new folder"
            )
        raise UserError(
            f"{self.path}: is of another training: {_listed(differences(before, identity))};"
            " train into a new folder"
        )

    def surroundings_differ(self, surroundings: Mapping[str, Any]) -> str | None:
        """A line about changed circumstances that affect rounding; None if none has changed."""
        before = self.rest.get("surroundings") or {}
        found = differences(before, {k: v for k, v in surroundings.items() if k in before})
        if not found:
            return None
        return f"{_listed(found)}; the result will differ in rounding from an uninterrupted run"


def _listed(lines: list[str]) -> str:
    more = len(lines) - 4
    return "; ".join(lines[:4]) + (f"; and {more} more" if more > 0 else "")


def _renamed(key: str, former: Mapping[str, str]) -> str:
    """``network/NAME``, ``average/NAME`` or ``optimizer/NAME/ENTRY`` with today's name of the parameter."""
    part, name, *entry = key.split("/")
    return "/".join([part, former.get(name, name), *entry])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seeds PyTorch's random numbers (dropout) for one step of one process."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
