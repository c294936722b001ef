"""One block behind its convolution, as data: options as they were passed, their checked form, and the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """Options of ``conv_norm_film`` that are not tensors, as they were passed; ``slope`` if it is a number."""

    norm: str | None = None
    num_groups: int | None = None
    training: bool = False
    eps: float = 1e-5
    activation: str | None = None
    slope: float | None = None
    order: str = "conv-norm-film-act"
    dropout_position: str = "end"
    synchronised: bool = False


@dataclass(frozen=True, eq=False)
class Kind:
    """The parts of a block behind its convolution, in their one checked form.

    Attributes:
        norm, activation, order, dropout_position: members of the lists in ``spec.names``.
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


class TailTensors(NamedTuple):
    """The tensors of a block behind its convolution, in the order that kernels take them in; None where absent.

    Attributes:
        running_mean, running_var: [C].
        stats: moments [2, N, C] of the map, where the norm's statistics are the map's own; the block takes them.
        norm_weight, norm_bias: [C].
        bias: [C], of the convolution.
        gamma, beta, dropout_mask: [C], [1, C] or [N, C].
        slope: [1] or [C], the activation's parameter where it is learned.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    stats: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    dropout_mask: Tensor | None = None
    slope: Tensor | None = None


class Behind(NamedTuple):
    """The coefficients that a convolution gives beside its output.

    Attributes:
        kind: of the block; its ``norm_input`` is that of the convolution.
        momentum: of the running statistics, which move.
        tensors: of the block, but the moments.
        coef: [7, N, C], float32, where they are written.
    """

    kind: Kind
    momentum: float
    tensors: TailTensors
    coef: Tensor
