"""Hints for messages: the word that was meant, and what lies in a folder that has not what was looked for."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LOOKED_AT = 5000
"""Files of a folder that are looked at."""

OTHER_FORMATS = {
    ".nrrd": "NRRD", ".nhdr": "NRRD", ".mha": "MetaImage", ".mhd": "MetaImage", ".mgz": "FreeSurfer MGZ",
    ".mgh": "FreeSurfer MGH", ".mnc": "MINC", ".img": "Analyze", ".hdr": "Analyze", ".png": "PNG", ".jpg": "JPEG",
    ".tif": "TIFF", ".tiff": "TIFF", ".npy": "NumPy", ".npz": "NumPy", ".h5": "HDF5",
}  # fmt: skip


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the word of ``known`` that is most like ``word``, or nothing."""
    by_lower = {k.casefold(): k for k in known}
    close = difflib.get_close_matches(word.casefold(), by_lower, 1, 0.7)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def some(names: Sequence[Any], most: int = 3) -> str:
    """The first few, and a sign that there are more."""
    return ", ".join(str(n) for n in names[:most]) + (", …" if len(names) > most else "")


def contents(folder: Path) -> str:
    """What the files in ``folder`` are, and how DICOM becomes NIfTI; a sentence for a message."""
    counts: Counter[str] = Counter()
    for path in _files(folder):
        counts[_kind(path)] += 1
    if not counts:
        return "the folder has no files"
    listed = ", ".join(f"{n} {kind}" for kind, n in counts.most_common(4))
    text = f"it has {listed}"
    if counts["DICOM files"]:
        text += "; dcm2niix converts DICOM to one NIfTI file a series; dcm2bids and heudiconv convert it to BIDS"
    elif not counts["NIfTI files"]:
        text += "; images must be NIfTI (.nii.gz or .nii)"
    return text


def is_dicom(path: Path) -> bool:
    """By the name, or by the four letters behind the preamble."""
    if path.suffix.lower() in (".dcm", ".ima", ".dicom"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _files(folder: Path) -> Iterable[Path]:
    count = 0
    for where, _, names in os.walk(folder):
        for name in sorted(names):
            if name.startswith("."):
                continue
            count += 1
            if count > LOOKED_AT:
                return
            yield Path(where, name)


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "NIfTI files"
    if path.suffix.lower() in OTHER_FORMATS:
        return f"{OTHER_FORMATS[path.suffix.lower()]} files"
    if path.suffix.lower() in (".json", ".tsv", ".csv", ".txt", ".md", ".yaml", ".yml", ".gz"):
        return f"{path.suffix.lower()} files"
    return "DICOM files" if is_dicom(path) else "other files"
