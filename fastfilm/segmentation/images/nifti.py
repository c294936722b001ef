"""Reading of NIfTI files: the array, the affine in mm, and remarks on unusual headers."""

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
from ..support.hints import counted, is_dicom
from .preprocessing import Volume

MILLIMETRES = {1: 1000.0, 2: 1.0, 3: 0.001}
"""NIfTI's unit codes (metre, millimetre, micron) -> mm; any other code is taken as mm."""

WORKING = 24
"""Bytes per voxel that reading and measuring need beside the array itself."""

ABSURD = 1e12
"""Limit of plausible intensities: no scanner's scale reaches it, but a flipped bit of a float32 easily does."""

ORTHOGONAL = 1e-3
"""Cosine of the angle between two axes of a grid up to which they count as orthogonal (0.06 degrees)."""

REMARKS = {
    "unit": "no unit of length in the header; taken as mm",
    "orientation": "neither sform nor qform in the header; the axes are taken as left, anterior, superior",
    "qform": "the qform places voxels elsewhere than the sform; the sform is used",
    "sheared": "the axes are not at right angles; resampling and patches follow them as they are",
    "longer": "the file holds more than its header says; the rest is not read",
}
"""Kinds of remarks on a file, with the treatment of such files."""


@dataclass(frozen=True)
class NiftiVolume:
    """The content of an image file.

    Attributes:
        array: [X, Y, Z] in the file's order.
        affine: [4, 4], voxel -> mm, converted from the file's unit of length.
        remarks: kind of ``REMARKS`` -> detail on this file.
    """

    array: Volume
    affine: Volume
    remarks: dict[str, str] = field(default_factory=dict)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxels in mm, along the file's three axes."""
        x, y, z = map(float, nib.affines.voxel_sizes(self.affine))
        return x, y, z


class Remarks:
    """Collects remarks on many files, for one line per kind of remark."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, str]] = {}

    def add(self, path: Path, volume: NiftiVolume) -> None:
        """Adds the remarks on one file."""
        for kind, detail in volume.remarks.items():
            self.files.setdefault(kind, {})[str(path)] = detail

    def lines(self) -> Iterator[str]:
        """A line for each kind, with the number of files and an example."""
        for kind in REMARKS:
            files = self.files.get(kind, {})
            if files:
                path, detail = min(files.items())
                such = "such as " if len(files) > 1 else ""
                line = f"{counted(len(files), 'file')}: {REMARKS[kind]}: {such}{path}"
                yield line + (f" ({detail})" if detail else "")


def read_volume(path: Path) -> NiftiVolume:
    """A 3D image from a NIfTI file; integers stay integers if the file does not scale them.

    A compressed file is read to its end, where its checksum is.

    Raises:
        UserError: the file is missing, empty, damaged, not NIfTI or not 3D, does not fit into the free memory, or
            its affine has no inverse; the message names the file.
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
    except Exception as error:  # nibabel, gzip and zlib have no common base class
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
    """The reason why an image's voxels cannot all be intensities, as a message; None if they can."""
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
"""Default distance, in voxels, up to which two positions count as the same."""


def same_grid(a: NiftiVolume, b: NiftiVolume, tolerance: float = GRID_TOLERANCE) -> str | None:
    """The difference between the grids of two volumes, as text; None if they are the same.

    Args:
        tolerance: distance in voxels up to which positions count as the same.
    """
    if a.array.shape != b.array.shape:
        return f"shapes {a.array.shape} and {b.array.shape}"
    far = _apart(a.affine, b.affine, a.array.shape)
    if far <= tolerance * min(a.spacing):
        return None
    return f"affines that place voxels up to {far:.3g} mm apart (data.grid_tolerance)"


def shear(affine: Volume) -> float:
    """The largest absolute cosine between two axes of a grid; 0 at right angles."""
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
    """The largest distance along one axis between the positions of a corner of the volume by two affines."""
    corners = np.array([[x, y, z, 1.0] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    corners[:, :3] *= np.array(shape) - 1
    return float(np.abs(corners @ (np.asarray(a) - np.asarray(b)).T).max())


def _unit(image: Any) -> int:
    try:
        return int(image.header["xyzt_units"]) & 7
    except (KeyError, ValueError):
        return 2


def _fits(path: Path, image: Any) -> None:
    """Raises UserError for an image that does not fit into memory, before its voxels are read."""
    if isinstance(image, nib.Nifti1Image):
        # nibabel treats an infinite slope as absent
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
    """The array, and the number of bytes behind it in the file."""
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
            if far > 0.5 * scale * float(nib.affines.voxel_sizes(image.affine).min()):
                yield "qform", f"up to {far:.3g} mm apart"
    if shear(image.affine) > ORTHOGONAL:
        degrees = float(np.degrees(np.arcsin(min(1.0, shear(image.affine)))))
        yield "sheared", f"by {degrees:.2g} degrees"
