"""Gates on the skips of a 3D U-Net (Oktay et al. 2018, grid attention)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfilm.ops.spec import subclasses

from .blocks import ConvNormFiLM3d


class AttentionGate3d(nn.Module):
    """W(x · sigmoid(ψ(relu(θ(x) + φ(g))))): weighs a skip by a coarse gating signal.

    θ halves the resolution, the rest happens there; the weights [N, 1, D, H, W] are resized to the skip's.

    Args:
        channels: of the skip, and of what comes out.
        gating_channels: of the signal.
    """

    def __init__(self, channels: int, gating_channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv3d(channels, channels, 2, stride=2, bias=False)
        self.phi = nn.Conv3d(gating_channels, channels, 1)
        self.psi = nn.Conv3d(channels, 1, 1)
        self.out = ConvNormFiLM3d(channels, channels, 1, norm="batch", activation=None)

    @subclasses.unwrapping
    def forward(self, x: Tensor, gating: Tensor) -> Tensor:
        """The weighed skip, shape of ``x`` [N, C, D, H, W]; ``gating`` [N, G, D', H', W']."""
        theta = self.theta(x)
        signal = _resized(self.phi(gating), theta)
        weights = torch.sigmoid(self.psi(F.relu(theta + signal)))
        found: Tensor = self.out(_resized(weights, x) * x)
        return found


def _resized(v: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(v, size=like.shape[2:], mode="trilinear", align_corners=True)
