"""FiLM as a layer of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastfilm.ops import norm_film, spec

from .generator import FiLMGenerator
from .metadata import Metadata, as_metadata


class FiLM(nn.Module):
    """γ(metadata) · x + β(metadata), per sample and channel (Perez et al. 2018, eq. 2), in one pass.

    Args:
        metadata_size: M, values per sample.
        channels: C of the feature map.
        preset, hidden: see ``FiLMGenerator``.

    Example:
        >>> import torch, fastfilm
        >>> film = fastfilm.FiLM(metadata_size=3, channels=8, preset="identity")
        >>> film(torch.randn(2, 8, 5, 5), [[1, 0, 0], [0, 1, 0]]).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        metadata_size: int,
        channels: int,
        *,
        preset: str = "paper",
        hidden: Sequence[int] = (64, 16),
    ) -> None:
        super().__init__()
        self.generator = FiLMGenerator(metadata_size, channels, preset=preset, hidden=hidden)

    def film(self, metadata: Metadata, batch: int) -> tuple[Tensor, Tensor]:
        """γ and β [N or 1, C] for metadata [N or 1, M]."""
        weight = self.generator.last.weight
        rows = as_metadata(
            metadata, self.generator.metadata_size, batch, weight.device, weight.dtype
        )
        gamma, beta = self.generator(rows)
        return gamma, beta

    def forward(self, x: Tensor, metadata: Metadata) -> Tensor:
        """x [N, C, *S] modulated by metadata [N, M]; x's dtype, channels-last."""
        spec.check_feature_map("x", x)
        gamma, beta = self.film(metadata, x.shape[0])
        v = norm_film(x, gamma=gamma, beta=beta)
        assert isinstance(v, Tensor)
        return v
