"""The network that turns metadata into FiLM's γ and β."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastfilm.ops import spec

PRESETS = ("paper", "identity")


class FiLMGenerator(nn.Module):
    """MLP from metadata [N, M] to γ and β, each [N, C].

    Presets:

    ``"paper"``     M → 64 → 16 → 2C with a sigmoid after every layer, γ the first half of the output and β
                    the second, both in (0, 1) (Lemay et al. 2021, section 2; weights start as ``nn.Linear``'s)
    ``"identity"``  SiLU hidden layers, γ = 1 + Δ, and a last layer that starts at zero: a fresh network
                    computes what the same network without FiLM computes

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
            h = metadata.to(self.last.weight.dtype)
            for layer in self.hidden:
                h = layer(h)
                h = torch.sigmoid(h) if self.preset == "paper" else nn.functional.silu(h)
            out = self.last(h)
            if self.preset == "paper":
                out = torch.sigmoid(out)
            gamma, beta = out.split(self.channels, dim=1)
            return (gamma, beta) if self.preset == "paper" else (1 + gamma, beta)

    def extra_repr(self) -> str:
        """Sizes and preset."""
        return f"{self.metadata_size}, {self.channels}, preset={self.preset!r}"


def modulations(
    generators: Sequence[FiLMGenerator], metadata: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """γ and β of each generator from metadata [N, M], as calling one after another gives them.

    Without gradients, generators that share their hidden weight matrices are computed together: three products of
    matrices instead of three for each.
    """
    first = generators[0]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _alike(generators):
        return [g(metadata) for g in generators]
    count, dtype = len(generators), first.last.weight.dtype
    activation = torch.sigmoid if first.preset == "paper" else nn.functional.silu
    with torch.autocast(metadata.device.type, enabled=False):
        h = metadata.to(dtype)
        for i, layer in enumerate(first.hidden):
            assert isinstance(layer, nn.Linear)
            bias = torch.stack([g.hidden[i].bias for g in generators])  # type: ignore[misc]
            h = activation(nn.functional.linear(h, layer.weight) + bias[:, None])  # [G, N, hidden]
        last = torch.cat([g.last.weight for g in generators])
        bias = torch.cat([g.last.bias for g in generators])
        widths = [2 * g.channels for g in generators]
        # every generator's last layer on everyone's hidden values: little work, and one call
        full = nn.functional.linear(h.reshape(-1, h.shape[-1]), last, bias)
        found = full.view(count, -1, sum(widths)).split(widths, dim=2)
        film = []
        for i, (g, out) in enumerate(zip(generators, found, strict=True)):
            out = torch.sigmoid(out[i]) if g.preset == "paper" else out[i]
            gamma, beta = out.split(g.channels, dim=1)
            film.append((gamma if g.preset == "paper" else 1 + gamma, beta))
        return film


def _alike(generators: Sequence[FiLMGenerator]) -> bool:
    """Whether ``modulations`` may compute them together: shared weights, and nothing hooked or put in between."""
    first = generators[0]
    for g in generators:
        layers = [*g.hidden, g.last]
        plain = type(g) is FiLMGenerator and all(type(layer) is nn.Linear for layer in layers)
        if not plain or g.preset != first.preset or len(g.hidden) != len(first.hidden):
            return False
        if any(m._forward_hooks or m._forward_pre_hooks for m in (g, *layers)):
            return False
        for mine, theirs in zip(g.hidden, first.hidden, strict=True):
            if mine.weight is not theirs.weight or mine.bias is None:
                return False
    return first.last.weight.device.type == "cpu" and len(first.hidden) > 0
