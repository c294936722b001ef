"""From voxels as they are in a file to the network's input, and from its output back to the file's grid.

Every array that a network sees is [C, D, H, W] in one orientation: right, anterior, superior, with the axis across
slices (D) first. A 2D network takes the D slices as a batch of [C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ..config.sections import Section
from ..support import memory
from ..support.errors import UserError

AXES = ("sagittal", "coronal", "axial")
"""The plane of a slice across the first (right), second (anterior), third (superior) axis."""

Volume = NDArray[Any]
Millimetres = Annotated[float, Field(gt=0)]


class Normalisation(Section):
    """How the intensities of one channel are normalised.

    Attributes:
        kind: zscore (mean 0, deviation 1), percentile (clipped to the 0.5 and 99.5 percentiles first), minmax (to
            0..1), ct (clipped to low..high, then minus mean, over std, all four constants), none.
        nonzero: statistics over voxels that are not 0, and those that are stay 0.
        low, high, mean, std: the constants of ct.
    """

    kind: Literal["zscore", "percentile", "minmax", "ct", "none"] = "zscore"
    nonzero: bool = False
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _range(self) -> Normalisation:
        if self.low > self.high:
            raise ValueError(f"low must not be above high, got {self.low} and {self.high}")
        return self

    def __call__(self, image: Volume) -> NDArray[np.float32]:
        """The normalised channel [D, H, W], float32. A constant image becomes zeros."""
        x = image.astype(np.float32)
        if self.kind == "none" or x.size == 0:
            return x
        if self.kind == "ct":
            return (np.clip(x, self.low, self.high) - np.float32(self.mean)) / np.float32(self.std)
        inside = x != 0 if self.nonzero else np.ones(x.shape, bool)
        values = x[inside]
        if values.size == 0:
            return x
        if self.kind == "percentile":
            low, high = np.percentile(values, (0.5, 99.5))
            x, values = np.clip(x, low, high), np.clip(values, low, high)
        if self.kind == "minmax":
            shift, scale = float(values.min()), float(values.max() - values.min())
        else:
            shift = float(values.mean(dtype=np.float64))
            scale = float(values.std(dtype=np.float64))
        # differences below the resolution of float32 are no contrast
        flat = scale <= 1e-6 * max(abs(shift), 1e-30)
        out = np.zeros_like(x) if flat else ((x - shift) / scale).astype(np.float32)
        return np.where(inside, out, np.float32(0))


@dataclass(frozen=True)
class Geometry:
    """What leads from a case's file grid to the network's grid and back.

    Attributes:
        shape: of the file, (X, Y, Z).
        axes: file axis that became D, H, W.
        flips: which of D, H, W run against the file's axis.
        crop: (start, stop) of what was kept along D, H, W.
        grid: (D, H, W) after resampling.
        spacing: mm along D, H, W after resampling.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    flips: tuple[bool, ...]
    crop: tuple[tuple[int, int], ...]
    grid: tuple[int, ...]
    spacing: tuple[float, ...]

    @property
    def cropped(self) -> tuple[int, ...]:
        """(D, H, W) of the crop, before resampling."""
        return tuple(stop - start for start, stop in self.crop)

    def to_network(self, array: Volume) -> Volume:
        """[X, Y, Z] -> the crop [D, H, W], not resampled."""
        turned = np.flip(array.transpose(self.axes), tuple(np.flatnonzero(self.flips)))
        return turned[tuple(slice(*c) for c in self.crop)]

    def from_network(self, array: Volume, outside: float = 0) -> Volume:
        """[K, D, H, W] of the network's grid -> [K, X, Y, Z] of the file.

        Resampled linearly (nothing happens to values where no resampling was done); what was cropped off gets
        the value ``outside``.
        """
        if array.shape[1:] != self.grid:
            raise ValueError(f"array must be [K, *{self.grid}], got {array.shape}")
        array = resample(array, self.cropped)
        turned = tuple(self.shape[a] for a in self.axes)
        full = np.full((len(array), *turned), outside, array.dtype)
        d, h, w = (slice(*c) for c in self.crop)
        full[:, d, h, w] = array
        full = np.flip(full, tuple(1 + np.flatnonzero(self.flips)))
        return np.ascontiguousarray(full.transpose(0, *(1 + i for i in np.argsort(self.axes))))


@dataclass(frozen=True)
class Preprocessed:
    """A case for the network: ``image`` float32 [C, D, H, W], and the way back."""

    image: NDArray[np.float32]
    geometry: Geometry


class Preprocessing(Section):
    """How a case's images become the network's input; kept in the plan and in the model folder.

    Attributes:
        slice_axis: 0, 1, 2: right, anterior or superior is the axis across slices.
        spacing: target in mm along right, anterior, superior; None where it stays as it is.
        channels: one normalisation a channel.
        crop: cut borders off in which every channel is 0.
    """

    slice_axis: Literal[0, 1, 2] = 2
    spacing: tuple[Millimetres | None, Millimetres | None, Millimetres | None] = (None, None, None)
    channels: list[Normalisation] = Field(default_factory=lambda: [Normalisation()])
    crop: bool = True

    def __call__(
        self, images: Sequence[Volume | None], affine: NDArray[np.floating]
    ) -> Preprocessed:
        """The case's channels in the network's orientation, cropped, resampled, normalised.

        Args:
            images: one [X, Y, Z] a channel, all on one grid; None for a channel that is not there (zeros).
            affine: [4, 4], voxel -> mm, of that grid.

        Raises:
            UserError: wrong number of channels, none there, different shapes, not 3D, NaN or infinity, more voxels
                after resampling than the memory holds.
        """
        if len(images) != len(self.channels):
            raise UserError(
                f"the model takes {len(self.channels)} image channels, got {len(images)}"
            )
        there = [np.asarray(i) for i in images if i is not None]
        if not there:
            raise UserError("none of the case's image channels is there")
        for i in there:
            if i.ndim != 3 or i.shape != there[0].shape or 0 in i.shape:
                raise UserError(
                    f"image channels must be 3D, not empty and of one shape, got {[x.shape for x in there]}"
                )
            if i.dtype.kind == "f" and not np.isfinite(i).all():
                raise UserError("the image has values that are NaN or infinite")
        geometry = self.geometry(there, affine)
        voxels = int(np.prod([int(n) for n in geometry.grid], dtype=object))
        if 4 * voxels * (len(images) + 2) > memory.available():
            raise UserError(
                f"{'x'.join(map(str, there[0].shape))} voxels become {'x'.join(map(str, geometry.grid))} at the"
                f" network's spacing and need {memory.gib(4 * voxels * (len(images) + 2))} of memory;"
                f" {memory.gib(memory.available())} are free (is the unit of length right?)"
            )
        out = np.zeros((len(images), *geometry.grid), np.float32)
        for c, image in enumerate(images):
            if image is not None:
                turned = geometry.to_network(np.asarray(image)).astype(np.float32)
                out[c] = self.channels[c](resample(turned[None], geometry.grid)[0])
        return Preprocessed(out, geometry)

    def masks(self, masks: Volume, geometry: Geometry) -> NDArray[np.uint8]:
        """Binary masks [K, X, Y, Z] on the network's grid [K, D, H, W]: 1 where the resampled one is >= 1/2."""
        turned = np.stack([geometry.to_network(np.asarray(m) != 0) for m in masks])
        if turned.shape[1:] == geometry.grid:
            return turned.astype(np.uint8)
        return (resample(turned.astype(np.float32), geometry.grid) >= 0.5).astype(np.uint8)

    def geometry(self, images: Sequence[Volume], affine: NDArray[np.floating]) -> Geometry:
        """The way from ``images``' grid to the network's."""
        affine = np.asarray(affine, np.float64)
        orientation = nib.orientations.io_orientation(affine)
        if not np.isfinite(orientation).all():
            raise UserError(f"the image's affine is not usable: {affine.tolist()}")
        sizes = np.sqrt((affine[:3, :3] ** 2).sum(0))
        order = [self.slice_axis, *(a for a in range(3) if a != self.slice_axis)]
        axes = [int(np.flatnonzero(orientation[:, 0] == a)[0]) for a in order]
        flips = tuple(bool(orientation[a, 1] < 0) for a in axes)
        shape = images[0].shape
        box = [(0, shape[a]) for a in axes]
        geometry = Geometry(
            shape,
            tuple(axes),
            flips,
            tuple(box),
            tuple(shape[a] for a in axes),
            tuple(float(sizes[a]) for a in axes),
        )
        if self.crop:
            occupied = np.zeros(geometry.grid, bool)
            for image in images:
                occupied |= geometry.to_network(image) != 0
            box = bounding_box(occupied)
        target = [self.spacing[a] for a in order]
        spacing, grid = [], []
        for (start, stop), now, wanted in zip(box, geometry.spacing, target, strict=True):
            n = stop - start
            if wanted is not None and abs(wanted - now) > 1e-3 * wanted:
                new = max(1, round(n * now / wanted))
                # the extent is kept exactly: the spacing follows from the number of voxels
                now, n = now * n / new, new
            spacing.append(now)
            grid.append(n)
        return replace(geometry, crop=tuple(box), grid=tuple(grid), spacing=tuple(spacing))


def bounding_box(occupied: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) per axis around what is True; everything where nothing is."""
    box = []
    for axis in range(occupied.ndim):
        others = tuple(a for a in range(occupied.ndim) if a != axis)
        hit = np.flatnonzero(occupied.any(others))
        box.append((int(hit[0]), int(hit[-1]) + 1) if hit.size else (0, occupied.shape[axis]))
    return box


def resample(array: Volume, grid: Sequence[int]) -> Volume:
    """[K, D, H, W] linearly on ``grid`` (voxel centres of the same extent); unchanged if it is that grid."""
    if array.shape[1:] == tuple(grid):
        return array
    t = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]
    out = torch.nn.functional.interpolate(
        t, size=tuple(grid), mode="trilinear", align_corners=False
    )
    return np.asarray(out[0].numpy())
