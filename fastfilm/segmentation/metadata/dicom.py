"""Metadata from the headers of the DICOM files that an image was converted from, in the units of BIDS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..support.errors import UserError
from ..support.hints import did_you_mean

IN_SECONDS = ("EchoTime", "RepetitionTime", "InversionTime")
"""Tags in milliseconds in DICOM, but in seconds in BIDS and in the sidecars of dcm2niix."""

NUMBERS = ("DS", "FD", "FL", "IS", "SL", "SS", "SV", "UL", "US", "UV")
TEXTS = ("AE", "CS", "DA", "DT", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT")
"""Value representations (DICOM PS3.5, 6.2) of numbers and of text."""

YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
"""Years in each unit of an age string such as 018M."""

NUMBER = re.compile(r"([0-9A-Fa-f]{4}),([0-9A-Fa-f]{4})")
"""A tag given by group and element, such as 0018,0081."""


def pydicom() -> Any:
    """The package pydicom.

    Raises:
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
    except ModuleNotFoundError as error:
        raise UserError(
            'metadata with source dicom need pydicom: pip install "fastfilm[dicom]"'
        ) from error
    return pydicom


def tag_of(text: str) -> int:
    """The number of a tag given as ``EchoTime`` or ``0018,0081``.

    Raises:
        UserError: DICOM has no such keyword, or pydicom is not installed.
    """
    if (match := NUMBER.fullmatch(text)) is not None:
        return int(match[1] + match[2], 16)
    found = pydicom().datadict.tag_for_keyword(text)
    if found is None:
        known = pydicom().datadict.keyword_dict
        raise UserError(f"DICOM has no keyword {text!r}{did_you_mean(text, known)}")
    return int(found)


def of_image(image: Path, stem: str, root: Path) -> Path | None:
    """The folder or file with the DICOM headers of an image in a BIDS data set; None if there is none.

    It lies in ``sourcedata/`` at the image's place and has the image's name: the headers of
    ``sub-01/anat/sub-01_T2w.nii.gz`` are in the folder ``sourcedata/sub-01/anat/sub-01_T2w/`` or in the file of
    that name with the suffix ``.dcm``. Folders of a whole subject or session are not read: they hold other series,
    too.

    Args:
        stem: name of the image without ``.nii.gz``.
        root: folder of the data set.
    """
    if not image.is_relative_to(root):
        return None
    folder = root / "sourcedata" / image.parent.relative_to(root)
    return next((p for p in (folder / stem, folder / f"{stem}.dcm") if p.exists()), None)


def read_tags(path: Path, tags: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Values in the header of a DICOM file, or in those of the first and last file of a folder.

    A tag with different values in these two is reported as a problem: it varies within the series, or the folder
    holds several series.

    Args:
        path: a file, or a folder, which is searched with all its subfolders; files there that are not DICOM are
            skipped.
        tags: metadata key -> keyword or number of the tag.

    Returns:
        metadata key -> number, text, list of these, or None if the header has no value; and a line for each
        problem.

    Raises:
        ValueError: there is no DICOM file.
        UserError: pydicom is not installed, or DICOM has no such keyword.
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
    """The first DICOM file and its header, without the pixels; None if no file is DICOM."""
    read = pydicom().dcmread
    for path in files:
        try:
            return path, read(path, stop_before_pixels=True, specific_tags=[*numbers.values()])
        except Exception:  # pydicom has no common base class for the errors of damaged files
            continue
    return None


def _value(header: Any, number: int) -> Any:
    """The value of a tag as number, text or a list of these; None if it is empty or missing.

    Raises:
        ValueError: the value is bytes or a sequence, or text where the standard has a number.
    """
    element = header.get(number)
    if element is None:
        return None
    try:
        value, kind = element.value, element.VR
    except Exception as error:  # pydicom converts the value here, and raises anything
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
