"""The 3D network of the paper's code: a strided residual encoder, heads at two scales, ten FiLM layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastfilm.ops import conv_norm_film, maps, norm_film, spec
from fastfilm.ops.maps import Map
from fastfilm.ops.spec import subclasses

from . import ivadomed
from .attention_gate import AttentionGate3d
from .blocks import ConvNormFiLM3d
from .metadata import Metadata
from .unet import (
    FINAL_ACTIVATIONS,
    Conditioned,
    Modulation,
    check_film_layers,
    final,
    generators,
)

LEVELS = 5
FILM_LAYERS = 10


def _block(ci: int, co: int, kernel: int = 3, **options: Any) -> ConvNormFiLM3d:
    defaults: dict[str, Any] = {
        "bias": False,
        "affine": False,
        "norm": "instance",
        "activation": "leaky_relu",
        "order": "conv-norm-act-film",
    }
    return ConvNormFiLM3d(ci, co, kernel, **(defaults | options))


def _bare(ci: int, co: int, kernel: int = 3, stride: int = 1) -> ConvNormFiLM3d:
    return _block(ci, co, kernel, stride=stride, norm=None, activation=None)


class Modified3DUNet(Conditioned):
    """3D U-Net with residual context blocks and FiLM (Isensee et al. 2017; the FiLM paper's code).

    Five levels of f, 2f, … 16f filters, stride-2 convolutions down, nearest-neighbour ×2 up, instance norm
    without affine, leaky ReLU 0.01, convolutions without bias. Logits of two coarser levels are upsampled
    and added to the full-size ones.

    Args:
        in_channels, out_channels: channels of image and output.
        base_filters: f.
        metadata_size: M values per sample; 0 builds the plain network.
        film_layers: 10 switches: context levels 1-4, level 5, the lowest localisation block, the three
            localisation blocks above it, logits. None switches all on if ``metadata_size`` > 0.
        dropout: channel dropout between the two convolutions of each context block.
        generator: "paper" or "identity", see ``FiLMGenerator``.
        final_activation: None (logits), "sigmoid" or "softmax".
        drop_background: leave out channel 0 after the final activation.
        attention: gates on the skips of levels 2, 3 and 4, which the fifth level's map steers.
        deferred: hand maps on unwritten, as ``FiLMedUNet`` does; False writes every block's output.

    Every spatial size must be divisible by 16.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        base_filters: int = 16,
        metadata_size: int = 0,
        film_layers: Sequence[int | bool] | None = None,
        dropout: float = 0.0,
        generator: str = "paper",
        final_activation: str | None = None,
        drop_background: bool = False,
        attention: bool = False,
        deferred: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("base_filters", base_filters),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.base_filters, self.metadata_size = base_filters, metadata_size
        self.film_layers = check_film_layers(film_layers, FILM_LAYERS, metadata_size)
        self.final_activation = spec.choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        self.drop_background, self.deferred = drop_background, deferred
        widths = [base_filters * 2**i for i in range(LEVELS)]
        drop: dict[str, Any] = {"dropout": dropout, "dropout_position": "norm"}
        # the first level's block has no norm: its dropout follows the convolution directly
        drop_first: dict[str, Any] = {"dropout": dropout, "norm": None, "activation": "leaky_relu"}
        self.stem = _bare(in_channels, widths[0])
        self.inner = nn.ModuleList(
            [
                _block(widths[0], widths[0], **drop_first),
                *(_block(w, w, **drop) for w in widths[1:]),
            ]
        )
        self.outer = _bare(widths[0], widths[0])
        self.down = nn.ModuleList(_bare(a, b, stride=2) for a, b in itertools.pairwise(widths))
        # lowest first: 16f -> 8f, then (after concatenation and a 1x1) 8f -> 4f -> 2f -> f
        ups = [(widths[4], widths[3])] + [(widths[i], widths[i - 1]) for i in (3, 2, 1)]
        self.up = nn.ModuleList(_block(a, b) for a, b in ups)
        self.bottom = _block(widths[3], widths[3], 1)
        self.local = nn.ModuleList(_block(2 * w, 2 * w) for w in (widths[3], *widths[2::-1]))
        self.reduce = nn.ModuleList(_block(2 * w, w, 1) for w in (widths[3], widths[2], widths[1]))
        self.last = _bare(2 * widths[0], out_channels, 1)
        self.heads = nn.ModuleList(_bare(2 * w, out_channels, 1) for w in (widths[2], widths[1]))
        channels = [
            *widths[:4],
            widths[4],
            widths[3],
            widths[2],
            widths[1],
            widths[0],
            out_channels,
        ]
        self.gating: ConvNormFiLM3d | None = None
        self.gates: nn.ModuleList | None = None
        if attention:
            self.gating = ConvNormFiLM3d(widths[4], widths[3], 1, norm="batch", activation="relu")
            self.gates = nn.ModuleList(AttentionGate3d(w, widths[3]) for w in widths[1:4])
        self.film = generators(channels, self.film_layers, metadata_size, generator)

    @subclasses.unwrapping
    def forward(self, image: Tensor, metadata: Metadata | Modulation | None = None) -> Tensor:
        """Logits or probabilities [N, out_channels, D, H, W] for ``image`` [N, in_channels, D, H, W].

        Raises:
            TypeError, ValueError: as ``FiLMedUNet``; ValueError for sizes not divisible by 16.
        """
        self.check_image(image, self.in_channels, 3)
        if any(s % 2 ** (LEVELS - 1) for s in image.shape[2:]):
            raise ValueError(
                f"image must be divisible by {2 ** (LEVELS - 1)} in every dimension, got {tuple(image.shape[2:])}"
            )
        film = self.modulation(metadata, image)
        lazy = self.deferred
        skips = self._context(image, film)
        x: Map = self.bottom(
            self.up[0](_double(skips.pop()), deferred=True), *film[5], deferred=lazy
        )
        pyramid = []
        for i, local in enumerate(self.local):
            skip = skips.pop()
            finest = i == len(self.local) - 1
            joined = maps.join([skip, x] if finest else [x, skip])
            here = local(joined, deferred=lazy or finest)
            pyramid.append(here)
            if not finest:
                reduced = self.reduce[i](here, deferred=lazy)
                x = self.up[i + 1](_double(reduced), *film[6 + i], deferred=lazy)
        coarse = maps.plain(_double(maps.plain(self.heads[0](pyramid[1]))))
        coarse = coarse + maps.plain(self.heads[1](pyramid[2]))
        logits = maps.plain(self.last(pyramid[3])) + maps.plain(_double(coarse))
        gamma, beta = film[9]
        if gamma is not None:
            logits = maps.plain(norm_film(logits, gamma=gamma, beta=beta))
        return final(logits, self.final_activation, self.drop_background)

    def _context(self, image: Tensor, film: list[Any]) -> list[Map]:
        """The encoder: the skips of levels 1 to 4 and the map of level 5."""
        residual = maps.plain(self.stem(image))
        x: Map = norm_film(residual, activation="leaky_relu", deferred=True)
        x = maps.plain(self.outer(self.inner[0](x, deferred=True)))
        # the first skip is taken before norm and FiLM, the others behind them
        lazy = self.deferred
        x = maps.plain(norm_film(x + residual, activation="leaky_relu"))
        found: list[Map] = [x]
        for level, down in enumerate(self.down, start=1):
            x = _norm_act(x, lazy, *film[level - 1])
            if level > 1:
                found.append(x)
            residual = maps.plain(down(x))
            inner = self.inner[level]
            assert isinstance(inner, ConvNormFiLM3d)
            # the block's one convolution runs twice, each time behind norm and activation
            twice = inner(_pending_norm_act(residual), deferred=True)
            x = maps.plain(conv_norm_film(twice, inner.weight, padding=inner.padding)) + residual
        if self.gating is not None and self.gates is not None:
            # the paper's code takes the signal behind norm and activation, and normalises it again below
            x = maps.plain(_norm_act(x, lazy, None, None))
            signal = self.gating(x)
            gated = zip(self.gates, found[1:], strict=True)
            found[1:] = [gate(maps.plain(skip), signal) for gate, skip in gated]
        return [*found, _norm_act(x, lazy, *film[LEVELS - 1])]

    @classmethod
    def from_ivadomed(
        cls,
        source: Mapping[str, Tensor] | nn.Module,
        *,
        final_activation: str | None = ivadomed.KEPT,
        dropout: float | str = ivadomed.KEPT,
        momentum: float | str | None = ivadomed.KEPT,
    ) -> Modified3DUNet:
        """The network of an ivadomed ``Modified3DUNet``, or of its state_dict, bit for bit.

        Args:
            source: the network, whose hyper-parameters are kept; or its state_dict, which does not hold them.
            final_activation, dropout, momentum: as in ``FiLMedUNet.from_ivadomed``; momentum is that of the
                attention gates' batch norms.

        Raises:
            ValueError: keys, shapes or hyper-parameters that are not such a network's.
        """
        state_dict = source.state_dict() if isinstance(source, nn.Module) else source
        structure = ivadomed.read_modified(state_dict)
        settings = ivadomed.read_settings(
            source,
            final_activation=final_activation,
            dropout=dropout,
            momentum=momentum,
            eps=ivadomed.KEPT,
        )
        if settings.eps != 1e-5:
            raise ValueError(f"eps of the norms must be 1e-5, got {settings.eps}")
        model = cls(
            **structure,
            dropout=settings.dropout,
            final_activation=settings.final_activation,
            drop_background=structure["out_channels"] > 1,
        )
        settings.apply(model)
        ivadomed.load(model, state_dict, ivadomed.modified_keys(model))
        return model

    def to_ivadomed(self) -> dict[str, Tensor]:
        """The state_dict under ivadomed's names (values are copies); inverse of ``from_ivadomed``.

        It holds no hyper-parameters: give the receiving network this one's momentum and dropout.
        """
        return ivadomed.save(self, ivadomed.modified_keys(self))


def _double(x: Map) -> Map:
    return maps.interpolate(x, scale_factor=2.0, mode="nearest")


def _norm_act(x: Map, lazy: bool, gamma: Tensor | None, beta: Tensor | None) -> Map:
    return norm_film(
        x,
        norm="instance",
        activation="leaky_relu",
        gamma=gamma,
        beta=beta,
        order="conv-norm-act-film",
        deferred=lazy,
    )


def _pending_norm_act(x: Tensor) -> Map:
    return norm_film(x, norm="instance", activation="leaky_relu", deferred=True)
