"""PyTorch's norm layers as a fused block reads them: the norm, its tensors, and how its statistics move."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastfilm.ops.reference import distributed
from fastfilm.ops.spec import capture

NORMS: dict[type[nn.Module], str] = {
    nn.BatchNorm2d: "batch",
    nn.BatchNorm3d: "batch",
    nn.SyncBatchNorm: "batch",
    nn.InstanceNorm2d: "instance",
    nn.InstanceNorm3d: "instance",
    nn.GroupNorm: "group",
}

_FORWARDS: dict[Any, str] = {
    _BatchNorm.forward: "batch",
    nn.SyncBatchNorm.forward: "batch",
    _InstanceNorm.forward: "instance",
    nn.GroupNorm.forward: "group",
}


class Norm(NamedTuple):
    """One call of a norm layer, as ``fastfilm.ops`` takes it.

    Attributes:
        kind, num_groups, eps: see ``fastfilm.conv_norm_film``.
        training: statistics come from the map, not from the running ones.
        momentum: of the running statistics in this call.
        affine: weight and bias, [C] each or None.
        statistics: running mean and variance, [C] each or None.
        group: processes whose batches are normalised together.
    """

    kind: str = "none"
    num_groups: int | None = None
    training: bool = False
    eps: float = 1e-5
    momentum: float = 0.0
    affine: tuple[Tensor | None, Tensor | None] = (None, None)
    statistics: tuple[Tensor | None, Tensor | None] = (None, None)
    group: dist.ProcessGroup | None = None


NONE = Norm()


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes the module's calls."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def share(one: nn.Module, other: nn.Module | None) -> bool:
    """Whether two batch norms hold the same tensors."""
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return isinstance(other, _BatchNorm) and all(
        getattr(one, n) is getattr(other, n) for n in names
    )


def kind_of(layer: nn.Module) -> str | None:
    """Name of the norm that a layer computes; None for one that computes something of its own."""
    found = NORMS.get(type(layer))
    return _FORWARDS.get(type(layer).forward) if found is None else found


def make(
    dims: int,
    kind: str,
    channels: int,
    *,
    num_groups: int | None,
    eps: float,
    momentum: float | None,
    affine: bool,
    track_running_stats: bool | None,
) -> nn.Module | None:
    """PyTorch's layer for a norm of ``fastfilm.ops`` over maps of 2 or 3 dimensions; None for "none"."""
    if kind == "batch":
        track = track_running_stats is None or track_running_stats
        batch = nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        return batch(channels, eps, momentum, affine, track)
    if kind == "instance":
        instance = nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d
        # PyTorch's annotation leaves out None, which its code takes
        return instance(channels, eps, momentum, affine, bool(track_running_stats))  # type: ignore[arg-type]
    if kind in ("group", "layer"):
        # a layer norm over channels and space is a group norm of one group
        return nn.GroupNorm(
            num_groups if num_groups and kind == "group" else 1, channels, eps, affine
        )
    if kind != "none":
        raise ValueError(f"there is no module for the norm {kind!r}")
    return None


def read(layer: Any, sync_group: distributed.Group = None) -> Norm | None:
    """The call that PyTorch's own forward of ``layer`` would make now; counts the batch as it does.

    None where the layer has hooks or computes something of its own: it is to be called as the module that it is.

    Args:
        sync_group: of a batch norm, beside that of a ``torch.nn.SyncBatchNorm``.
    """
    kind = None if hooked(layer) else kind_of(layer)
    if kind is None:
        return None
    # ``torch.nn.Module`` finds an attribute ten times slower than these dictionaries do, which lack the computed
    # ones: parametrised, pruned, spread over processes
    held, buffers, eps = layer._parameters, layer._buffers, layer.eps
    try:
        weight, bias = held["weight"], held["bias"]
    except KeyError:
        weight, bias = layer.weight, layer.bias
    if kind == "group":
        return Norm(kind, layer.num_groups, False, eps, 0.0, (weight, bias))
    try:
        mean, var = buffers["running_mean"], buffers["running_var"]
        count = buffers["num_batches_tracked"]
    except KeyError:
        mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    training, track, momentum = layer.training, layer.track_running_stats, layer.momentum
    group = None
    if kind == "instance":
        training = training or not track
    else:
        if training and track and count is not None:
            count.add_(1)
            if momentum is None:
                momentum = 1.0 / capture.number(count)
        if training:
            if not track:
                mean = var = None
            if isinstance(layer, nn.SyncBatchNorm):
                sync_group = layer.process_group or True
            if sync_group is not None:
                group = distributed.active(sync_group)
        else:
            training = mean is None and var is None
    momentum = 0.0 if momentum is None else float(momentum)
    return Norm(kind, None, training, eps, momentum, (weight, bias), (mean, var), group)
