"""A head with a lesion, made from formulas: something to run, test and plot on without any data.

It is a phantom, not a simulation of a scanner or of a disease. What it shares with real data is the
structure of the problem: three tumour types are made of the same three parts, and which parts are
the target depends on the type, so that the metadata carries what the image alone may not.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Image

Field = NDArray[np.float32]
Grid = tuple[Field, Field, Field]

SMALLEST_AXIS = 8
AIR, SKULL, SCALP, CSF, GREY, WHITE = 0.0, 50.0, 560.0, 90.0, 500.0, 400.0
NOISE = 14.0
BIAS = 0.12


@dataclass(frozen=True)
class Lesion:
    """How one tumour type looks. Lengths in half fields of view, intensities as the tissues' above.

    Attributes:
        centre: (x, y, z) in the right half of the head; x is mirrored for every other draw.
        radius: of the whole lesion without its oedema.
        core, cavity: intensity of the solid part and of the fluid in it.
        cavity_radius: of the fluid part, as a fraction of ``radius``.
        cavity_shift: its distance from the centre, as a fraction of ``radius``.
        rim: change of intensity in a thin shell around the lesion.
        texture: amplitude of the mottling of the core.
        ragged: how far the boundary wanders, as a fraction of ``radius``.
        oedema: extent of the bright surroundings, as a fraction of ``radius``.
        target: the parts that the mask marks.
    """

    centre: tuple[float, float, float]
    radius: float
    core: float
    cavity: float
    cavity_radius: float
    cavity_shift: float
    rim: float
    texture: float
    ragged: float
    oedema: float
    target: tuple[str, ...]


LESIONS = {
    "astrocytoma": Lesion(
        centre=(0.33, 0.22, 0.12),
        radius=0.17,
        core=650.0,
        cavity=160.0,
        cavity_radius=0.30,
        cavity_shift=0.2,
        rim=0.0,
        texture=70.0,
        ragged=0.35,
        oedema=0.9,
        target=("core", "cavity", "oedema"),
    ),
    "ependymoma": Lesion(
        centre=(0.17, -0.36, 0.10),
        radius=0.15,
        core=720.0,
        cavity=130.0,
        cavity_radius=0.40,
        cavity_shift=0.0,
        rim=-260.0,
        texture=20.0,
        ragged=0.06,
        oedema=0.35,
        target=("core", "cavity"),
    ),
    "hemangioblastoma": Lesion(
        centre=(0.25, -0.47, -0.18),
        radius=0.18,
        core=840.0,
        cavity=110.0,
        cavity_radius=0.78,
        cavity_shift=0.30,
        rim=60.0,
        texture=15.0,
        ragged=0.08,
        oedema=0.45,
        target=("core",),
    ),
}


def make_phantom(
    path: str | os.PathLike[str] | None = None,
    *,
    shape: Sequence[int] = (128, 128, 64),
    tumour_type: str = "astrocytoma",
    look: str | None = None,
    seed: int = 0,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Nifti1Image, Nifti1Image]:
    """A brain-like volume with a lesion, and the mask of the target.

    The contrast is that of FLAIR: dark fluid, grey matter brighter than white, bright oedema. The
    head fills the field of view whatever ``shape`` is; ``spacing`` only enters the affine. The same
    seed gives the same anatomy, noise and bias field for every tumour type.

    - astrocytoma: white matter of one side; mottled, ragged, small cavity, no rim, wide oedema. Target: core,
      cavity and oedema.
    - ependymoma: beside a lateral ventricle; bright, round, central cavity, dark rim, little oedema. Target: core
      and cavity.
    - hemangioblastoma: low, at the back; large dark cyst, bright nodule. Target: the core, which is the nodule.

    The mask marks the target. The figures are in ``LESIONS``.

    Args:
        path: where to write the image (``.nii`` or ``.nii.gz``); the mask goes beside it as
            ``NAME_mask.nii.gz``. None writes nothing.
        shape: voxels (X, Y, Z) = (right, anterior, superior), each at least 8.
        tumour_type: one of these three.
        look: the type whose place and look the lesion has, while ``tumour_type`` decides which parts of it are the
            target; None is ``tumour_type``. With a look drawn apart from the type, only the metadata tell it.
        seed: a non-negative integer; the result is a function of it and of the other arguments.
        spacing: voxel size in mm.

    Returns:
        Image (float32) and mask (uint8, 0 or 1), nibabel NIfTI images in RAS orientation.

    Raises:
        ValueError: an argument that does not fit; the message names it.
        ImportError: nibabel is not installed.

    Example:
        >>> image, mask = make_phantom(shape=(32, 32, 16), tumour_type="ependymoma")
        >>> image.shape, int(mask.get_fdata().max())
        ((32, 32, 16), 1)
    """
    size = _check_shape(shape)
    mm = _check_spacing(spacing)
    if tumour_type not in LESIONS:
        raise ValueError(f"tumour_type must be one of {', '.join(LESIONS)}, got {tumour_type!r}")
    look = tumour_type if look is None else look
    if look not in LESIONS:
        raise ValueError(f"look must be one of {', '.join(LESIONS)}, got {look!r}")
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    files = None if path is None else _file_names(path)

    from nibabel.nifti1 import Nifti1Image

    lesion = replace(LESIONS[look], target=LESIONS[tumour_type].target)
    voxels, target = _draw(size, lesion, int(seed))
    affine = np.diag([*mm, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(size, mm, strict=True)]
    image, mask = Nifti1Image(voxels, affine), Nifti1Image(target, affine)
    for nifti in (image, mask):
        nifti.header.set_xyzt_units("mm")
    if files is not None:
        image.to_filename(files[0])
        mask.to_filename(files[1])
    return image, mask


def _check_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    try:
        size = tuple(operator.index(n) for n in shape)
    except TypeError:
        size = ()
    if len(size) != 3 or min(size) < SMALLEST_AXIS:
        raise ValueError(f"shape must be three integers of at least {SMALLEST_AXIS}, got {shape!r}")
    return size[0], size[1], size[2]


def _check_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    try:
        mm = tuple(float(s) for s in spacing)
    except (TypeError, ValueError):
        mm = ()
    if len(mm) != 3 or not all(np.isfinite(s) and s > 0 for s in mm):
        raise ValueError(f"spacing must be three positive numbers (mm), got {spacing!r}")
    return mm


def _file_names(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    image = Path(path)
    for suffix in (".nii.gz", ".nii"):
        if image.name.endswith(suffix) and image.name != suffix:
            stem = image.name.removesuffix(suffix)
            return image, image.with_name(f"{stem}_mask{suffix}")
    raise ValueError(f"path must end in .nii or .nii.gz, got {str(path)!r}")


def _draw(size: tuple[int, int, int], lesion: Lesion, seed: int) -> tuple[Field, NDArray[np.uint8]]:
    anatomy, position, noise = (np.random.default_rng([seed, stream]) for stream in range(3))
    soft = 2.0 / min(size[:2])  # edges are one voxel wide
    grid = _grid(size)
    x, y, z = grid
    bend = [0.02 * _waves(grid, anatomy, 6, 2.0) for _ in range(3)]
    warped = (x + bend[0], y + bend[1], z + bend[2])
    folds = _waves(grid, anatomy, 24, 20.0)
    coarse = _waves(grid, anatomy, 10, 9.0)
    voxels, inside = _head(warped, folds, coarse, soft)
    voxels, target = _add_lesion(voxels, inside, grid, lesion, position, soft)

    voxels = voxels * np.exp(BIAS * _waves(grid, noise, 4, 1.2))
    real, imaginary = noise.standard_normal((2, *size), dtype=np.float32) * NOISE
    return np.hypot(voxels + real, imaginary).astype(np.float32), target


def _grid(size: tuple[int, int, int]) -> Grid:
    """Voxel centres, -1 to 1 along every axis, as arrays that broadcast."""
    axes = [((np.arange(n) + 0.5) * 2 / n - 1).astype(np.float32) for n in size]
    return axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]


def _waves(grid: Grid, rng: np.random.Generator, count: int, frequency: float) -> Field:
    """A smooth random field of about unit variance: the mean of ``count`` plane waves."""
    directions = rng.standard_normal((count, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    k = directions * frequency * rng.uniform(0.7, 1.3, (count, 1))
    phase = np.exp(2j * np.pi * rng.uniform(size=count))
    # cos(k · r) is the real part of a product of three functions of one coordinate each
    u, v, w = (np.exp(1j * np.outer(a.ravel(), k[:, i])) for i, a in enumerate(grid))
    plane = (u[:, None] * (v * phase)).astype(np.complex64)  # [X, Y, count]
    axis = w.T.astype(np.complex64)  # [count, Z]
    field = plane.real @ axis.real - plane.imag @ axis.imag
    return np.asarray(field * np.float32(np.sqrt(2 / count)), dtype=np.float32)


def _ellipsoid(
    grid: Grid, centre: Sequence[float], radii: Sequence[float], tilt: float = 0.0
) -> Field:
    """Distance from ``centre`` in units of ``radii``, turned by ``tilt`` radians about z."""
    x, y, z = (axis - c for axis, c in zip(grid, centre, strict=True))
    cos, sin = np.cos(tilt), np.sin(tilt)
    u, v = cos * x + sin * y, cos * y - sin * x
    squares = (u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (z / radii[2]) ** 2
    return np.sqrt(squares).astype(np.float32)


def _below(distance: Field, limit: float | Field, soft: float) -> Field:
    """1 where ``distance`` is below ``limit``, 0 above, a ramp of width ``soft`` between."""
    return np.clip((limit - distance) / np.float32(soft) + np.float32(0.5), 0, 1)


def _paint(voxels: Field, weight: Field, value: float | Field) -> Field:
    return np.asarray(voxels + weight * (value - voxels), dtype=np.float32)


def _head(grid: Grid, folds: Field, coarse: Field, soft: float) -> tuple[Field, Field]:
    """Intensities of a healthy head, and a map of 1 inside the brain."""
    x = grid[0]
    r = _ellipsoid(grid, (0, 0, 0), (0.78, 0.94, 0.96))

    voxels = np.full(r.shape, AIR, np.float32)
    voxels = _paint(voxels, _below(r, 1.0, soft), SCALP * (1 + 0.08 * coarse))
    voxels = _paint(voxels, _below(r, 0.95, soft), SKULL)
    voxels = _paint(voxels, _below(r, 0.89, soft), CSF)
    inside = _below(r, 0.865, soft)
    voxels = _paint(voxels, inside, GREY)

    # sulci: thin sheets of fluid near the surface, with cortex on both sides
    sheet = np.abs(folds)
    depth = np.float32(0.70) + 0.03 * coarse
    white = _below(r, 0.80 - 0.03 * coarse, soft) * (1 - _below(sheet, 0.45, 0.20))
    white = np.maximum(white, _below(r, depth - 0.09, 2 * soft))
    voxels = _paint(voxels, white, WHITE * (1 + 0.015 * coarse))
    sulcus = _below(sheet, 0.10, 0.14) * (1 - _below(r, depth, 2 * soft)) * inside
    voxels = _paint(voxels, 0.8 * sulcus, CSF)

    fissure = _below(np.abs(x) + 0 * r, 0.012, soft) * (1 - _below(r, 0.42, soft)) * inside
    lips = _below(np.abs(x) + 0 * r, 0.055, soft) * (1 - _below(r, 0.42, soft)) * inside
    voxels = _paint(voxels, lips, GREY)
    voxels = _paint(voxels, fissure, CSF)

    for side in (-1, 1):
        for centre, radii, value in (
            ((0.15, -0.06, -0.02), (0.10, 0.17, 0.20), GREY + 10),  # thalamus
            ((0.27, 0.10, -0.02), (0.07, 0.20, 0.18), GREY - 20),  # putamen
            ((0.30, -0.42, -0.62), (0.28, 0.26, 0.22), GREY - 30),  # cerebellum
        ):
            d = _ellipsoid(grid, (side * centre[0], centre[1], centre[2]), radii, side * 0.25)
            weight = _below(d, 1.0, 4 * soft) * inside
            voxels = _paint(voxels, weight, value * (1 + 0.02 * folds))
        front = _ellipsoid(grid, (side * 0.105, 0.20, 0.08), (0.055, 0.20, 0.20), side * 0.30)
        back = _ellipsoid(grid, (side * 0.16, -0.26, 0.08), (0.055, 0.20, 0.22), -side * 0.35)
        body = _ellipsoid(grid, (side * 0.09, 0.0, 0.20), (0.055, 0.28, 0.09))
        ventricle = np.minimum(np.minimum(front, back), body)
        voxels = _paint(voxels, _below(ventricle, 1.0, 6 * soft), CSF)
    third = _ellipsoid(grid, (0, -0.02, -0.04), (0.022, 0.12, 0.18))
    voxels = _paint(voxels, _below(third, 1.0, 6 * soft), CSF)
    return voxels, inside


def _add_lesion(
    voxels: Field,
    inside: Field,
    grid: Grid,
    lesion: Lesion,
    rng: np.random.Generator,
    soft: float,
) -> tuple[Field, NDArray[np.uint8]]:
    """The volume with the lesion in it, and the mask of its target parts."""
    side = rng.choice((-1.0, 1.0))
    radius = lesion.radius * rng.uniform(0.85, 1.15)
    centre = np.array(lesion.centre) + rng.uniform(-0.04, 0.04, 3)
    centre[0] *= side
    towards = rng.standard_normal(3) * (1.0, 1.0, 0.3)
    shift = lesion.cavity_shift * radius * towards / np.linalg.norm(towards)

    wander = lesion.ragged * _waves(grid, rng, 12, 2.2 / radius) * 0.5
    mottle = _waves(grid, rng, 16, 7.0 / radius)
    # measured in units of the radius, so that one voxel is soft / radius wide
    d = _ellipsoid(grid, centre.tolist(), (radius, radius, 1.2 * radius)) + wander
    edge = soft / radius
    fluid = (
        _ellipsoid(grid, (centre + shift).tolist(), (radius, radius, 1.5 * radius)) + 0.5 * wander
    )
    whole = _below(d, 1.0, edge) * inside
    cavity = _below(fluid, lesion.cavity_radius, edge) * whole
    halo = _below(d, 1.0 + lesion.oedema, max(edge, 0.6 * lesion.oedema)) * inside
    # oedema spreads through tissue, not into fluid
    halo = halo * np.clip((voxels - 2.5 * CSF) / 100, 0, 1)

    voxels = _paint(voxels, 0.75 * halo, 600.0)
    shell = _below(np.abs(d - 1.08), 0.08, edge) * inside
    voxels = np.asarray(voxels + lesion.rim * shell, dtype=np.float32)
    voxels = _paint(voxels, whole, lesion.core + lesion.texture * mottle)
    voxels = _paint(voxels, cavity, lesion.cavity)

    in_whole, in_cavity = whole >= 0.5, cavity >= 0.5
    parts = {
        "core": in_whole & ~in_cavity,
        "cavity": in_cavity,
        "oedema": (halo >= 0.5) & ~in_whole,
    }
    target = np.zeros(voxels.shape, bool)
    for name in lesion.target:
        target |= parts[name]
    if not target.any():  # a grid so coarse that no voxel centre falls into the target
        target.flat[np.argmin(d)] = True
    return voxels, target.astype(np.uint8)
