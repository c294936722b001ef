"""Batch statistics over several processes, from the moments of each, as in ``torch.nn.SyncBatchNorm``."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Group: TypeAlias = "dist.ProcessGroup | bool | None"
"""A process group, True for the default one, None (or False) for no synchronisation."""


def active(group: Group) -> dist.ProcessGroup | None:
    """The process group to synchronise with; None without another process.

    Raises:
        TypeError: something that is no process group.
    """
    if group is None or group is False:
        return None
    known = dist.is_available() and isinstance(group, dist.ProcessGroup)
    if group is not True and not known:
        raise TypeError(f"sync_group must be a process group, True or None, got {group!r}")
    if not dist.is_available() or not dist.is_initialized():
        return None
    found = dist.group.WORLD if group is True else group
    return None if found is None or dist.get_world_size(found) == 1 else found


class _Sum(torch.autograd.Function):
    """Sum of a tensor over the processes; its gradient is the sum of the gradients over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        summed = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", name)
        total: Tensor = torch.ops._c10d_functional.wait_tensor(summed)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.name), None


def combined(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance [1, C] each and number of values [] of the batches of all processes together.

    Every process shows the others its (count, mean, M2), which are combined as in Chan et al. 1979: no
    difference of large sums is taken, and batches may be of different sizes, 0 too.

    Args:
        mean, var: [N, C], of this process's samples.
        count: values per sample and channel.
    """
    n, channels = mean.shape
    own = mean.sum(0) / max(n, 1)
    m2 = (var + (mean - own).square()).sum(0) * count
    row = torch.cat([own.new_full((1,), n * count), own, m2])
    ranks = torch.arange(dist.get_world_size(group), device=mean.device)
    mine = (ranks == dist.get_rank(group)).unsqueeze(1)
    # every process fills its own row of zeros, so that the sum gathers all rows
    rows = _Sum.apply(torch.where(mine, row, torch.zeros_like(row)), group.group_name)
    counts, means, m2s = rows.split([1, channels, channels], 1)
    counts = counts.detach()
    total = counts.sum()
    centre = (means * counts).sum(0, keepdim=True) / total
    spread = (m2s + counts * (means - centre).square()).sum(0, keepdim=True) / total
    return centre, spread, total
