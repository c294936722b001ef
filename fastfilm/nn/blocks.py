"""Convolution + norm + activation + dropout + FiLM as a module, and two of them in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfilm.ops import DeferredMap, block, capture, distributed, spec
from fastfilm.ops.maps import Map
from fastfilm.ops.prepared import PreparedWeight
from fastfilm.ops.recipe import Options

_STATISTICS = "statistics"
_PARAMETERS = ("weight", "bias", "norm_weight", "norm_bias", "slope")


class _Statistics(nn.modules.batchnorm._BatchNorm):
    """By what ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` recognises a block; holds nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False, track_running_stats=False)

    def forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError("the block normalises; this module marks it for SyncBatchNorm")


class ConvNormFiLM(nn.Module):
    """One block around ``fastfilm.conv_norm_film``; see ``ConvNormFiLM2d`` and ``ConvNormFiLM3d``.

    Args:
        in_channels, out_channels: Ci, Co.
        kernel_size, stride, dilation, groups, bias: as in ``torch.nn.Conv2d``.
        padding: None keeps the size at stride 1 (odd kernels).
        norm: None, "batch", "instance", "group" (with ``num_groups``) or "layer".
        affine: learn the norm's weight and bias.
        track_running_stats: None means yes for batch norm and no for instance norm, as in PyTorch.
        momentum: of the running statistics; None for a cumulative average.
        activation, slope: see ``fastfilm.conv_norm_film``; "prelu" learns one slope, or one a channel where
            ``slope`` is a sequence of ``out_channels`` start values.
        order: where activation and FiLM stand.
        dropout: probability of dropping a channel of a sample in training.
        dropout_position: "end", "film" (in front of FiLM) or "norm" (in front of the norm).
        sync_group: processes whose batches batch norm normalises together in training, as
            ``torch.nn.SyncBatchNorm`` does: a process group, or True for the default one. Without an initialised
            process group it is plain batch norm. ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` sets it.

    Attributes:
        dropout_in_evaluation: drop channels in evaluation mode too (Monte Carlo dropout); False at first.
    """

    spatial_dims = 2
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        *,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        norm: str | None = "batch",
        num_groups: int | None = None,
        affine: bool = True,
        track_running_stats: bool | None = None,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        activation: str | None = "relu",
        slope: float | Sequence[float] | None = None,
        order: str = "conv-norm-film-act",
        dropout: float = 0.0,
        dropout_position: str = "end",
        sync_group: distributed.Group = None,
    ) -> None:
        super().__init__()
        dims = self.spatial_dims
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if (
            not isinstance(groups, int)
            or groups < 1
            or in_channels % groups
            or out_channels % groups
        ):
            raise ValueError(
                f"groups must divide in_channels={in_channels} and out_channels={out_channels}, got {groups}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = spec.as_tuple("kernel_size", kernel_size, dims, 1)
        self.stride = spec.as_tuple("stride", stride, dims, 1)
        self.dilation = spec.as_tuple("dilation", dilation, dims, 1)
        if padding is None:
            if any(k % 2 == 0 for k in self.kernel_size):
                raise ValueError(f"padding must be given for the even kernel {self.kernel_size}")
            padding = [d * (k // 2) for k, d in zip(self.kernel_size, self.dilation, strict=True)]
        self.padding = spec.as_tuple("padding", padding, dims)
        self._no_padding = (0,) * dims
        self._prepared = PreparedWeight()
        self.sync_group = sync_group
        self.norm = spec.choice("norm", norm, spec.NORMS)
        self.activation = spec.choice("activation", activation, spec.ACTIVATIONS)
        self.order = spec.choice("order", order, spec.ORDERS)
        self.dropout_position = spec.choice(
            "dropout_position", dropout_position, spec.DROPOUT_POSITIONS
        )
        if self.norm == "group" and (num_groups is None or out_channels % num_groups):
            raise ValueError(
                f"num_groups must divide out_channels={out_channels}, got {num_groups}"
            )
        if dropout > 0 and self.dropout_position == "norm" and self.norm == "none":
            raise ValueError("dropout_position='norm' needs a norm")
        self.num_groups, self.momentum, self.eps, self.dropout = num_groups, momentum, eps, dropout
        self.dropout_in_evaluation = False
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        weight = torch.empty(shape)
        if shape[1] > 1 and math.prod(self.kernel_size) > 1:
            # channels-last, as the convolutions want it: it is not copied on every call
            weight = spec.channels_last(weight)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        affine = affine and self.norm != "none"
        self.norm_weight = nn.Parameter(torch.ones(out_channels)) if affine else None
        self.norm_bias = nn.Parameter(torch.zeros(out_channels)) if affine else None
        track = self.norm == "batch" if track_running_stats is None else track_running_stats
        track = track and self.norm in ("batch", "instance")
        self.register_buffer("running_mean", torch.zeros(out_channels) if track else None)
        self.register_buffer("running_var", torch.ones(out_channels) if track else None)
        count = torch.zeros((), dtype=torch.long) if track else None
        self.register_buffer("num_batches_tracked", count)
        self.slope: float | nn.Parameter | None
        if self.activation == "prelu":
            start = [spec.DEFAULT_SLOPE["prelu"]] if slope is None else slope
            values = [start] if isinstance(start, (int, float)) else list(start)
            self.slope = nn.Parameter(torch.tensor(values, dtype=torch.float32))
        elif slope is not None and not isinstance(slope, (int, float)):
            raise TypeError(f"slope must be a number for {self.activation!r}, got {slope!r}")
        else:
            self.slope = slope
        if self.norm == "batch":
            self.add_module(_STATISTICS, _Statistics(out_channels))
        self.reset_parameters()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """``torch.nn.Module.add_module``; a SyncBatchNorm in place of the statistics sets ``sync_group``."""
        if name == _STATISTICS and isinstance(module, nn.SyncBatchNorm):
            found = module.process_group
            self.sync_group = True if found is None else found
        else:
            super().add_module(name, module)

    def reset_parameters(self) -> None:
        """Draws weight and bias as ``torch.nn.Conv2d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Map,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        deferred: bool | str = False,
    ) -> Tensor | DeferredMap:
        """The block's output [N, Co, *T], or the ``DeferredMap`` for the next block if ``deferred``.

        Args:
            x: [N, Ci, *S], or the ``DeferredMap`` of the block before.
            gamma, beta: FiLM [N, Co], [1, Co] or [Co]; each optional.
            deferred: "always": also where nothing asks for gradients, as ``fastfilm.conv_norm_film`` says.
        """
        if not hasattr(x, "shape"):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if len(x.shape) != self.spatial_dims + 2:
            raise ValueError(
                f"x must have {self.spatial_dims + 2} dimensions for this block, got {tuple(x.shape)}"
            )
        training, norm = self.training, self.norm
        mask, group = None, None
        if self.dropout > 0 and (training or self.dropout_in_evaluation):
            keep = 1 - self.dropout
            mask = torch.full((x.shape[0], self.out_channels), keep, device=x.device)
            mask = torch.bernoulli(mask).div_(keep)
        if training and norm == "batch" and self.sync_group is not None:
            group = distributed.active(self.sync_group)
        weight, bias, norm_weight, norm_bias, running_mean, running_var, slope = self._tensors()
        learned = slope if isinstance(slope, Tensor) else None
        return block.run(
            x,
            weight,
            bias,
            (self.stride, self.padding, self.dilation, False, self._no_padding, self.groups),
            Options(
                norm,
                self.num_groups,
                training or (norm == "batch" and running_mean is None),
                self.eps,
                self.activation,
                slope if learned is None else None,
                self.order,
                self.dropout_position,
                group is not None,
            ),
            (norm_weight, norm_bias, running_mean, running_var, gamma, beta, mask, learned),
            self._count_batch(),
            deferred,
            self._prepared,
            group,
        )

    def _tensors(self) -> tuple[Any, ...]:
        """weight, bias, norm_weight, norm_bias, running_mean, running_var, slope.

        ``torch.nn.Module`` finds an attribute of these ten times slower than its dictionaries do.
        """
        parameters, buffers = self._parameters, self._buffers
        found = []
        for name in _PARAMETERS:
            t = parameters.get(name)
            # absent, or computed: parametrised, pruned, spread over processes
            found.append(getattr(self, name) if t is None else t)
        weight, bias, norm_weight, norm_bias, slope = found
        mean, var = buffers["running_mean"], buffers["running_var"]
        return weight, bias, norm_weight, norm_bias, mean, var, slope

    def _count_batch(self) -> float:
        """Momentum of this forward; counts the batch as ``torch.nn.BatchNorm2d`` does."""
        momentum, count = self.momentum, self._buffers["num_batches_tracked"]
        if not self.training or count is None:
            return 0.0 if momentum is None else momentum
        count.add_(1)
        return 1.0 / capture.number(count) if momentum is None else momentum

    def extra_repr(self) -> str:
        """Shapes and what the block consists of."""
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"]
        parts += [f"stride={self.stride}", f"norm={self.norm!r}", f"activation={self.activation!r}"]
        if self.dropout:
            parts.append(f"dropout={self.dropout} ({self.dropout_position})")
        return ", ".join([*parts, f"order={self.order!r}"])


class ConvNormFiLM2d(ConvNormFiLM):
    """``ConvNormFiLM`` for maps [N, C, H, W].

    Example:
        >>> import torch, fastfilm
        >>> block = fastfilm.ConvNormFiLM2d(3, 8, norm="instance")
        >>> gamma = torch.rand(2, 8)
        >>> block(torch.randn(2, 3, 16, 16), gamma, gamma).shape
        torch.Size([2, 8, 16, 16])
    """

    spatial_dims = 2


class ConvNormFiLM3d(ConvNormFiLM):
    """``ConvNormFiLM`` for maps [N, C, D, H, W]."""

    spatial_dims = 3


class DoubleConv(nn.Module):
    """Two blocks in a row; the map between them is never written, and FiLM acts behind the second.

    Args:
        spatial_dims: 2 or 3.
        in_channels, out_channels: Ci, Co.
        norm, affine, activation, order, dropout: of both blocks, see ``ConvNormFiLM``.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        norm: str | None,
        affine: bool,
        num_groups: int | None = None,
        activation: str | None,
        order: str,
        dropout: float,
    ) -> None:
        super().__init__()
        kind = ConvNormFiLM2d if spatial_dims == 2 else ConvNormFiLM3d

        def make(channels: int, position: str) -> ConvNormFiLM:
            return kind(
                channels,
                out_channels,
                norm=norm,
                affine=affine,
                num_groups=num_groups,
                activation=activation,
                order=order,
                dropout=dropout,
                dropout_position=position,
            )

        self.first = make(in_channels, "end")
        # the dropout of the second convolution comes before FiLM, as in the paper's code
        self.second = make(out_channels, "end" if order == "conv-norm-film-act" else "film")

    def forward(
        self,
        x: Map,
        gamma: Tensor | None = None,
        beta: Tensor | None = None,
        *,
        deferred: bool = False,
    ) -> Tensor | DeferredMap:
        """[N, Ci, *S] -> [N, Co, *S]; γ and β [N, Co] modulate the second block."""
        out: Tensor | DeferredMap = self.second(
            self.first(x, deferred=True), gamma, beta, deferred=deferred
        )
        return out


def sync_batch_norm(model: nn.Module, process_group: distributed.Group = None) -> nn.Module:
    """Makes every block of ``model`` with batch norm use the statistics of all processes; returns ``model``.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` does the same, and replaces PyTorch's own layers too.

    Args:
        process_group: a process group; True or None for the default one.
    """
    for module in model.modules():
        if isinstance(module, ConvNormFiLM) and module.norm == "batch":
            module.sync_group = True if process_group is None else process_group
    return model
