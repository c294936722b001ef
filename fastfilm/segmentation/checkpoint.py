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

from .errors import UserError
from .files import read_tensors, write_tensors
from .model_folder import load_weights
from .optimisation import Average, Progress, load_optimizer, optimizer_tensors

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

    def save(self, folder: Path, identity: str) -> None:
        """Writes last.safetensors; ``identity`` is that of the plan and configuration."""
        tensors: dict[str, Tensor] = {
            f"network/{k}": v for k, v in self.network.state_dict().items()
        }
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.network, self.optimizer)}
        if self.average is not None:
            tensors |= {f"average/{k}": v for k, v in self.average.state.items()}
        rest = {
            "identity": identity,
            "progress": self.progress.to_json(),
            "scaler": self.scaler.state_dict(),
        }
        write_tensors(folder / NAME, tensors, {"state": json.dumps(rest)})

    def load(self, folder: Path, identity: str) -> None:
        """Reads last.safetensors into the network, optimiser and the rest.

        Raises:
            UserError: damaged, or of another plan or configuration.
        """
        path = folder / NAME
        tensors, header = read_tensors(path)
        former = former_names(self.network)
        tensors = {_renamed(k, former): v for k, v in tensors.items()}
        try:
            rest: dict[str, Any] = json.loads(header["state"])
            progress = Progress.from_json(rest["progress"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a training state: {error!r}") from error
        if rest["identity"] != identity:
            raise UserError(
                f"{path}: was made with another plan, fold, configuration or batch; train into a new folder"
            )
        load_weights(self.network, _below(tensors, "network"), str(path))
        load_optimizer(self.network, self.optimizer, _below(tensors, "optimizer"))
        if self.average is not None:
            for k, v in _below(tensors, "average").items():
                self.average.state[k].copy_(v)
        if rest["scaler"]:
            self.scaler.load_state_dict(rest["scaler"])
        self.progress = progress


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
