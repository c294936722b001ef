"""The volume that patches are cut from: a NIfTI file of the user's, or the built-in phantom."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class InputError(Exception):
    """Something the user gave cannot be used; its text is one readable line."""


def load(path: str) -> NDArray[np.float32]:
    """Voxels [X, Y, Z] of a NIfTI file.

    Raises:
        InputError: the file is missing, unreadable, not 3D, constant, or not finite.
    """
    try:
        import nibabel
    except ImportError:
        raise InputError("--volume needs the package nibabel (pip install nibabel)") from None
    if not Path(path).is_file():
        raise InputError(f"--volume: no such file: {path}")
    try:
        image = nibabel.load(path)
        voxels = np.asarray(image.get_fdata(dtype=np.float32))  # type: ignore[attr-defined]
    except Exception as error:  # nibabel raises half a dozen kinds for a broken file
        text = str(error).strip().splitlines()
        raise InputError(f"--volume: cannot read {path}: {text[0] if text else error!r}") from None
    return check(voxels, path)


def check(voxels: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """``voxels`` if patches can be cut from them, else InputError."""
    if voxels.ndim != 3:
        raise InputError(f"--volume must be a 3D image, got shape {voxels.shape} in {name}")
    if min(voxels.shape) < 4:
        raise InputError(f"--volume must have at least 4 voxels an axis, got {voxels.shape}")
    if not np.isfinite(voxels).all():
        raise InputError(f"--volume must hold finite values, found NaN or infinity in {name}")
    if float(voxels.std()) == 0.0:
        raise InputError(
            f"--volume must not be constant, got {voxels.flat[0]} everywhere in {name}"
        )
    return voxels


def phantom(shape: tuple[int, int, int] = (128, 128, 32)) -> NDArray[np.float32]:
    """Voxels of the built-in phantom; noise where nibabel, which holds its images, is not installed."""
    from fastfilm.phantom import make_phantom

    try:
        image, _ = make_phantom(None, shape=shape, seed=0)
    except ImportError:
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return np.asarray(image.get_fdata(dtype=np.float32))


def phantoms_source() -> str:
    """What ``phantom`` gives here: "phantom" or "noise"."""
    return "noise" if importlib.util.find_spec("nibabel") is None else "phantom"


def z_score(voxels: NDArray[np.float32]) -> Tensor:
    """Zero mean, unit variance, float32 [X, Y, Z]."""
    t = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
    return (t - t.mean()) / t.std()


def slices(voxels: NDArray[np.float32], count: int, size: tuple[int, int]) -> Tensor:
    """The ``count`` central axial slices as a batch [count, 1, H, W].

    Larger slices are cropped to ``size`` around their centre, smaller ones resampled up to it; a
    volume with fewer slices gives some of them twice.
    """
    t = z_score(voxels)
    depth = t.shape[2]
    first = max((depth - count) // 2, 0)
    picked = t[:, :, [(first + i) % depth for i in range(count)]]
    return _fit(picked.permute(2, 0, 1).unsqueeze(1), size, "bilinear")


def patches(voxels: NDArray[np.float32], count: int, size: tuple[int, int, int]) -> Tensor:
    """``count`` central 3D crops [count, 1, X, Y, Z], each a mirror image of the one before."""
    patch = _fit(z_score(voxels)[None, None], size, "trilinear")
    return torch.cat([patch.flip(2) if i % 2 else patch for i in range(count)])


def _fit(t: Tensor, size: tuple[int, ...], mode: str) -> Tensor:
    for axis, wanted in enumerate(size, start=2):
        if t.shape[axis] > wanted:
            t = t.narrow(axis, (t.shape[axis] - wanted) // 2, wanted)
    if tuple(t.shape[2:]) != tuple(size):
        t = F.interpolate(t, size=size, mode=mode, align_corners=False)
    return t.contiguous()
