"""The network that turns metadata into FiLM's γ and β."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastfilm.ops import spec

PRESETS = ("paper", "identity")


class FiLMGenerator(nn.Module):
    """MLP from metadata [N, M] to γ and β, each [N, C].

    The presets are:

    - ``"paper"``: M → 64 → 16 → 2C with a sigmoid after every layer, γ the first half of the output and β the
      second, both in (0, 1) (Lemay et al. 2021, section 2; weights start as ``nn.Linear``'s).
    - ``"identity"``: SiLU hidden layers, γ = 1 + Δ, and a last layer that starts at zero: a fresh network
      computes what the same network without FiLM computes.

    Args:
        metadata_size: M, values per sample.
        channels: C.
        preset: one of the above.
        hidden: widths of the hidden layers.
        shared: a generator whose hidden weight matrices (not biases) this one uses as its own: they are the
            same ``nn.Parameter`` from the start.

    Raises:
        ValueError: sizes below 1, an unknown preset, or a ``shared`` generator of another shape.
    """

    def __init__(
        self,
        metadata_size: int,
        channels: int,
        *,
        preset: str = "paper",
        hidden: Sequence[int] = (64, 16),
        shared: FiLMGenerator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("metadata_size", metadata_size), ("channels", channels)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.metadata_size, self.channels = metadata_size, channels
        self.preset = spec.choice("preset", preset, PRESETS)
        widths = (metadata_size, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in zip(widths, hidden, strict=False))
        self.last = nn.Linear(widths[-1], 2 * channels)
        if self.preset == "identity":
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)
        if shared is not None:
            self.share(shared)

    def share(self, other: FiLMGenerator) -> None:
        """Uses ``other``'s hidden weight matrices as its own."""
        if len(other.hidden) != len(self.hidden):
            raise ValueError(
                f"shared must have {len(self.hidden)} hidden layers, got {len(other.hidden)}"
            )
        for mine, theirs in zip(self.hidden, other.hidden, strict=True):
            assert isinstance(mine, nn.Linear) and isinstance(theirs, nn.Linear)
            if mine.weight.shape != theirs.weight.shape:
                raise ValueError(
                    f"shared weights must have shape {tuple(mine.weight.shape)}, got {tuple(theirs.weight.shape)}"
                )
            mine.weight = theirs.weight

    def forward(self, metadata: Tensor) -> tuple[Tensor, Tensor]:
        """γ and β [N, C] from metadata [N, M]; in the parameters' dtype, also under autocast."""
        with torch.autocast(metadata.device.type, enabled=False):
            dtype = self.last.weight.dtype
            # oneDNN takes many times as long for such small products of 16-bit matrices
            wide = dtype.itemsize == 2 and metadata.device.type == "cpu"
            h = metadata.to(torch.float32 if wide else dtype)
            for layer in self.hidden:
                h = _linear(layer, h)
                h = torch.sigmoid(h) if self.preset == "paper" else nn.functional.silu(h)
            out = _linear(self.last, h)
            if self.preset == "paper":
                out = torch.sigmoid(out)
            gamma, beta = out.to(dtype).split(self.channels, dim=1)
            return (gamma, beta) if self.preset == "paper" else (1 + gamma, beta)

    def extra_repr(self) -> str:
        """Sizes and preset."""
        return f"{self.metadata_size}, {self.channels}, preset={self.preset!r}"


def _linear(layer: nn.Module, h: Tensor) -> Tensor:
    """``layer`` of ``h``; a plain linear one in the type of ``h``."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if h.dtype == weight.dtype:
        out: Tensor = layer(h)
        return out
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return layer(h.to(weight.dtype)).to(h.dtype)
    return nn.functional.linear(h, weight.to(h.dtype), layer.bias.to(h.dtype))
