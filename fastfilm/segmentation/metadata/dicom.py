"""Metadata from the headers of the DICOM files that an image was converted from, in the units of BIDS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..support.errors import UserError
from ..support.hints import did_you_mean

IN_SECONDS = ("EchoTime", "RepetitionTime", "InversionTime")
"""Tags that DICOM has in milliseconds, BIDS and the sidecars of dcm2niix in seconds."""

NUMBERS = ("DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV")
TEXTS = ("AE", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
"""Value representations (DICOM PS3.5, 6.2) that are numbers, and that are text."""

YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
"""Units of an age string, as in 018M."""

NUMBER = re.compile(r"([0-9A-Fa-f]{4}),([0-9A-Fa-f]{4})")
"""A tag by its group and element, as in 0018,0081."""


def pydicom() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise UserError(
            'metadata with source dicom need pydicom: pip install "fastfilm[dicom]"'
        ) from error
    return pydicom


def tag_of(text: str) -> int:
    """The number of a tag: ``EchoTime`` or ``0018,0081``.

    Raises:
        UserError: no such keyword; pydicom is not installed.
    """
    if (match := NUMBER.fullmatch(text)) is not None:
        return int(match[1] + match[2], 16)
    found = pydicom().datadict.tag_for_keyword(text)
    if found is None:
        known = pydicom().datadict.keyword_dict
        raise UserError(f"DICOM has no keyword {text!r}{did_you_mean(text, known)}")
    return int(found)


def of_image(image: Path, stem: str, root: Path) -> Path | None:
    """Where the DICOM files of an image in a BIDS data set are; None where there are none.

    That is ``sourcedata/``, the image's folders, and a folder (or one file, .dcm) that is called like the image:
    ``sub-01/anat/sub-01_T2w.nii.gz`` has ``sourcedata/sub-01/anat/sub-01_T2w/``. The folder of a subject or
    session would hold other series, too.
    """
    if not image.is_relative_to(root):
        return None
    folder = root / "sourcedata" / image.parent.relative_to(root)
    return next((p for p in (folder / stem, folder / f"{stem}.dcm") if p.exists()), None)


def read_tags(path: Path, tags: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values in the header of a DICOM file, or of the first and last of a folder's.

    A tag that differs between these two says nothing of the image as a whole, or the folder holds several series,
    and the first file's value would be that of one of them: it is a problem, not a value.

    Args:
        path: a file, or a folder, read with all folders in it; files that are no DICOM are passed over there.
        tags: key -> keyword or number.

    Returns:
        key -> number, text, list of them, or None where the header has no value; problems, one line each.

    Raises:
        ValueError: no DICOM file.
        UserError: pydicom is not installed, a keyword that there is not.
    """
    numbers = {key: tag_of(text) for key, text in tags.items()}
    if path.is_dir():
        every = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "DICOMDIR")
        first, last = (_first(files, numbers) for files in (every, reversed(every)))
        if first is None or last is None:
            raise ValueError(f"{path}: none of its {len(every)} files can be read as DICOM")
    elif path.exists():
        first = last = _first([path], numbers)
        if first is None or last is None:
            raise ValueError(f"{path}: cannot be read as DICOM")
    else:
        raise ValueError(f"{path}: no such file or folder")
    values: dict[str, Any] = {}
    wrong = []
    for key, number in numbers.items():
        values[key] = None
        try:
            a, b = (_value(header, number) for _, header in (first, last))
        except ValueError as error:
            wrong.append(f"metadata {key!r}: {path}: DICOM tag {tags[key]}: {error}")
            continue
        if a != b:
            wrong.append(
                f"metadata {key!r}: DICOM tag {tags[key]} is {a!r} in {first[0]} and {b!r} in {last[0].name}: it"
                " differs within the series, or there are several in the folder"
            )
            continue
        values[key] = a
    return values, wrong


def _first(files: Iterable[Path], numbers: Mapping[str, int]) -> tuple[Path, Any] | None:
    """The first file that is DICOM, and its header, without the pixels."""
    read = pydicom().dcmread
    for path in files:
        try:
            return path, read(path, stop_before_pixels=True, specific_tags=[*numbers.values()])
        except Exception:  # damaged files raise anything; one that is none is passed over
            continue
    return None


def _value(header: Any, number: int) -> Any:
    """What the header has, plain; None if it is empty or not there.

    Raises:
        ValueError: bytes, a sequence, text where the standard has a number.
    """
    element = header.get(number)
    if element is None:
        return None
    try:
        value, kind = element.value, element.VR
    except Exception as error:  # pydicom converts here, and raises what the conversion does
        raise ValueError(str(error)) from error
    if value is None or not element.VM:
        return None
    several = element.VM > 1
    plain = [_plain(v, kind, element.keyword) for v in (value if several else [value])]
    return plain if several else plain[0]


def _plain(value: Any, kind: str, keyword: str) -> Any:
    if kind in NUMBERS:
        x = int(value) if isinstance(value, int) else float(value)
        return x / 1000 if keyword in IN_SECONDS else x
    text = str(value).strip()
    if kind == "AS":
        match = re.fullmatch(r"(\d{3})([DWMY])", text)
        if match is None and text:
            raise ValueError(f"must be an age such as 045Y, got {text!r}")
        return None if match is None else int(match[1]) * YEARS[match[2]]
    if kind not in TEXTS:
        raise ValueError(f"holds no number or text (value representation {kind})")
    return text or None
