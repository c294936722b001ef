"""Fused blocks as modules: convolution, norm, activation, dropout and FiLM, once or twice in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfilm.ops import DeferredMap, spec
from fastfilm.ops.block import Call, Moving, PreparedWeight, run
from fastfilm.ops.maps import Map
from fastfilm.ops.reference import distributed
from fastfilm.ops.spec import Geometry, Options, TailTensors

from . import norms

_PARAMETERS = ("weight", "bias", "slope")
_TENSORS = {
    "norm_weight": "weight",
    "norm_bias": "bias",
    "running_mean": "running_mean",
    "running_var": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}
_OF_NORM = _TENSORS | {"momentum": "momentum", "eps": "eps"}
"""Attributes of a block that are its norm layer's, and their names there."""


def _of_norm(name: str) -> Any:
    """The property for one of ``_OF_NORM``; None where the norm layer has no such attribute."""
    return property(lambda block: getattr(block.norm_layer, _OF_NORM[name], None))


class ConvNormFiLM(nn.Module):
    """One block around ``fastfilm.conv_norm_film``; see ``ConvNormFiLM2d`` and ``ConvNormFiLM3d``.

    Args:
        in_channels, out_channels: Ci, Co.
        kernel_size, stride, dilation, groups, bias: as in ``torch.nn.Conv2d``.
        padding: None keeps the size at stride 1 (odd kernels).
        norm: None, "batch", "instance", "group" (with ``num_groups``) or "layer".
        affine: learn the norm's weight and bias.
        track_running_stats: None means yes for batch norm and no for instance norm, as in PyTorch.
        momentum: of the running statistics; None for a cumulative average (batch norm).
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
        norm_layer: PyTorch's layer for the norm (``torch.nn.BatchNorm2d`` …; ``torch.nn.GroupNorm`` for "layer"
            too), None without one. Its parameters, running statistics and modes are the block's. Another layer may
            take its place: PyTorch's own run fused; others, and layers with hooks, run between the convolution
            and the rest.
        norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, momentum, eps: of ``norm_layer``.
    """

    spatial_dims = 2
    norm_weight, norm_bias = _of_norm("norm_weight"), _of_norm("norm_bias")
    running_mean, running_var = _of_norm("running_mean"), _of_norm("running_var")
    num_batches_tracked = _of_norm("num_batches_tracked")
    momentum, eps = _of_norm("momentum"), _of_norm("eps")

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
        self.dropout = dropout
        self.dropout_in_evaluation = False
        shape = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.slope: float | nn.Parameter | None
        if self.activation == "prelu":
            start = [spec.DEFAULT_SLOPE["prelu"]] if slope is None else slope
            values = [start] if isinstance(start, (int, float)) else list(start)
            self.slope = nn.Parameter(torch.tensor(values, dtype=torch.float32))
        elif slope is not None and not isinstance(slope, (int, float)):
            raise TypeError(f"slope must be a number for {self.activation!r}, got {slope!r}")
        else:
            self.slope = slope
        norm_layer = norms.make(
            dims,
            self.norm,
            out_channels,
            num_groups=num_groups,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
        )
        self.register_module("norm_layer", norm_layer)
        self.reset_parameters()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """``torch.nn.Module.add_module``; a SyncBatchNorm made of the norm layer sets ``sync_group`` instead.

        ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` makes one, in which DDP would refuse CPUs.
        """
        if isinstance(module, nn.SyncBatchNorm) and norms.share(module, self._modules.get(name)):
            found = module.process_group
            self.sync_group = True if found is None else found
        else:
            super().add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_NORM:
            super().__setattr__(name, value)
        elif self.norm_layer is not None:
            setattr(self.norm_layer, _OF_NORM[name], value)
        elif name in _TENSORS and value is not None:
            # without a norm, momentum and eps have no effect
            raise AttributeError(f"a block without a norm has no {name}")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        """Takes the names too that the norm's tensors had before they were the norm layer's."""
        for old, new in former_names(self, prefix).items():
            if old in state_dict:
                state_dict[new] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)

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
        mask = None
        if self.dropout > 0 and (self.training or self.dropout_in_evaluation):
            keep = 1 - self.dropout
            mask = torch.full((x.shape[0], self.out_channels), keep, device=x.device)
            mask = torch.bernoulli(mask).div_(keep)
        (weight, bias, slope), geometry = self._tensors(), self._geometry()
        layer = self._modules["norm_layer"]
        norm = norms.NONE if layer is None else norms.read(layer, self.sync_group)
        if norm is None:
            assert layer is not None
            return self._around(layer, x, gamma, beta, mask, deferred)
        learned = slope if isinstance(slope, Tensor) else None
        kind, num_groups, training, eps, momentum, (gain, shift), (mean, var), group = norm
        options = Options(
            kind,
            num_groups,
            training,
            eps,
            self.activation,
            slope if learned is None else None,
            self.order,
            self.dropout_position,
            group is not None,
        )
        tensors = TailTensors(mean, var, None, gain, shift, bias, gamma, beta, mask, learned)
        moving = Moving(momentum, group)
        call = Call(weight, geometry, options, tensors, moving, deferred, self._prepared)
        return run(x, call)

    def _around(
        self,
        layer: nn.Module,
        x: Map,
        gamma: Tensor | None,
        beta: Tensor | None,
        mask: Tensor | None,
        deferred: bool | str,
    ) -> Tensor | DeferredMap:
        """The block with its norm layer called as the module that it is."""
        weight, bias, slope = self._tensors()
        learned = slope if isinstance(slope, Tensor) else None
        number = slope if learned is None else None
        first, early = self.order == "conv-act-norm-film", self.dropout_position == "norm"
        active = self.activation, number, "conv-norm-act-film", "end"
        passive = "none", None, "conv-norm-act-film", "end"
        tensors = TailTensors(
            bias=bias, dropout_mask=mask if early else None, slope=learned if first else None
        )
        own = Options("none", None, False, 1e-5, *(active if first else passive))
        y = layer(run(x, Call(weight, self._geometry(), own, tensors)))
        rest = TailTensors(
            gamma=gamma,
            beta=beta,
            dropout_mask=None if early else mask,
            slope=None if first else learned,
        )
        options = Options(
            activation="none" if first else self.activation,
            slope=None if first else number,
            order=self.order,
            dropout_position="end" if early else self.dropout_position,
        )
        return run(y, Call(None, None, options, rest, deferred=bool(deferred)))

    def _geometry(self) -> Geometry:
        """The convolution's, as the attributes have it now."""
        return Geometry(
            self.stride, self.padding, self.dilation, False, self._no_padding, self.groups
        )

    def _tensors(self) -> tuple[Any, ...]:
        """weight, bias, slope."""
        held = self._parameters
        weight, bias, slope = [held[n] if n in held else getattr(self, n) for n in _PARAMETERS]
        return weight, bias, slope

    def extra_repr(self) -> str:
        """Shapes and parts of the block."""
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


def former_names(model: nn.Module, prefix: str = "") -> dict[str, str]:
    """Names of the norms' tensors in older state_dicts, where they were the blocks' own -> names of today."""
    names: dict[str, str] = {}
    for path, module in model.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(module, ConvNormFiLM):
            at = f"{path}." if path else ""
            names |= {f"{at}{old}": f"{at}norm_layer.{new}" for old, new in _TENSORS.items()}
    return names


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
