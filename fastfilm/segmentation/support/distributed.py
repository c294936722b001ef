"""Several processes started by ``torchrun``; one process where there are none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import choose


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank, world: number of this one, and of all.
        device: what it computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """The one that writes and prints."""
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def gather(self, value: Any) -> list[Any]:
        """Every process's plain value (numbers, text, lists), in the order of the ranks."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Joins the processes that torchrun started (gloo on CPUs, NCCL on GPUs).

    Args:
        device: as ``devices.choose`` takes it.

    Raises:
        UserError: no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose(device, local=local, world=world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    joined = world > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        rank = dist.get_rank() if world > 1 else 0
        yield Processes(rank, world, chosen)
    finally:
        if joined:
            dist.destroy_process_group()
