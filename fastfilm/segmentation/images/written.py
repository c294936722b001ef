"""What is predicted, as NIfTI files on the grid and with the header of the image that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ..support.files import atomic
from .preprocessing import Volume


def write_like(path: Path, array: Volume, image: Path, description: str = "") -> None:
    """``array`` [X, Y, Z] as NIfTI with the affine, orientation, units and header of ``image``, atomically.

    The header keeps what says where the voxels are (qform and sform with their codes, units); the type is that of
    ``array``, and what only held for the image's intensities (scaling, display range, extensions) is dropped.

    Args:
        path: ends in .nii or .nii.gz.
        image: a file whose grid is ``array``'s, apart from trailing axes of size 1, which the result gets too.
        description: kept in the header's ``descrip`` (79 characters at most).

    Raises:
        UserError: the file cannot be written; nothing is left of it then.
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
        # nibabel sets codes of its own where the affine is given anew
        result.set_sform(source.get_sform(), int(source.header["sform_code"]))
        result.set_qform(source.get_qform(), int(source.header["qform_code"]), strip_shears=False)
        for name in ("quatern_b", "quatern_c", "quatern_d", "pixdim"):
            header[name] = source.header[name]
    with atomic(path) as temporary:
        nib.save(result, temporary)


def label_dtype(largest: int) -> np.dtype[Any]:
    """The smallest type that holds label values up to ``largest``: uint8 or uint16."""
    if not 0 <= largest <= 65535:
        raise ValueError(f"label values must be 0 to 65535, got {largest}")
    return np.dtype(np.uint8 if largest <= 255 else np.uint16)
