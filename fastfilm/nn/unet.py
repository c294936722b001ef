"""The FiLMed U-Net of Lemay et al. (MIDL 2021), 2D and 3D, on fused blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastfilm.ops import maps, spec
from fastfilm.ops.maps import Map
from fastfilm.ops.spec import subclasses

from . import ivadomed
from .blocks import ConvNormFiLM2d, ConvNormFiLM3d, DoubleConv
from .generator import FiLMGenerator
from .metadata import Metadata, as_metadata

FINAL_ACTIVATIONS = ("none", "sigmoid", "softmax")


def final(x: Tensor, activation: str, drop_background: bool = False) -> Tensor:
    """Logits [N, K, *S] -> probabilities; without channel 0 if ``drop_background``."""
    if activation == "sigmoid":
        x = torch.sigmoid(x)
    elif activation == "softmax":
        x = torch.softmax(x, dim=1)
    return x[:, 1:] if drop_background else x


def generators(
    channels: Sequence[int], switches: Sequence[int | bool], metadata_size: int, preset: str
) -> nn.ModuleList:
    """One generator a FiLM layer (an empty module where the switch is 0), hidden weights shared."""
    made: list[nn.Module] = []
    first: FiLMGenerator | None = None
    for c, on in zip(channels, switches, strict=True):
        if not on:
            made.append(nn.Identity())
            continue
        generator = FiLMGenerator(metadata_size, c, preset=preset, shared=first)
        first = first or generator
        made.append(generator)
    return nn.ModuleList(made)


def check_film_layers(
    film_layers: Sequence[int | bool] | None, count: int, metadata_size: int
) -> list[bool]:
    """Switches of ``count`` FiLM layers; ValueError for a wrong number or FiLM without metadata."""
    if not isinstance(metadata_size, int) or metadata_size < 0:
        raise ValueError(f"metadata_size must be an integer >= 0, got {metadata_size!r}")
    if film_layers is None:
        return [metadata_size > 0] * count
    if len(film_layers) != count or any(f not in (0, 1) for f in film_layers):
        raise ValueError(f"film_layers must be {count} switches 0 or 1, got {list(film_layers)}")
    if any(film_layers) and metadata_size == 0:
        raise ValueError("film_layers switches FiLM on but metadata_size is 0")
    return [bool(f) for f in film_layers]


class Modulation:
    """γ and β of all FiLM layers for some metadata, to be used in place of the metadata.

    Attributes:
        film: (γ, β), each [N or 1, C], of every layer; (None, None) where FiLM is off.
        rows: N, the number of metadata rows.
    """

    def __init__(self, film: list[tuple[Tensor, Tensor] | tuple[None, None]], rows: int) -> None:
        self.film, self.rows = film, rows


class Conditioned(nn.Module):
    """The base of networks with FiLM layers: metadata in, (γ, β) of each layer out."""

    film: nn.ModuleList
    metadata_size: int

    def modulate(self, metadata: Metadata) -> Modulation:
        """γ and β for ``metadata``, computed once for all patches of a volume.

        They stay what they are when the generators' weights change; this is the only way to keep them.

        Args:
            metadata: [N, M], [1, M] or [M]; one row serves any batch size.

        Example:
            >>> import torch, fastfilm
            >>> net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=8, metadata_size=3).eval()
            >>> with torch.no_grad():
            ...     patient = net.modulate([0, 1, 0])
            ...     [net(patch, patient).shape for patch in torch.randn(2, 4, 1, 32, 32)]
            [torch.Size([4, 1, 32, 32]), torch.Size([4, 1, 32, 32])]
        """
        weight = next(p for p in self.parameters())
        rows = len(metadata) if getattr(metadata, "ndim", None) == 2 else 1
        if (
            isinstance(metadata, (list, tuple))
            and metadata
            and not isinstance(metadata[0], (int, float))
        ):
            rows = len(metadata)
        like = torch.empty(rows, dtype=weight.dtype, device=weight.device)
        return Modulation(self.modulation(metadata, like), rows)

    def modulation(
        self, metadata: Metadata | Modulation | None, image: Tensor
    ) -> list[tuple[Tensor, Tensor] | tuple[None, None]]:
        """(γ, β), each [N or 1, C], of every FiLM layer; (None, None) where it is switched off.

        Raises:
            TypeError: metadata missing. ValueError: metadata given to an unconditioned network, or of a wrong
            shape, or not finite.
        """
        active = next((g for g in self.film if isinstance(g, FiLMGenerator)), None)
        if isinstance(metadata, Modulation):
            if len(metadata.film) != len(self.film):
                raise ValueError(
                    f"metadata must come from this network's modulate(): {len(self.film)} layers,"
                    f" got {len(metadata.film)}"
                )
            if metadata.rows not in (1, image.shape[0]):
                raise ValueError(
                    f"metadata must have 1 or {image.shape[0]} rows, got {metadata.rows}"
                )
            return metadata.film
        if active is None:
            if metadata is not None:
                raise ValueError("metadata was given but the network has no FiLM layers")
            return [(None, None)] * len(self.film)
        dtype = active.last.weight.dtype
        rows = as_metadata(metadata, self.metadata_size, image.shape[0], image.device, dtype)
        return [g(rows) if isinstance(g, FiLMGenerator) else (None, None) for g in self.film]

    def check_image(self, image: Tensor, channels: int, dims: int) -> None:
        """TypeError/ValueError unless ``image`` is a float [N, channels, *S] with ``dims`` dimensions."""
        if not isinstance(image, Tensor):
            raise TypeError(f"image must be a torch.Tensor, got {type(image).__name__}")
        if not image.is_floating_point():
            raise TypeError(f"image must be floating point, got {image.dtype}")
        if image.dim() != dims + 2 or image.shape[1] != channels:
            shape = "[N, {}, {}]".format(channels, "H, W" if dims == 2 else "D, H, W")
            raise ValueError(f"image must be {shape}, got {tuple(image.shape)}")


class FiLMedUNet(Conditioned):
    """U-Net whose feature maps are modulated by metadata (Lemay et al. 2021, Fig. 1).

    Channels are f, 2f, … f·2^(depth-1) and stay at f·2^(depth-1) at the bottom. A level is two 3x3
    convolution blocks and FiLM; pooling is max 2; the decoder upsamples linearly (align_corners) to its
    skip's size and concatenates [up, skip]; FiLM may act on the logits too.

    Args:
        in_channels, out_channels: channels of image and output.
        spatial_dims: 2 or 3.
        depth: number of poolings, >= 1.
        base_filters: f.
        metadata_size: M values per sample; 0 builds a plain U-Net.
        film_layers: 2·depth + 2 switches: encoder levels, bottom, decoder levels from the deepest, logits.
            None switches all on if ``metadata_size`` > 0.
        norm: None, "batch", "instance", "group" (with ``num_groups``) or "layer".
        order: "conv-act-norm-film" (the paper's), "conv-norm-film-act" or "conv-norm-act-film".
        activation: see ``fastfilm.conv_norm_film``.
        dropout: channel dropout behind each convolution block (before FiLM).
        generator: "paper" or "identity", see ``FiLMGenerator``.
        final_activation: None (logits), "sigmoid" or "softmax".
        deep_supervision: in training return the logits of every decoder level, full size first.
        norm_affine: learn the norm's weight and bias; None means yes except for 3D instance norm with the
            paper's order, as in the paper's code.
        drop_background: leave out channel 0 after the final activation.
        deferred: hand maps on unwritten (raw map + pending affine) to pooling, upsampling, concatenation and
            the next convolution; False writes every block's output.

    Example:
        >>> import torch, fastfilm
        >>> net = fastfilm.FiLMedUNet(1, 1, depth=2, base_filters=8, metadata_size=3)
        >>> net(torch.randn(2, 1, 32, 32), [[1, 0, 0], [0, 0, 1]]).shape
        torch.Size([2, 1, 32, 32])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 2,
        depth: int = 4,
        base_filters: int = 64,
        metadata_size: int = 0,
        film_layers: Sequence[int | bool] | None = None,
        norm: str | None = "batch",
        order: str = "conv-act-norm-film",
        activation: str | None = "relu",
        dropout: float = 0.0,
        generator: str = "paper",
        final_activation: str | None = None,
        deep_supervision: bool = False,
        norm_affine: bool | None = None,
        num_groups: int | None = None,
        drop_background: bool = False,
        deferred: bool = True,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims!r}")
        for name, value in (
            ("in_channels", in_channels),
            ("out_channels", out_channels),
            ("depth", depth),
            ("base_filters", base_filters),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.spatial_dims, self.depth, self.base_filters = spatial_dims, depth, base_filters
        self.metadata_size, self.deferred = metadata_size, deferred
        self.film_layers = check_film_layers(film_layers, 2 * depth + 2, metadata_size)
        self.final_activation = spec.choice("final_activation", final_activation, FINAL_ACTIVATIONS)
        self.deep_supervision, self.drop_background = deep_supervision, drop_background
        if norm_affine is None:
            norm_affine = not (spatial_dims == 3 and norm == "instance" and order == spec.ORDERS[2])

        def double(ci: int, co: int) -> DoubleConv:
            return DoubleConv(
                spatial_dims,
                ci,
                co,
                norm=norm,
                affine=bool(norm_affine),
                num_groups=num_groups,
                activation=activation,
                order=order,
                dropout=dropout,
            )

        levels = [base_filters * 2**i for i in range(depth)]
        self.encoder = nn.ModuleList(
            double(ci, co) for ci, co in zip([in_channels, *levels[:-1]], levels, strict=True)
        )
        self.bottom = double(levels[-1], levels[-1])
        decoder, below = [], levels[-1]
        for i, skip in enumerate(reversed(levels)):
            out = levels[-1] if i == 0 else skip
            decoder.append((below + skip, out))
            below = out
        self.decoder = nn.ModuleList(double(ci, co) for ci, co in decoder)
        head = ConvNormFiLM2d if spatial_dims == 2 else ConvNormFiLM3d
        self.last = head(base_filters, out_channels, norm=None, activation=None)
        outputs = [co for _, co in decoder]
        channels = [*levels, levels[-1], *outputs, out_channels]
        self.film = generators(channels, self.film_layers, metadata_size, generator)
        self.heads = nn.ModuleList(
            head(co, out_channels, 1, norm=None, activation=None)
            for co in (reversed(outputs[:-1]) if deep_supervision else ())
        )
        self.upsampling = "bilinear" if spatial_dims == 2 else "trilinear"

    @subclasses.unwrapping
    def forward(
        self, image: Tensor, metadata: Metadata | Modulation | None = None
    ) -> Tensor | list[Tensor]:
        """Logits or probabilities [N, out_channels, *S] for ``image`` [N, in_channels, *S].

        Args:
            metadata: [N, M], [1, M] or [M]: nested lists, array or tensor; or what ``modulate`` returned.

        Raises:
            TypeError: integer image, missing metadata.
            ValueError: wrong shapes, an image too small for the depth, metadata that are not finite.
        """
        self.check_image(image, self.in_channels, self.spatial_dims)
        smallest = 2**self.depth
        if image.numel() > 0 and min(image.shape[2:]) < smallest:
            raise ValueError(
                f"image must be at least {smallest} in every dimension for depth {self.depth},"
                f" got {tuple(image.shape[2:])}"
            )
        film = self.modulation(metadata, image)
        lazy = self.deferred
        x: Map = image
        skips: list[Map] = []
        for i, block in enumerate(self.encoder):
            skip = block(x, *film[i], deferred=lazy)
            skips.append(skip)
            x = maps.max_pool(skip, 2)
        x = self.bottom(x, *film[self.depth], deferred=lazy)
        deep: list[Tensor] = []
        for i, block in enumerate(self.decoder):
            skip = skips.pop()
            up = maps.interpolate(
                x, size=tuple(skip.shape[2:]), mode=self.upsampling, align_corners=True
            )
            full = not skips
            x = block(maps.join([up, skip]), *film[self.depth + 1 + i], deferred=lazy)
            if self.training and self.deep_supervision and not full:
                deep.append(self.heads[len(self.heads) - 1 - i](x))
        logits = self.last(x, *film[-1])
        if self.training and self.deep_supervision:
            return [logits, *reversed(deep)]
        return final(logits, self.final_activation, self.drop_background)

    @classmethod
    def from_ivadomed(
        cls,
        source: Mapping[str, Tensor] | nn.Module,
        *,
        final_activation: str | None = ivadomed.KEPT,
        dropout: float | str = ivadomed.KEPT,
        momentum: float | str | None = ivadomed.KEPT,
        eps: float | str = ivadomed.KEPT,
    ) -> FiLMedUNet:
        """The network of an ivadomed ``FiLMedUnet`` or ``Unet``, or of its state_dict, bit for bit.

        Dimensions, depth, filters, FiLM layers and channels are read from the state_dict. Where its FiLM
        generators' hidden weights differ, the first layer's are taken, as ivadomed's forward does. With more
        than one output channel, channel 0 is left out of the output as there.

        Args:
            source: the network, whose hyper-parameters are kept; or its state_dict, which does not hold them.
            final_activation: "source" keeps the network's; "sigmoid" for a state_dict.
            dropout: "source" keeps the network's; 0 for a state_dict.
            momentum: of the running statistics; "source" keeps the network's, and is ivadomed's default, 0.1, for
                a state_dict: give it where training goes on.
            eps: of the norms; "source" keeps the network's; 1e-5, as always in ivadomed, for a state_dict.

        Raises:
            ValueError: keys, shapes or hyper-parameters that are not such a network's.
        """
        state_dict = source.state_dict() if isinstance(source, nn.Module) else source
        structure = ivadomed.read_unet(state_dict)
        settings = ivadomed.read_settings(
            source,
            final_activation=final_activation,
            dropout=dropout,
            momentum=momentum,
            eps=eps,
        )
        model = cls(
            **structure,
            dropout=settings.dropout,
            final_activation=settings.final_activation,
            drop_background=structure["out_channels"] > 1,
        )
        settings.apply(model)
        ivadomed.load(model, state_dict, ivadomed.unet_keys(model))
        return model

    def to_ivadomed(self) -> dict[str, Tensor]:
        """The state_dict under ivadomed's names (values are copies); inverse of ``from_ivadomed``.

        It holds no hyper-parameters: give the receiving network this one's momentum and dropout.
        """
        return ivadomed.save(self, ivadomed.unet_keys(self))
