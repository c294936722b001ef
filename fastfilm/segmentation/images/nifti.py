"""NIfTI files as the system reads them: an array, an affine in mm, and what is remarkable about them."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..support import memory
from ..support.encoding import dangling
from ..support.errors import UserError
from ..support.hints import is_dicom
from .preprocessing import Volume

MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI's unit codes (metre, millimetre, micron) -> mm; any other code says nothing, and is taken as mm."""

WORKING = 24
"""Bytes a voxel that reading and measuring take beside the array itself."""

ABSURD = 1e12
"""Intensities are below this: no scanner's scale is so large, but a flipped bit of a float32 easily is."""

ORTHOGONAL = 1e-3
"""Cosine of the angle between two axes of a grid up to which they count as orthogonal (0.06 degrees)."""

REMARKS = {
    "unit": "no unit of length in the header; taken as mm",
    "orientation": "neither sform nor qform in the header; the axes are taken as left, anterior, superior",
    "qform": "the qform places voxels elsewhere than the sform; the sform is used",
    "sheared": "the axes are not at right angles; resampling and patches follow them as they are",
    "longer": "the file holds more than its header says; what follows is not read",
}
"""What is worth knowing about a file, and how it is treated."""


@dataclass(frozen=True)
class NiftiVolume:
    """An image file, read.

    Attributes:
        array: [X, Y, Z] in the file's order.
        affine: [4, 4], voxel -> mm, whatever the file's unit of length.
        remarks: kind (of ``REMARKS``) -> further detail, of this file.
    """

    array: Volume
    affine: Volume
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between neighbours along the file's three axes."""
        x, y, z = (float(s) for s in np.sqrt((self.affine[:3, :3] ** 2).sum(0)))
        return x, y, z


class Remarks:
    """Collects what is remarkable about files, so that each kind is said once, with its files."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, str]] = {}

    def add(self, path: Path, volume: NiftiVolume) -> None:
        """Takes note of one file."""
        for kind, detail in volume.remarks.items():
            self.files.setdefault(kind, {})[str(path)] = detail

    def lines(self) -> Iterator[str]:
        """One line a kind."""
        for kind in REMARKS:
            files = self.files.get(kind, {})
            if files:
                path, detail = min(files.items())
                count, such = (
                    (f"{len(files)} files", "such as ") if len(files) > 1 else ("1 file", "")
                )
                yield f"{count}: {REMARKS[kind]}: {such}{path}" + (f" ({detail})" if detail else "")


def read_volume(path: Path) -> NiftiVolume:
    """A 3D image from a NIfTI file; integers stay integers if the file does not scale them.

    A compressed file is read to its end, where its checksum is.

    Raises:
        UserError: missing, empty, damaged or not NIfTI, not 3D, larger than the memory at hand, an affine that has
            no inverse; the file is named.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: {dangling(path)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        image: Any = nib.load(path)
        if not _invertible(image.affine):
            raise UserError(
                f"{path}: its affine is not usable: {np.asarray(image.affine).tolist()}"
            )
        _fits(path, image)
        array, longer = _voxels(path, image)
        remarks = dict(_remarks(image))
    except UserError:
        raise
    except Exception as error:  # nibabel, gzip and zlib each have their own
        reason = " ".join(str(error).split()) or type(error).__name__
        if "CRC" in reason or "decompress" in reason:
            reason = f"the compressed data are damaged ({reason})"
        elif is_dicom(path):
            reason = "it is a DICOM file; dcm2niix converts a series to NIfTI"
        raise UserError(f"{path}: cannot be read as NIfTI: {reason}") from error
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise UserError(f"{path}: must be one 3D volume, its shape is {array.shape}")
    if longer:
        remarks["longer"] = f"{longer} bytes"
    affine = np.array(image.affine, np.float64)
    affine[:3] *= MILLIMETRES.get(_unit(image), 1.0)
    return NiftiVolume(np.asarray(array), affine, remarks)


def voxel_problems(path: Path, array: Volume) -> str | None:
    """None where every voxel of an image can be an intensity, else what is wrong."""
    if array.dtype.kind not in "biuf":
        return f"{path}: voxels must be numbers, got {array.dtype}"
    if array.size == 0:
        return f"{path}: has no voxels, its shape is {array.shape}"
    if array.dtype.kind == "f":
        strange = int((~np.isfinite(array)).sum())
        if strange:
            return f"{path}: {strange} voxels are NaN or infinite"
    if array.dtype.kind == "f" or array.dtype.itemsize == 8:
        largest = max(float(array.max()), -float(array.min()))
        if largest > ABSURD:
            count = int((np.abs(array) > ABSURD).sum())
            return (
                f"{path}: intensities of up to {largest:.3g} in {count} voxels: the file is damaged, or its"
                " scaling (scl_slope) is wrong"
            )
    return None


GRID_TOLERANCE = 0.1
"""Voxels by which positions on one grid may differ, where nothing else is configured."""


def same_grid(a: NiftiVolume, b: NiftiVolume, tolerance: float = GRID_TOLERANCE) -> str | None:
    """None if both have one grid, else what differs (positions by more than ``tolerance`` voxels)."""
    if a.array.shape != b.array.shape:
        return f"shapes {a.array.shape} and {b.array.shape}"
    far = _apart(a.affine, b.affine, a.array.shape)
    if far <= tolerance * min(a.spacing):
        return None
    return f"affines that place voxels up to {far:.3g} mm apart (data.grid_tolerance)"


def shear(affine: Volume) -> float:
    """Largest cosine between two axes of a grid: 0 at right angles."""
    axes = np.asarray(affine, np.float64)[:3, :3]
    axes = axes / np.maximum(np.sqrt((axes**2).sum(0)), 1e-300)
    cosines = axes.T @ axes
    return float(np.abs(cosines[np.triu_indices(3, 1)]).max())


def _invertible(affine: Volume) -> bool:
    axes = np.asarray(affine, np.float64)[:3, :3]
    if not np.isfinite(affine).all() or not (axes != 0).any(0).all():
        return False
    axes = axes / np.sqrt((axes**2).sum(0))
    return bool(abs(np.linalg.det(axes)) > 1e-6)


def _apart(a: Volume, b: Volume, shape: tuple[int, ...]) -> float:
    """Largest distance between the positions that two affines give to a corner of the volume, per axis."""
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners[:, :3] *= np.array(shape) - 1
    return float(np.abs(corners @ (np.asarray(a) - np.asarray(b)).T).max())


def _unit(image: Any) -> int:
    try:
        return int(image.header["xyzt_units"]) & 7
    except (KeyError, ValueError):
        return 2


def _fits(path: Path, image: Any) -> None:
    """Refuses what the memory does not hold, before anything of it is read."""
    if isinstance(image, nib.Nifti1Image):
        # nibabel takes an infinite slope for none
        with nib.openers.ImageOpener(str(path)) as file:
            raw = type(image.header).from_fileobj(file, check=False)
        for name in ("scl_slope", "scl_inter"):
            if np.isinf(raw[name]):
                raise UserError(f"{path}: {name} in its header is infinite")
    voxels = int(np.prod([int(n) for n in image.shape], dtype=object))
    scaled = any(float(x) != y for x, y in zip(image.header.get_slope_inter(), (1, 0), strict=True)
                 if x is not None)  # fmt: skip
    each = max(int(image.header.get_data_dtype().itemsize), 8 if scaled else 0) + WORKING
    there = memory.available()
    if voxels * each > there:
        raise UserError(
            f"{path}: {'x'.join(map(str, image.shape))} voxels need {memory.gib(voxels * each)} of memory;"
            f" {memory.gib(there)} are free"
        )


def _voxels(path: Path, image: Any) -> tuple[Volume, int]:
    """The array, and how many bytes follow it in the file."""
    if not path.name.endswith(".gz"):
        proxy = image.dataobj
        size = int(np.prod(image.shape)) * proxy.dtype.itemsize
        array = np.asanyarray(proxy)
        return array, max(0, path.stat().st_size - int(proxy.offset) - size)
    with gzip.open(path) as file:
        held = type(image).from_file_map({"image": nib.FileHolder(fileobj=file)})
        array = np.asanyarray(held.dataobj)
        longer = 0
        while chunk := file.read(1 << 20):
            longer += len(chunk)
    return array, longer


def _remarks(image: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(image, nib.Nifti1Image):
        return
    if _unit(image) not in MILLIMETRES:
        yield "unit", ""
    scale = MILLIMETRES.get(_unit(image), 1.0)
    header = image.header
    sform, qform = (int(header[f"{name}_code"]) > 0 for name in ("sform", "qform"))
    if not (sform or qform):
        yield "orientation", ""
    if sform and qform:
        try:
            q = header.get_qform()
        except nib.spatialimages.HeaderDataError:
            yield "qform", "the qform is not usable"
        else:
            far = _apart(header.get_sform(), q, image.shape[:3]) * scale
            if far > 0.5 * scale * float(np.sqrt((image.affine[:3, :3] ** 2).sum(0)).min()):
                yield "qform", f"up to {far:.3g} mm apart"
    if shear(image.affine) > ORTHOGONAL:
        degrees = float(np.degrees(np.arcsin(min(1.0, shear(image.affine)))))
        yield "sheared", f"by {degrees:.2g} degrees"
