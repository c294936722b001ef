"""Preprocessing: from a file's voxels to the network's input, and from its output back to the file's grid.

The network's arrays are [C, D, H, W] in one orientation: right, anterior, superior, with the axis across slices
(D) first. A 2D network takes the D slices as a batch of [C, H, W].
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
from scipy import ndimage

from ..config.sections import Section
from ..support import memory
from ..support.errors import UserError

AXES = ("sagittal", "coronal", "axial")
"""Names of the planes across the first (right), second (anterior) and third (superior) axis."""

Volume = NDArray[Any]
Millimetres = Annotated[float, Field(gt=0)]


class Normalisation(Section):
    """The normalisation of one channel's intensities.

    Attributes:
        kind: zscore (mean 0, deviation 1), percentile (clipped to the 0.5 and 99.5 percentiles first), minmax (to
            0..1), ct (clipped to low..high, then minus mean, divided by std; all four are constants), none.
        nonzero: whether statistics are those of voxels other than 0, and voxels of 0 stay 0.
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
        """The normalised channel [D, H, W], float32; a constant image becomes zeros."""
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
        # differences below the resolution of float32 count as none
        flat = scale <= 1e-6 * max(abs(shift), 1e-30)
        out = np.zeros_like(x) if flat else ((x - shift) / scale).astype(np.float32)
        return np.where(inside, out, np.float32(0))


@dataclass(frozen=True)
class Geometry:
    """The transformation from a case's file grid to the network's grid, and back.

    Attributes:
        shape: shape of the file, (X, Y, Z).
        axes: the file's axes that became D, H and W.
        flips: for D, H and W, whether the axis runs against the file's.
        crop: (start, stop) of the kept region along D, H and W.
        grid: (D, H, W) after resampling.
        spacing: voxel size in mm along D, H and W after resampling.
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
        """The crop [D, H, W] of a file's array [X, Y, Z], not resampled."""
        turned = np.flip(array.transpose(self.axes), tuple(np.flatnonzero(self.flips)))
        return turned[tuple(slice(*c) for c in self.crop)]

    def from_network(self, array: Volume, outside: float = 0) -> Volume:
        """An array [K, D, H, W] on the network's grid, resampled linearly to [K, X, Y, Z] on the file's.

        Args:
            outside: value of the voxels that were cropped off.

        Raises:
            ValueError: ``array`` is not on the network's grid.
        """
        if array.shape[1:] != self.grid:
            raise ValueError(f"array must be [K, *{self.grid}], got {array.shape}")
        array = resample(array, self.cropped)
        turned = tuple(self.shape[a] for a in self.axes)
        full = np.full((len(array), *turned), outside, array.dtype)
        d, h, w = (slice(*c) for c in self.crop)
        full[:, d, h, w] = array
        return np.ascontiguousarray(self.to_file(full))

    def to_file(self, array: Volume) -> Volume:
        """An array [K, D, H, W] of the file's full extent with the file's axes, [K, X, Y, Z]; a view."""
        array = np.flip(array, tuple(1 + np.flatnonzero(self.flips)))
        return array.transpose(0, *(1 + i for i in np.argsort(self.axes)))


@dataclass(frozen=True)
class Preprocessed:
    """A case for the network: ``image`` [C, D, H, W], float32, and the transformation back to the file."""

    image: NDArray[np.float32]
    geometry: Geometry


class Preprocessing(Section):
    """The settings that turn a case's images into the network's input; stored in the plan and the model folder.

    Attributes:
        slice_axis: axis across slices: 0, 1 or 2 for right, anterior or superior.
        spacing: voxel size in mm along right, anterior, superior; None: unchanged.
        channels: a normalisation for each channel.
        crop: whether borders in which every channel is 0 are cut off.
    """

    slice_axis: Literal[0, 1, 2] = 2
    spacing: tuple[Millimetres | None, Millimetres | None, Millimetres | None] = (None, None, None)
    channels: list[Normalisation] = Field(default_factory=lambda: [Normalisation()])
    crop: bool = True

    def __call__(
        self, images: Sequence[Volume | None], affine: NDArray[np.floating]
    ) -> Preprocessed:
        """The case's channels in the network's orientation, cropped, resampled and normalised.

        Args:
            images: [X, Y, Z] for each channel, all on one grid; None for a missing channel, which becomes zeros.
            affine: [4, 4], voxel -> mm, of that grid.

        Raises:
            UserError: the number of channels is wrong, all are missing, shapes differ or are not 3D, values are
                NaN or infinite, or the resampled case does not fit into memory.
        """
        if len(images) != len(self.channels):
            raise UserError(
                f"the model takes {len(self.channels)} image channels, got {len(images)}"
            )
        there = [np.asarray(i) for i in images if i is not None]
        if not there:
            raise UserError("all image channels of the case are missing")
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
        """Binary masks [K, X, Y, Z] on the network's grid [K, D, H, W], uint8: resampled, 1 from 1/2 on."""
        turned = np.stack([geometry.to_network(np.asarray(m) != 0) for m in masks])
        if turned.shape[1:] == geometry.grid:
            return turned.astype(np.uint8)
        return (resample(turned.astype(np.float32), geometry.grid) >= 0.5).astype(np.uint8)

    def geometry(self, images: Sequence[Volume], affine: NDArray[np.floating]) -> Geometry:
        """The transformation from the grid of ``images`` to the network's.

        Raises:
            UserError: the affine has no orientation.
        """
        affine = np.asarray(affine, np.float64)
        orientation = nib.orientations.io_orientation(affine)
        if not np.isfinite(orientation).all():
            raise UserError(f"the image's affine is not usable: {affine.tolist()}")
        sizes = nib.affines.voxel_sizes(affine)
        order = [self.slice_axis, *(a for a in range(3) if a != self.slice_axis)]
        axes = [int(np.flatnonzero(orientation[:, 0] == a)[0]) for a in order]
        flips = tuple(bool(orientation[a, 1] < 0) for a in axes)
        shape = images[0].shape
        grid = tuple(shape[a] for a in axes)
        box = [(0, n) for n in grid]
        spacing = tuple(float(sizes[a]) for a in axes)
        geometry = Geometry(shape, tuple(axes), flips, tuple(box), grid, spacing)
        if self.crop:
            occupied = np.zeros(grid, bool)
            for image in images:
                occupied |= geometry.to_network(image) != 0
            box = bounding_box(occupied)
        resampled = []
        for (start, stop), now, a in zip(box, spacing, order, strict=True):
            n, wanted = stop - start, self.spacing[a]
            if wanted is not None and abs(wanted - now) > 1e-3 * wanted:
                new = max(1, round(n * now / wanted))
                # the extent is kept exactly: the spacing follows from the number of voxels
                now, n = now * n / new, new
            resampled.append((n, now))
        grid, spacing = zip(*resampled, strict=True)
        return replace(geometry, crop=tuple(box), grid=grid, spacing=spacing)


def bounding_box(occupied: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(start, stop) along each axis around the voxels that are True; the whole array if none is."""
    if not occupied.any():
        return [(0, n) for n in occupied.shape]
    (found,) = ndimage.find_objects(occupied.astype(np.uint8))
    return [(s.start, s.stop) for s in found]


def resample(array: Volume, grid: Sequence[int]) -> Volume:
    """An array [K, D, H, W] resampled linearly to ``grid`` over the same extent; unchanged if it has that grid."""
    if array.shape[1:] == tuple(grid):
        return array
    t = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]
    out = torch.nn.functional.interpolate(
        t, size=tuple(grid), mode="trilinear", align_corners=False
    )
    return np.asarray(out[0].numpy())
