"""The processes that ``torchrun`` started; without torchrun, one process alone."""

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
    """This process and its means of speaking to the others.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        device: the device that this process computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, t: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world > 1:
            t = t.clone()
            dist.all_reduce(t)
        return t

    def gather(self, value: Any) -> list[Any]:
        """The values that all processes passed (numbers, text, lists), in the order of the ranks."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value)
        return out

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.world > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """Joins the processes that torchrun started (gloo on CPUs, NCCL on GPUs).

    Args:
        device: as ``devices.choose`` takes it.

    Raises:
        UserError: the machine has no such device.
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
