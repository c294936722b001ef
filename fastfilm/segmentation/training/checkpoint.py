"""The training's state in one safetensors file, replaced atomically: tensors, and the rest as JSON."""

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
from .optimisation import (
    Average,
    Progress,
    load_optimizer,
    optimizer_tensors,
)

NAME = "last.safetensors"


@dataclass
class State:
    """Everything that changes while training.

    Random numbers are functions of the seed and the step, and so are the loader's samples: ``progress.step``
    stands for both.
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
            identity: everything that decides the result, name -> value.
            surroundings: what the rounding depends on beside it.
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
            "progress": self.progress.to_json(),
            "scaler": self.scaler.state_dict(),
        }
        write_tensors(folder / NAME, tensors, {"state": json.dumps(rest)})

    def load(self, folder: Path, identity: Any) -> None:
        """Reads last.safetensors into the network, optimiser and the rest.

        Raises:
            UserError: damaged, or of another plan or configuration.
        """
        saved = Saved.read(folder)
        saved.check(identity)
        self.restore(saved)

    def restore(self, saved: Saved) -> None:
        """Takes over what was read."""
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
    """What last.safetensors holds."""

    path: Path
    tensors: dict[str, Tensor]
    rest: dict[str, Any]
    progress: Progress

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """The state in ``folder``.

        Raises:
            UserError: none there, or damaged.
        """
        path = folder / NAME
        tensors, header = read_tensors(path)
        try:
            rest: dict[str, Any] = json.loads(header["state"])
            progress = Progress.from_json(rest["progress"])
            _ = rest["identity"], rest["scaler"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a training state: {error!r}") from error
        return cls(path, tensors, rest, progress)

    def check(self, identity: Any) -> None:
        """Raises a UserError that names what differs from ``identity``, if anything does."""
        before = self.rest["identity"]
        if before == identity:
            return
        if not (isinstance(before, Mapping) and isinstance(identity, Mapping)):
            raise UserError(
                f"{self.path}: was made with another plan, fold, configuration or batch, or by an earlier version;"
                " train into a new folder"
            )
        raise UserError(
            f"{self.path}: is of another training: {_listed(_differences(before, identity))};"
            " train into a new folder"
        )

    def surroundings_differ(self, surroundings: Mapping[str, Any]) -> str | None:
        """One line about what the rounding depends on and is not as it was; None: nothing."""
        before = self.rest.get("surroundings") or {}
        found = _differences(before, {k: v for k, v in surroundings.items() if k in before})
        if not found:
            return None
        return f"{_listed(found)}; the result will differ in rounding from an uninterrupted run"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for key in [*now, *(k for k in before if k not in now)]:
        a, b = (x.get(key, "not there") for x in (before, now))
        if a != b:
            secret = any(str(x).startswith("sha256:") for x in (a, b))
            found.append(f"{key}: not the same" if secret else f"{key} was {a}, is {b}")
    return found


def _listed(lines: list[str], most: int = 4) -> str:
    more = len(lines) - most
    return "; ".join(lines[:most]) + (f"; and {more} more" if more > 0 else "")


def _renamed(key: str, former: Mapping[str, str]) -> str:
    """``network/NAME``, ``average/NAME`` or ``optimizer/NAME/ENTRY`` with the name that it has today."""
    part, name, *entry = key.split("/")
    return "/".join([part, former.get(name, name), *entry])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")
    }


def seed_step(seed: int, step: int, rank: int) -> None:
    """Sets PyTorch's random numbers (dropout) for one step of one process."""
    torch.manual_seed((seed * 1_000_003 + step) * 4096 + rank)
