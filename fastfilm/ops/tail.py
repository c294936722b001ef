"""What follows a convolution: one block's normalisation, activation, dropout and FiLM, as options.

Shared by ``conv_norm_film`` and ``norm_film``: the checks, the eager form, and the way from moments to
coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from . import reference, spec
from .coefficients import coefficients, norm_statistics

_TENSORS = (
    "norm_weight",
    "norm_bias",
    "running_mean",
    "running_var",
    "gamma",
    "beta",
    "dropout_mask",
    "slope",
)


@dataclass
class Tail:
    """Options of a block behind its convolution; the fields are ``conv_norm_film``'s arguments."""

    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_groups: int | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5
    activation: str = "none"
    slope: float | Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    order: str = "conv-norm-film-act"
    dropout_mask: Tensor | None = None
    dropout_position: str = "end"

    def check(
        self, batch: int, channels: int, size: Sequence[int], **tensors: Tensor | None
    ) -> None:
        """Brings every option into its one form; TypeError or ValueError naming what does not fit.

        Args:
            size: spatial size of the map that the norm sees.
            tensors: the call's other tensors by name, the map itself first (for the device check).
        """
        self.norm = spec.choice("norm", self.norm, spec.NORMS)
        self.activation = spec.choice("activation", self.activation, spec.ACTIVATIONS)
        self.order = spec.choice("order", self.order, spec.ORDERS)
        self.dropout_position = spec.choice(
            "dropout_position", self.dropout_position, spec.DROPOUT_POSITIONS
        )
        for name in ("norm_weight", "norm_bias", "running_mean", "running_var"):
            spec.check_channel_vector(name, getattr(self, name), channels)
        self.gamma = spec.check_film("gamma", self.gamma, batch, channels)
        self.beta = spec.check_film("beta", self.beta, batch, channels)
        self.dropout_mask = spec.check_film("dropout_mask", self.dropout_mask, batch, channels)
        self.slope = _check_slope(self.activation, self.slope, channels)
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        spec.check_same_device(**tensors, **{k: v for k, v in own.items() if isinstance(v, Tensor)})
        if self.norm == "group":
            groups = self.num_groups
            if groups is None or groups < 1 or channels % groups:
                raise ValueError(f"num_groups must divide the {channels} channels, got {groups}")
        if (self.running_mean is None) != (self.running_var is None):
            raise ValueError("running_mean and running_var must be given together")
        if self.norm == "batch" and not self.training and self.running_mean is None:
            raise ValueError("norm='batch' with training=False needs running_mean and running_var")
        if (
            self.dropout_mask is not None
            and self.dropout_position == "norm"
            and self.norm == "none"
        ):
            raise ValueError("dropout_position='norm' needs a norm")
        if self.uses_input and batch > 0:
            self._check_count(batch, channels, size)

    @property
    def uses_input(self) -> bool:
        """Whether the norm's statistics are those of this very map."""
        if self.norm in ("group", "layer"):
            return True
        if self.norm == "batch":
            return self.training
        return self.norm == "instance" and (self.training or self.running_mean is None)

    @property
    def activation_first(self) -> bool:
        """Whether the norm sees the activated map."""
        return self.order == "conv-act-norm-film"

    @property
    def pre_activation(self) -> str:
        """Activation in front of the moments."""
        return self.activation if self.activation_first else "none"

    def pre(
        self, bias: Tensor | None, channels: int, like: Tensor, biased: bool = False
    ) -> Tensor | None:
        """[2, C] shift and slope in front of the moments; None where the moments see the raw map.

        Args:
            biased: the map has a bias already, whose gradient comes with the shift's.
        """
        if not self.activation_first or not self.uses_input:
            return None
        if self.activation == "none" and bias is None and not biased:
            return None
        dtype = accumulate_dtype(like)
        if bias is None and self.slope is None:
            return torch.zeros((2, channels), dtype=dtype, device=like.device)
        zero = torch.zeros(channels, dtype=dtype, device=like.device)
        shift = zero if bias is None else bias.to(dtype)
        if isinstance(self.slope, Tensor):
            row = self.slope.to(dtype).expand(channels)
        else:
            row = zero if self.slope is None else torch.full_like(zero, self.slope)
        return torch.stack([shift, row])

    def coefficients(
        self,
        batch: int,
        channels: int,
        like: Tensor,
        bias: Tensor | None,
        stats: Tensor | None,
        count: int,
    ) -> Tensor:
        """Rows a, b, g, s, p, q, slope [7, N, C]; updates running statistics in training.

        Args:
            stats: [2, N, C] moments of the map if ``uses_input``, else None.
            count: voxels of the map.
            bias: [C], the convolution's bias, which the raw map lacks.
        """
        dtype = accumulate_dtype(like)
        known: dict[str, Tensor] = {}
        if stats is not None:
            mask = self.dropout_mask if self.dropout_position == "norm" else None
            mean, var = norm_statistics(
                stats,
                self.norm,
                count,
                running_mean=self.running_mean,
                running_var=self.running_var,
                num_groups=self.num_groups,
                training=self.training,
                momentum=self.momentum,
                shift=None if self.activation_first else bias,
                scale=None if mask is None else mask.to(stats.dtype),
            )
            pivot = stats.detach()[0]
            if self.norm == "batch" and mask is None:
                pivot = (
                    mean if self.activation_first or bias is None else mean - bias.to(mean.dtype)
                )
            known = {"mean": mean, "var": var, "pivot": pivot.detach()}
        elif self.norm != "none":
            assert self.running_mean is not None and self.running_var is not None
            mean = self.running_mean.to(dtype).unsqueeze(0)
            known = {"var": self.running_var.to(dtype).unsqueeze(0), "pivot": mean.detach()}
            if not self.activation_first and bias is not None:
                known |= {"mean": mean, "pivot": (mean - bias.to(dtype)).detach()}
            elif self.dropout_mask is not None and self.dropout_position == "norm":
                known["mean"] = mean
        return coefficients(
            batch,
            channels,
            **known,
            eps=self.eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            conv_bias=bias,
            gamma=self.gamma,
            beta=self.beta,
            slope=self.slope,
            order=self.order,
            dropout_mask=self.dropout_mask,
            dropout_position=self.dropout_position,
            dtype=dtype,
            device=like.device,
        )

    def eager(self, y: Tensor) -> Tensor:
        """The same on ``y`` (which has the convolution's bias), step by step in PyTorch."""
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        options["act"] = options.pop("activation")
        return reference.block_tail(y, **options)

    def _check_count(self, batch: int, channels: int, size: Sequence[int]) -> None:
        """PyTorch's refusal to normalise a single value."""
        voxels = math.prod(size)
        shape = (batch, channels, *size)
        if self.norm == "batch" and batch * voxels == 1:
            raise ValueError(
                f"norm='batch' needs more than 1 value per channel when training, got {shape}"
            )
        if self.norm == "instance" and voxels == 1:
            raise ValueError(f"norm='instance' needs more than 1 spatial element, got {shape}")
        if self.norm in ("group", "layer"):
            groups = self.num_groups if self.norm == "group" else 1
            assert groups is not None
            if batch * (channels // groups) * voxels == 1:
                raise ValueError(
                    f"norm={self.norm!r} needs more than 1 value per group, got {shape}"
                )


def accumulate_dtype(t: Tensor) -> torch.dtype:
    """dtype of statistics and coefficients beside a map: float32, or float64 for a float64 map."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_slope(act: str, slope: float | Tensor | None, channels: int) -> float | Tensor | None:
    if act not in spec.DEFAULT_SLOPE:
        if slope is not None:
            raise ValueError(f"slope has no meaning for activation {act!r}, got {slope!r}")
        return None
    if slope is None:
        return spec.DEFAULT_SLOPE[act]
    if isinstance(slope, Tensor):
        if slope.numel() not in (1, channels) or slope.dim() > 1 or not slope.is_floating_point():
            raise ValueError(
                f"slope must be floating point with 1 or {channels} values, got {slope.dtype} {tuple(slope.shape)}"
            )
        return slope.reshape(-1)
    return float(slope)
