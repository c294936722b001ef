"""The data sets as arrays of slices in memory: open ones read from BIDS folders, and the phantom."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fastfilm.phantom import LESIONS, make_phantom
from fastfilm.segmentation.support.errors import UserError

PUBLIC = {
    "lgg": "lower-grade glioma MRI of TCGA with FLAIR masks (Buda et al. 2019): Kaggle 'LGG MRI Segmentation'",
    "acdc": "ACDC cardiac MRI (Bernard et al. 2018): https://www.creatis.insa-lyon.fr/Challenge/acdc",
    "hippocampus": "Medical Segmentation Decathlon, Task04_Hippocampus: http://medicaldecathlon.com",
}
"""Where each set comes from."""


@dataclass(frozen=True)
class Layout:
    """How a set lies on disk and what its slices become.

    Attributes:
        contrasts: what stands between subject (and phase) and ``.nii.gz``.
        labels: names, in the order of their values from 1.
        canvas: (height, width) that slices are cropped or padded to.
        factor: slices are averaged over factor × factor pixels at small size.
    """

    contrasts: tuple[str, ...]
    labels: tuple[str, ...]
    canvas: tuple[int, int]
    factor: int = 1


LAYOUTS = {
    "lgg": Layout(("T1w", "FLAIR", "ce-gadolinium_T1w"), ("tumour",), (128, 128), 2),
    "acdc": Layout(("cine",), ("right ventricle", "myocardium", "left ventricle"), (128, 128), 2),
    "hippocampus": Layout(("T1w",), ("anterior", "posterior"), (40, 56)),
    "phantom": Layout(("FLAIR",), ("target",), (48, 48)),
}


@dataclass(frozen=True, eq=False)
class Case:
    """One volume.

    Attributes:
        image: float32 [D, C, H, W], each channel with mean 0 and deviation 1; zeros where it is missing.
        masks: bool [D, K, H, W].
        values: metadata, key -> value ("" where it is missing).
        present: which channels have a file.
    """

    id: str
    subject: str
    image: NDArray[np.float32]
    masks: NDArray[np.bool_]
    values: dict[str, str]
    present: tuple[bool, ...]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Cases of one set and the names of its labels."""

    name: str
    labels: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def subjects(self) -> list[str]:
        """Sorted, each once."""
        return sorted({c.subject for c in self.cases})


@functools.lru_cache(maxsize=4)
def load(name: str, root: Path | None, small: bool) -> DataSet:
    """A data set; the phantom needs no ``root``.

    Args:
        root: folder with a BIDS folder ``name``.

    Raises:
        UserError: there is no such folder (the message says where the set comes from), or it has no case.
    """
    layout = LAYOUTS[name]
    if name == "phantom":
        return DataSet(name, layout.labels, tuple(_phantoms(120 if small else 240)))
    folder = None if root is None else root / name
    if folder is None or not folder.is_dir():
        where = "--data DIR is not given" if folder is None else f"{folder}: no such folder"
        raise UserError(
            f"{where}; experiment data set {name!r}: {PUBLIC[name]}; lay it out as BIDS in DIR/{name}"
        )
    table = _table(folder / "participants.tsv")
    cases = []
    for label in sorted(folder.glob("derivatives/labels/sub-*/**/*_dseg.nii.gz")):
        cases.append(_case(folder, label, layout, table, small))
    if not cases:
        raise UserError(f"{folder}: no derivatives/labels/sub-*/…_dseg.nii.gz")
    return DataSet(name, layout.labels, tuple(cases))


def _table(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {row.pop("participant_id"): row for row in rows}


def _case(
    folder: Path, label: Path, layout: Layout, table: dict[str, dict[str, str]], small: bool
) -> Case:
    subject = next(p for p in label.parts if p.startswith("sub-"))
    stem = label.name.removesuffix("_dseg.nii.gz")
    start = next(
        stem.removesuffix(f"_{contrast}")
        for contrast in sorted(layout.contrasts, key=len, reverse=True)
        if stem.endswith(f"_{contrast}")
    )
    truth = np.asarray(nib.load(label).dataobj).astype(np.int64)
    factor = layout.factor if small else 1
    channels, present = [], []
    for contrast in layout.contrasts:
        path = (
            folder
            / label.parent.relative_to(folder / "derivatives/labels")
            / f"{start}_{contrast}.nii.gz"
        )
        present.append(path.is_file())
        if path.is_file():
            channels.append(
                _slices(_normal(np.asarray(nib.load(path).dataobj, np.float32)), layout, factor)
            )
        else:
            channels.append(_slices(np.zeros(truth.shape, np.float32), layout, factor))
    masks = [
        _slices((truth == v + 1).astype(np.float32), layout, factor) > 0.5
        for v in range(len(layout.labels))
    ]
    values = {k: "" if v in ("n/a", "") else v for k, v in table.get(subject, {}).items()}
    return Case(start, subject, np.stack(channels, 1), np.stack(masks, 1), values, tuple(present))


def _normal(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return (x - x.mean()) / max(float(x.std()), 1e-6)


def _slices(volume: NDArray[np.float32], layout: Layout, factor: int) -> NDArray[np.float32]:
    """[X, Y, Z] -> [Z, H, W] on the canvas, averaged over factor × factor pixels."""
    out = np.full((volume.shape[2], *layout.canvas), volume.min(), np.float32)
    to, of = [], []
    for size, room in zip(volume.shape[:2], layout.canvas, strict=True):
        n = min(size, room)
        to.append(slice((room - n) // 2, (room - n) // 2 + n))
        of.append(slice((size - n) // 2, (size - n) // 2 + n))
    out[:, to[0], to[1]] = volume[of[0], of[1]].transpose(2, 0, 1)
    d, h, w = out.shape
    blocks = out.reshape(d, h // factor, factor, w // factor, factor)
    return np.ascontiguousarray(blocks.mean((2, 4)))


def _phantoms(count: int) -> list[Case]:
    """As in ``fastfilm demo``: how a lesion looks is drawn apart from the type that decides what is asked for."""
    types = tuple(LESIONS)
    rng = np.random.default_rng(0)
    layout, cases = LAYOUTS["phantom"], []
    for i in range(count):
        kind, look = types[i % len(types)], types[int(rng.integers(len(types)))]
        image, mask = make_phantom(shape=(*layout.canvas, 16), tumour_type=kind, look=look, seed=i)
        voxels: Any = _normal(np.asarray(image.dataobj, np.float32))
        target = np.asarray(mask.dataobj, np.float32)
        name = f"phantom-{i:03d}"
        cases.append(
            Case(
                name,
                name,
                _slices(voxels, layout, 1)[:, None],
                _slices(target, layout, 1)[:, None] > 0.5,
                {"tumor_type": kind},
                (True,),
            )
        )
    return cases
