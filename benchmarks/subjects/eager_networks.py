"""The peers' networks in plain PyTorch: what a user without fastfilm runs.

``EagerFiLMedUNet`` has ivadomed's module names, so that its state_dict is one that
``FiLMedUNet.from_ivadomed`` reads: both then compute the same function.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FilmForm = Literal["broadcast", "expanded", "none"]

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class Generator(nn.Module):
    """Metadata [N, M] -> γ beside β [N, 2C]: n → 64 → 16 → 2C with sigmoids (Lemay et al. 2021)."""

    def __init__(self, metadata: int, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(metadata, 64)
        self.linear2 = nn.Linear(64, 16)
        self.linear3 = nn.Linear(16, 2 * channels)

    def forward(self, metadata: Tensor) -> Tensor:
        """[N, 2C]."""
        hidden = torch.sigmoid(self.linear2(torch.sigmoid(self.linear1(metadata))))
        return torch.sigmoid(self.linear3(hidden))


class Film(nn.Module):
    """γ·x + β; ``expanded`` first repeats γ and β to 2C full channels, as ivadomed does."""

    def __init__(self, metadata: int, channels: int, form: FilmForm) -> None:
        super().__init__()
        self.generator = Generator(metadata, channels)
        self.expanded = form == "expanded"

    def forward(self, x: Tensor, metadata: Tensor) -> Tensor:
        """x [N, C, *S] -> [N, C, *S]."""
        film = self.generator(metadata)
        film = film.reshape(*film.shape, *(1,) * (x.dim() - 2))
        if self.expanded:
            film = film.repeat(1, 1, *x.shape[2:])
        gamma, beta = film.chunk(2, 1)
        return gamma * x + beta


class DoubleConv(nn.Module):
    """Twice convolution, ReLU, norm: batch norm in 2D, instance norm without affine in 3D."""

    def __init__(self, cin: int, cout: int, dims: int) -> None:
        super().__init__()
        self.conv1 = CONV[dims](cin, cout, 3, padding=1)
        self.conv1_bn = nn.BatchNorm2d(cout) if dims == 2 else nn.InstanceNorm3d(cout)
        self.conv2 = CONV[dims](cout, cout, 3, padding=1)
        self.conv2_bn = nn.BatchNorm2d(cout) if dims == 2 else nn.InstanceNorm3d(cout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, *S] -> [N, Cout, *S]."""
        x = self.conv1_bn(F.relu(self.conv1(x)))
        return self.conv2_bn(F.relu(self.conv2(x)))


class Up(nn.Module):
    """Upsamples to the skip's size, concatenates, convolves twice."""

    def __init__(self, cin: int, cout: int, dims: int) -> None:
        super().__init__()
        self.downconv = DoubleConv(cin, cout, dims)
        self.mode = "bilinear" if dims == 2 else "trilinear"

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """x at half the size, skip [N, C, *S] -> [N, Cout, *S]."""
        x = F.interpolate(x, size=skip.shape[2:], mode=self.mode, align_corners=True)
        return self.downconv(torch.cat([x, skip], 1))


class EagerFiLMedUNet(nn.Module):
    """The FiLMed U-Net layer by layer; a FiLM after each double convolution and on the logits."""

    def __init__(
        self,
        channels: int = 1,
        classes: int = 1,
        *,
        dims: int = 2,
        depth: int = 4,
        filters: int = 64,
        metadata: int = 3,
        form: FilmForm = "broadcast",
    ) -> None:
        super().__init__()
        self.depth, self.form = depth, form
        widths = [filters * 2**i for i in range(depth)]

        def film(width: int) -> nn.Module | None:
            return None if form == "none" else Film(metadata, width, form)

        down: list[nn.Module | None] = []
        cin = channels
        for width in widths:
            down += [DoubleConv(cin, width, dims), film(width), _pool(dims)]
            cin = width
        self.encoder = nn.Module()
        self.encoder.down_path = _indexed(down)
        self.encoder.conv_bottom = DoubleConv(cin, cin, dims)
        self.encoder.film_bottom = film(cin)
        up: list[nn.Module | None] = []
        for j, skip in enumerate(reversed(widths)):
            width = widths[-1] if j == 0 else skip
            up += [Up(cin + skip, width, dims), film(width)]
            cin = width
        self.decoder = nn.Module()
        self.decoder.up_path = _indexed(up)
        self.decoder.last_conv = CONV[dims](filters, classes, 3, padding=1)
        self.decoder.last_film = film(classes)
        self._tie()

    def _tie(self) -> None:
        """One pair of hidden weight matrices for all generators; biases are each layer's own."""
        films = [m for m in self.modules() if isinstance(m, Generator)]
        for generator in films[1:]:
            generator.linear1.weight = films[0].linear1.weight
            generator.linear2.weight = films[0].linear2.weight

    def forward(self, image: Tensor, metadata: Tensor | None = None) -> Tensor:
        """Image [N, C, *S] and metadata [N, M] -> probabilities [N, classes, *S]."""

        def film(layer: Any, x: Tensor) -> Tensor:
            return x if layer is None else layer(x, metadata)

        x: Tensor = image
        skips: list[Tensor] = []
        down: Any = self.encoder.down_path
        up: Any = self.decoder.up_path
        bottom: Any = self.encoder.conv_bottom
        last: Any = self.decoder.last_conv
        for i in range(self.depth):
            x = film(_at(down, 3 * i + 1), _at(down, 3 * i)(x))
            skips.append(x)
            x = _at(down, 3 * i + 2)(x)
        x = film(self.encoder.film_bottom, bottom(x))
        for j in range(self.depth):
            x = film(_at(up, 2 * j + 1), _at(up, 2 * j)(x, skips.pop()))
        return torch.sigmoid(film(self.decoder.last_film, last(x)))


def _pool(dims: int) -> nn.Module:
    return nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)


def _indexed(modules: list[nn.Module | None]) -> nn.Module:
    """A module whose children are named by their position; a None is left out."""
    holder = nn.Module()
    for i, module in enumerate(modules):
        if module is not None:
            holder.add_module(str(i), module)
    return holder


def _at(holder: nn.Module, index: int) -> Any:
    return getattr(holder, str(index), None)


class ConvNormAct(nn.Module):
    """Convolution, affine instance norm, leaky ReLU (0.01)."""

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int, bias: bool, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(cin, cout, kernel, stride, (kernel - 1) // 2, bias=bias)
        self.norm = nn.InstanceNorm3d(cout, affine=True)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, *S] -> [N, Cout, *T]."""
        x = self.norm(self.conv(x))
        return F.leaky_relu(x, 0.01, inplace=True) if self.act else x


class Residual(nn.Module):
    """nnU-Net's residual block: two convolutions, and a pooled 1×1×1 projection beside them."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNormAct(cin, cout, 3, stride, True)
        self.conv2 = ConvNormAct(cout, cout, 3, 1, True, act=False)
        self.pool = nn.AvgPool3d(stride) if stride > 1 else nn.Identity()
        self.project = (
            ConvNormAct(cin, cout, 1, 1, False, act=False) if cin != cout else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, Cin, *S] -> [N, Cout, *T]."""
        return F.leaky_relu(self.conv2(self.conv1(x)) + self.project(self.pool(x)), 0.01)


class EncoderDecoder(nn.Module):
    """A 3D U-Net of stages, with strided convolutions down and transposed ones up.

    Args:
        blocks: residual blocks a stage; None for two plain convolutions a stage on both sides.
        stem: whether a convolution precedes the first stage.
        bias: whether convolutions have a bias.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        widths: tuple[int, ...],
        blocks: tuple[int, ...] | None,
        stem: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.stem = ConvNormAct(channels, widths[0], 3, 1, bias) if stem else nn.Identity()
        self.down, self.up, self.merge = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        cin = widths[0] if stem else channels
        for i, width in enumerate(widths):
            stride = 1 if i == 0 else 2
            stage: list[nn.Module] = []
            if blocks is None:
                stage = [
                    ConvNormAct(cin, width, 3, stride, bias),
                    ConvNormAct(width, width, 3, 1, bias),
                ]
            else:
                stage = [Residual(cin, width, stride)]
                stage += [Residual(width, width, 1) for _ in range(blocks[i] - 1)]
            self.down.append(nn.Sequential(*stage))
            cin = width
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose3d(cin, width, 2, 2, bias=bias))
            merge: list[nn.Module] = [ConvNormAct(2 * width, width, 3, 1, bias)]
            if blocks is None:
                merge.append(ConvNormAct(width, width, 3, 1, bias))
            self.merge.append(nn.Sequential(*merge))
            cin = width
        self.head = nn.Conv3d(cin, classes, 1)

    def forward(self, image: Tensor, metadata: Tensor | None = None) -> Tensor:
        """Image [N, C, *S] -> logits [N, classes, *S]; metadata is not used."""
        x, skips = self.stem(image), []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), skips.pop()], 1))
        return self.head(x)
