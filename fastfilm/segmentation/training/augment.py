"""Random changes of training samples: MONAI's transforms, seeded per sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from monai import transforms as mt
from torch import Tensor

from ..config.sections import Augmentation
from ..images.preprocessing import AXES

IMAGE, MASK = "image", "mask"


class Augment:
    """Changes image [C, *S] and masks [K, *S] of one sample.

    Args:
        config: probabilities and sizes.
        spatial_dims: 2 or 3.
        slice_axis: which of right, anterior, superior is across slices (D).
        flat: slices are so thick that 3D patches are rotated and deformed in their plane only.
    """

    def __init__(
        self, config: Augmentation, *, spatial_dims: int, slice_axis: int, flat: bool = False
    ) -> None:
        order = [slice_axis, *(a for a in range(3) if a != slice_axis)][3 - spatial_dims :]
        both, c = [IMAGE, MASK], config
        steps: list[Callable[[Any], Any]] = []
        for plane in c.flip:
            axis = AXES.index(plane)
            if axis in order:
                steps.append(mt.RandFlipd(both, prob=0.5, spatial_axis=order.index(axis)))
        angle = math.radians(c.rotation)
        in_plane = spatial_dims == 3 and flat
        rotate: Any = (angle, 0.0, 0.0) if in_plane else (angle,) * (1 if spatial_dims == 2 else 3)
        scale = (0.0 if in_plane else c.scaling, *(c.scaling,) * (spatial_dims - 1))
        mode: dict[str, Any] = {"mode": ("bilinear", "nearest"), "padding_mode": "border"}
        if c.affine:
            steps.append(
                mt.RandAffined(both, prob=c.affine, rotate_range=rotate, scale_range=scale, **mode)
            )
        if c.elastic and spatial_dims == 2:
            steps.append(mt.Rand2DElasticd(both, (20, 20), (1, 2), prob=c.elastic, **mode))
        elif c.elastic:
            steps.append(mt.Rand3DElasticd(both, (5, 7), (50, 150), prob=c.elastic, **mode))
        if c.low_resolution:
            up: Any = "bilinear" if spatial_dims == 2 else "trilinear"
            steps.append(
                mt.RandSimulateLowResolutiond(
                    IMAGE, prob=c.low_resolution, upsample_mode=up, zoom_range=(0.5, 1.0)
                )
            )
        if c.noise:
            steps.append(mt.RandGaussianNoised(IMAGE, prob=c.noise, std=0.1))
        if c.blur:
            widths: Any = [(0.5, 1.0)] * spatial_dims
            names = ("sigma_x", "sigma_y", "sigma_z")[:spatial_dims]
            steps.append(
                mt.RandGaussianSmoothd(IMAGE, prob=c.blur, **dict(zip(names, widths, strict=True)))
            )
        if c.brightness:
            steps.append(mt.RandScaleIntensityd(IMAGE, factors=0.25, prob=c.brightness))
            steps.append(mt.RandShiftIntensityd(IMAGE, offsets=0.1, prob=c.brightness))
        if c.gamma:
            steps.append(
                mt.RandAdjustContrastd(IMAGE, prob=c.gamma, gamma=(0.7, 1.5), retain_stats=True)
            )
        self.compose = mt.Compose(steps)
        self.drop_channel = c.drop_channel

    def __call__(self, image: Tensor, masks: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The changed image (float32) and masks (uint8); the same for the same ``seed``."""
        self.compose.set_random_state(seed)
        out = self.compose({IMAGE: image, MASK: masks.float()})
        image, masks = plain(out[IMAGE]), plain(out[MASK]).round().to(torch.uint8)
        if self.drop_channel and len(image) > 1:
            rng = np.random.default_rng(seed)
            dropped = rng.random(len(image)) < self.drop_channel
            if not dropped.all():
                image = image * torch.from_numpy(~dropped).reshape(-1, *(1,) * (image.dim() - 1))
        return image.float(), masks


def plain(t: Any) -> Tensor:
    """A tensor without MONAI's metadata."""
    t = t.as_tensor() if hasattr(t, "as_tensor") else torch.as_tensor(t)
    assert isinstance(t, Tensor)
    return t


def is_flat(spacings: Sequence[Sequence[float]]) -> bool:
    """Whether slices are more than three times as thick as their pixels (in the median)."""
    median = np.median(np.asarray(spacings), 0)
    return bool(median[0] > 3 * median[1:].min())
