"""What follows a convolution: one block's normalisation, activation, dropout and FiLM.

``Kind`` is what can be said of a block without its tensors, checked once; ``Tail`` is a kind with the tensors
of one call, and knows the eager form and the way from moments to coefficients.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from . import fused_coefficients, reference
from .coefficients import coefficients, norm_statistics


def accumulate_dtype(t: Tensor) -> torch.dtype:
    """dtype of statistics and coefficients beside a map: float32, or float64 for a float64 map."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Kind:
    """What a block consists of behind its convolution, in its one checked form.

    Attributes:
        norm, activation, order, dropout_position: members of ``spec``'s lists.
        groups: of a sample, for group norm; 1 for layer norm and where it has no meaning.
        slope: the activation's parameter where it is a number; 0 where there is none or it is a tensor.
        batch, channels, count: N, C and the voxels of the map that the norm sees.
        wide: float64 coefficients.
        uses_input: the norm's statistics are those of this very map.
        update: the running statistics move.
    """

    norm: str
    activation: str
    order: str
    dropout_position: str
    groups: int
    eps: float
    slope: float
    batch: int
    channels: int
    count: int
    wide: bool
    training: bool
    uses_input: bool
    update: bool

    def __post_init__(self) -> None:
        first = self.order == "conv-act-norm-film"
        object.__setattr__(self, "activation_first", first)
        object.__setattr__(self, "pre_activation", self.activation if first else "none")

    activation_first: bool = False
    """Whether the norm sees the activated map."""
    pre_activation: str = "none"
    """Activation in front of the moments."""


@dataclass
class Tail:
    """A block's kind and tensors: [C] each, γ, β and mask [C], [1, C] or [N, C]; None where absent."""

    kind: Kind
    momentum: float
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    dropout_mask: Tensor | None
    slope: Tensor | None
    group: dist.ProcessGroup | None = field(default=None, kw_only=True)
    """Processes over which the batch is spread, for the statistics of batch norm."""

    def pre(self, bias: Tensor | None, like: Tensor, biased: bool = False) -> Tensor | None:
        """[2, C] shift and slope in front of the moments; None where the moments see the raw map.

        Args:
            biased: the map has a bias already, whose gradient comes with the shift's.
        """
        kind = self.kind
        if not kind.activation_first or not kind.uses_input:
            return None
        if kind.activation == "none" and bias is None and not biased:
            return None
        dtype = accumulate_dtype(like)
        if bias is None and self.slope is None and kind.slope == 0.0:
            return torch.zeros((2, kind.channels), dtype=dtype, device=like.device)
        zero = torch.zeros(kind.channels, dtype=dtype, device=like.device)
        shift = zero if bias is None else bias.to(dtype)
        if self.slope is not None:
            row = self.slope.to(dtype).expand(kind.channels)
        else:
            row = torch.full_like(zero, kind.slope)
        return torch.stack([shift, row])

    def coefficients(
        self,
        like: Tensor,
        bias: Tensor | None,
        stats: Tensor | None,
        kernels: ModuleType | None,
        short: bool,
    ) -> Tensor:
        """Rows a, b, g, s, p, q, slope [7, N, C]; updates running statistics in training.

        Args:
            bias: [C], the convolution's bias, which the raw map lacks.
            stats: [2, N, C] moments of the map if ``uses_input``, else None.
            kernels: the backend's launchers; one fused call where they have it.
            short: all tensors are ``direct``.
        """
        mask = self.dropout_mask
        tensors = (
            self.running_mean,
            self.running_var,
            stats,
            self.norm_weight,
            self.norm_bias,
            bias,
            self.gamma,
            self.beta,
            mask,
            self.slope,
        )
        if (
            short
            and kernels is not None
            and self.group is None
            and hasattr(kernels, "block_coefficients")
            and kernels.covers_block(self.kind)
            and not (mask is not None and mask.requires_grad)
        ):
            return fused_coefficients.block_coefficients(
                kernels,
                self.kind,
                self.momentum,
                tensors,
                _definition,
                like.device,
            )
        return self.defined_coefficients(like, bias, stats)

    def defined_coefficients(
        self, like: Tensor, bias: Tensor | None, stats: Tensor | None
    ) -> Tensor:
        """``coefficients`` in plain PyTorch: its definition."""
        kind, dtype = self.kind, accumulate_dtype(like)
        gamma, beta, mask = (
            t.unsqueeze(0) if t is not None and t.dim() == 1 else t
            for t in (self.gamma, self.beta, self.dropout_mask)
        )
        known: dict[str, Tensor] = {}
        if stats is not None:
            before = mask if kind.dropout_position == "norm" else None
            mean, var = norm_statistics(
                stats,
                kind.norm,
                kind.count,
                running_mean=self.running_mean,
                running_var=self.running_var,
                num_groups=kind.groups,
                training=kind.training,
                momentum=self.momentum,
                shift=None if kind.activation_first else bias,
                scale=None if before is None else before.to(stats.dtype),
                group=self.group,
            )
            pivot = stats.detach()[0]
            if kind.norm == "batch" and before is None:
                pivot = (
                    mean if kind.activation_first or bias is None else mean - bias.to(mean.dtype)
                )
            known = {"mean": mean, "var": var, "pivot": pivot.detach()}
        elif kind.norm != "none":
            assert self.running_mean is not None and self.running_var is not None
            mean = self.running_mean.to(dtype).unsqueeze(0)
            known = {"var": self.running_var.to(dtype).unsqueeze(0), "pivot": mean.detach()}
            if not kind.activation_first and bias is not None:
                known |= {"mean": mean, "pivot": (mean - bias.to(dtype)).detach()}
            elif mask is not None and kind.dropout_position == "norm":
                known["mean"] = mean
        return coefficients(
            kind.batch,
            kind.channels,
            **known,
            eps=kind.eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            conv_bias=bias,
            gamma=gamma,
            beta=beta,
            slope=kind.slope if self.slope is None else self.slope,
            order=kind.order,
            dropout_mask=mask,
            dropout_position=kind.dropout_position,
            dtype=dtype,
            device=like.device,
        )

    def eager(self, y: Tensor) -> Tensor:
        """The same on ``y`` (which has the convolution's bias), step by step in PyTorch."""
        kind = self.kind
        if self.group is not None and kind.norm == "batch" and kind.uses_input:
            stats = reference.moments(y, self.pre(None, y), kind.pre_activation)
            coef = self.defined_coefficients(y, None, stats)
            return reference.materialise(y, coef, kind.activation)
        gamma, beta, mask = (
            t.unsqueeze(0) if t is not None and t.dim() == 1 else t
            for t in (self.gamma, self.beta, self.dropout_mask)
        )
        return reference.block_tail(
            y,
            norm=kind.norm,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_groups=kind.groups,
            training=kind.training,
            momentum=self.momentum,
            eps=kind.eps,
            act=kind.activation,
            slope=kind.slope if self.slope is None else self.slope,
            gamma=gamma,
            beta=beta,
            order=kind.order,
            dropout_mask=mask,
            dropout_position=kind.dropout_position,
        )


def _definition(kind: Kind, tensors: fused_coefficients.Tensors, like: Tensor) -> Tensor:
    """``Tail.defined_coefficients`` of tensors as ``fused_coefficients`` keeps them for backward."""
    mean, var, stats, weight, norm_bias, bias, gamma, beta, mask, slope = tensors
    tail = Tail(kind, 0.0, weight, norm_bias, mean, var, gamma, beta, mask, slope)
    return tail.defined_coefficients(like, bias, stats)
