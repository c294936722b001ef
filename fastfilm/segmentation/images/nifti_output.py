"""Writing of predictions as NIfTI files with the grid and header of their image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..support.files import atomic
from .preprocessing import Volume


def write_like(path: Path, array: Volume, image: Path, description: str = "") -> None:
    """``array`` [X, Y, Z] as NIfTI with the affine, orientation, units and header of ``image``, atomically.

    The positions of the voxels (qform and sform with their codes, units) are kept. The type is that of ``array``.
    Entries on the image's intensities (scaling, display range, extensions) are dropped.

    Args:
        path: file to write, .nii or .nii.gz.
        image: file with the grid of ``array``; its trailing axes of size 1 are added to the result.
        description: text for the header's ``descrip`` (79 bytes are kept).

    Raises:
        UserError: the file cannot be written; nothing of it is left behind.
        ValueError: ``array`` is not on the image's grid.
    """
    source: Any = nib.load(image)
    shape = tuple(source.shape)
    if array.shape != shape[:3] or any(n != 1 for n in shape[3:]):
        raise ValueError(f"array must have the shape of {image}, {shape}, got {array.shape}")
    known = isinstance(source, nib.Nifti1Image)
    kind = nib.Nifti2Image if isinstance(source, nib.Nifti2Image) else nib.Nifti1Image
    result = kind(array.reshape(shape), source.affine, source.header if known else None)
    header = result.header
    header.set_data_dtype(array.dtype)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = description.encode()[:79]
    header.extensions.clear()
    if known:
        # nibabel sets codes of its own for an affine passed to the constructor
        result.set_sform(source.get_sform(), int(source.header["sform_code"]))
        result.set_qform(source.get_qform(), int(source.header["qform_code"]), strip_shears=False)
        for name in ("quatern_b", "quatern_c", "quatern_d", "pixdim"):
            header[name] = source.header[name]
    with atomic(path) as temporary:
        nib.save(result, temporary)


def label_dtype(largest: int) -> np.dtype[Any]:
    """The smallest type for label values up to ``largest``: uint8 or uint16.

    Raises:
        ValueError: ``largest`` is outside 0 to 65535.
    """
    if not 0 <= largest <= 65535:
        raise ValueError(f"label values must be 0 to 65535, got {largest}")
    return np.dtype(np.uint8 if largest <= 255 else np.uint16)
