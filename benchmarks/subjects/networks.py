"""The networks of the studies as data: channels, strides, patch sizes; and their layers, counted.

nnU-Net's ResidualEncoderUNet with the channels and blocks of its "L" preset (Isensee et al. 2024)
and MONAI's DynUNet with its default filters, both at the usual 128³ patch with a batch of 2 and
four MR contrasts. Deep supervision heads are left out: their work is below a thousandth.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from ..counted.roofline import Layer
from .eager_networks import EagerFiLMedUNet, EncoderDecoder, FilmForm


@dataclass(frozen=True)
class Network:
    """A network at one batch and patch size.

    Attributes:
        kind: "film" (FiLMed U-Net), "resenc" or "dynunet".
        widths: channels of each resolution; a FiLMed U-Net's bottom has those of the last one.
        blocks: residual blocks a stage ("resenc").
        norm, act, order: of its blocks.
    """

    name: str
    kind: str
    batch: int
    channels: int
    classes: int
    size: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...] | None = None
    norm: str = "instance"
    act: str = "leaky_relu"
    order: str = "conv-norm-act-film"

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.size)

    @property
    def case(self) -> str:
        """Name with batch and patch."""
        return f"{self.name} {'×'.join(map(str, self.size))} b{self.batch}"

    def shrunk(self, factor: int) -> Network:
        """The same network, batch 1, on a patch ``factor`` times smaller along each axis.

        The coarsest map keeps two places at least: a norm over a single one is undefined.
        """
        floor = 2 ** (len(self.widths) - (self.kind != "film"))
        size = [max(s // factor // floor, 1) * floor for s in self.size]
        if set(size) == {floor}:
            size[0] *= 2
        return replace(self, batch=1, size=tuple(size))

    def build(self, form: FilmForm = "broadcast") -> nn.Module:
        """The network in plain PyTorch."""
        if self.kind == "film":
            return EagerFiLMedUNet(
                self.channels,
                self.classes,
                dims=self.dims,
                depth=len(self.widths),
                filters=self.widths[0],
                form=form,
            )
        residual = self.kind == "resenc"
        return EncoderDecoder(
            self.channels, self.classes, self.widths, self.blocks, stem=residual, bias=residual
        )

    def layers(self) -> Counter[Layer]:
        """Its distinct convolutions, and how often each occurs."""
        found = _film_layers(self) if self.kind == "film" else _staged_layers(self)
        return Counter(found)


def _halved(size: tuple[int, ...], stride: int = 2) -> tuple[int, ...]:
    return tuple(s // stride for s in size)


def _film_layers(n: Network) -> list[Layer]:
    layers, size, cin = [], n.size, n.channels
    sizes = []
    for i, width in enumerate(n.widths):
        layers += [Layer(cin, width, size, input_grad=i > 0), Layer(width, width, size)]
        sizes.append(size)
        size, cin = _halved(size), width
    layers += [Layer(cin, cin, size)] * 2
    for skip, at in zip(reversed(n.widths), reversed(sizes), strict=True):
        layers += [Layer(cin + skip, skip, at), Layer(skip, skip, at)]
        cin = skip
    return [*layers, Layer(cin, n.classes, n.size)]


def _staged_layers(n: Network) -> list[Layer]:
    layers, size, cin = [], n.size, n.channels
    if n.kind == "resenc":
        layers.append(Layer(cin, n.widths[0], size, input_grad=False))
        cin = n.widths[0]
    sizes = []
    for i, width in enumerate(n.widths):
        stride = 1 if i == 0 else 2
        image = n.kind == "dynunet" and i == 0
        layers.append(Layer(cin, width, size, stride=stride, input_grad=not image))
        size = layers[-1].output
        sizes.append(size)
        repeats = 1 if n.blocks is None else 2 * n.blocks[i] - 1
        layers += [Layer(width, width, size)] * repeats
        if n.kind == "resenc" and cin != width:
            layers.append(Layer(cin, width, size, kernel=1))
        cin = width
    for width, at in zip(reversed(n.widths[:-1]), reversed(sizes[:-1]), strict=True):
        layers.append(Layer(cin, width, _halved(at), kernel=2, stride=2, transposed=True))
        layers.append(Layer(2 * width, width, at))
        if n.kind == "dynunet":
            layers.append(Layer(width, width, at))
        cin = width
    return [*layers, Layer(cin, n.classes, n.size, kernel=1)]


_FILM2D = Network(
    "FiLMedUNet 2D", "film", 16, 1, 1, (320, 256), (64, 128, 256, 512),
    norm="batch", act="relu", order="conv-act-norm-film",
)  # fmt: skip
_FILM3D = Network(
    "FiLMedUNet 3D", "film", 2, 1, 1, (128, 128, 128), (32, 64, 128, 256),
    act="relu", order="conv-act-norm-film",
)  # fmt: skip
_STAGED = (32, 64, 128, 256, 320, 320)

NETWORKS = (
    _FILM2D,
    _FILM3D,
    Network("nnU-Net ResEnc", "resenc", 2, 4, 4, (128, 128, 128), _STAGED, (1, 3, 4, 6, 6, 6)),
    Network("MONAI DynUNet", "dynunet", 2, 4, 4, (128, 128, 128), _STAGED),
    replace(_FILM2D, size=(512, 512)),
)
"""In the order in which the study measures them."""
