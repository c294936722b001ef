"""Ten layers that decide which route a network takes, as data: sizes, norms and maps to concatenate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .roofline import Layer

NORMS = {2: "batch", 3: "instance"}
"""Spatial dimensions -> the norm of the FiLMed U-Net whose layers these are."""


@dataclass(frozen=True)
class Block:
    """A layer with a norm (statistics of the batch), an activation and a FiLM around it."""

    layer: Layer
    batch: int
    norm: str = "batch"
    act: str = "relu"
    order: str = "conv-act-norm-film"


@dataclass(frozen=True)
class Subject:
    """A layer with its network's norm and order; ``resized`` of its channels are a map of half the size."""

    block: Block
    resized: int = 0

    @property
    def name(self) -> str:
        """``64→64 3² @ 256×256 b16``; a concatenation ``(128⇑, 64)→64 …``."""
        layer = self.block.layer
        label, cin = layer.label, layer.cin
        if self.resized:
            label = f"({self.resized}⇑, {cin - self.resized})" + label.removeprefix(str(cin))
        return f"{label} b{self.block.batch}"

    @property
    def dims(self) -> int:
        """Spatial dimensions."""
        return len(self.block.layer.size)

    def sized(self, side: int, batch: int = 16) -> Subject:
        """The same on a map of at most ``side`` places a dimension."""
        size = tuple(min(s, side) for s in self.block.layer.size)
        layer = replace(self.block.layer, size=size)
        return replace(
            self, block=replace(self.block, layer=layer, batch=min(self.block.batch, batch))
        )

    def tiny(self) -> Subject:
        """The same with few channels on a small map, for a run without a GPU."""
        small = self.sized(8, batch=1)
        layer, resized = small.block.layer, _few(self.resized) if self.resized else 0
        cin = resized + _few(layer.cin - self.resized)
        layer = replace(layer, cin=cin, cout=_few(layer.cout))
        return Subject(replace(small.block, layer=layer), resized)


def _few(channels: int) -> int:
    return 1 if channels == 1 else 8 if channels <= 64 else 16


def _subject(
    cin: int, cout: int, size: tuple[int, ...], batch: int, resized: int = 0, image: bool = False
) -> Subject:
    layer = Layer(cin, cout, size, input_grad=not image)
    return Subject(Block(layer, batch, norm=NORMS[len(size)]), resized)


SUBJECTS = (
    _subject(64, 64, (256, 256), 16),
    _subject(192, 64, (320, 256), 16, resized=128),
    _subject(32, 32, (128, 128, 128), 2),
    _subject(96, 32, (128, 128, 128), 2, resized=64),
    _subject(128, 128, (128, 128), 16),
    _subject(64, 64, (64, 64, 64), 2),
    _subject(1, 64, (256, 256), 16, image=True),
    _subject(64, 1, (256, 256), 16),
    _subject(256, 256, (32, 32), 16),
    _subject(256, 256, (8, 16, 16), 2),
)
"""The most telling ones first. The image of 1→64 has nothing pending and needs no gradient."""
