"""Looks at every file of every case once: what is wrong, and the numbers that a plan needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from .config import Data
from .errors import UserError
from .sources import Case
from .volumes import NiftiVolume, read_volume, same_grid

SAMPLED = 2000
"""Voxels a case and channel that dataset-wide intensity statistics are drawn from."""


@dataclass
class CaseFacts:
    """One case, as measured.

    Attributes:
        shape, spacing: along right, anterior, superior; spacing in mm.
        orientation: axis codes of the file, e.g. "RAS".
        intensities: per channel: mean, std, lowest, highest, 0.5 and 99.5 percentiles (None: missing channel).
        voxels: label -> number of voxels, of the labels that were annotated.
        inside: per channel, a sample of the intensities in any label.
        digest: of the voxels of all channels.
    """

    id: str
    subject: str
    shape: list[int] = field(default_factory=list)
    spacing: list[float] = field(default_factory=list)
    orientation: str = ""
    intensities: list[dict[str, float] | None] = field(default_factory=list)
    voxels: dict[str, int] = field(default_factory=dict)
    inside: list[NDArray[np.float32]] = field(default_factory=list)
    integers: bool = True
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the samples."""
        return {k: v for k, v in vars(self).items() if k != "inside"}


def check_cases(
    cases: Iterable[Case], data: Data, done: Callable[[], None] = lambda: None, threads: int = 4
) -> tuple[list[CaseFacts], list[str]]:
    """Reads all files.

    Args:
        done: called after each case.

    Returns:
        the facts of the cases that can be used, and one line for everything that is wrong anywhere.
    """

    def look(case: Case) -> tuple[CaseFacts, list[str]]:
        found = check_case(case, data)
        done()
        return found

    # reading is decompression, which lets other threads run
    pool = ThreadPoolExecutor(threads)
    try:
        results = list(pool.map(look, cases))
    finally:
        # after Ctrl-C the cases that are waiting are not read
        pool.shutdown(cancel_futures=True)
    problems = [p for _, wrong in results for p in wrong]
    good = [facts for facts, wrong in results if not wrong]
    for name, label in data.labels.items():
        if good and not problems and all(f.voxels.get(name, 0) == 0 for f in good):
            which = f" (values {label.values})" if label.values else ""
            problems.append(f"label {name!r}{which} has no voxel in any case")
    return good, problems


def check_case(case: Case, data: Data) -> tuple[CaseFacts, list[str]]:
    """The facts of one case, and what is wrong with it."""
    facts = CaseFacts(case.id, case.subject)
    problems: list[str] = []
    images: list[NiftiVolume | None] = []
    for path in case.images:
        images.append(None if path is None else _read(path, problems))
    there = [(p, i) for p, i in zip(case.images, images, strict=True) if p and i]
    for path, image in there:
        problems += _image_problems(path, image, there[0], data.grid_tolerance)
    digest = hashlib.sha256()
    for _, image in there:
        digest.update(np.ascontiguousarray(image.array).tobytes())
    facts.digest = digest.hexdigest()
    masks = {}
    for path in sorted(set(case.labels.values())):
        mask = _read(path, problems)
        if mask is None:
            continue
        names = [n for n, p in case.labels.items() if p == path]
        problems += _label_problems(path, mask, names, data, there[0] if there else None)
        for name in names:
            masks[name] = label_mask(mask, data.labels[name].values)
            facts.voxels[name] = int(masks[name].sum())
    if problems or not there:
        return facts, problems
    if facts.voxels and sum(facts.voxels.values()) == 0 and data.empty_cases == "error":
        files = ", ".join(str(p) for p in sorted(set(case.labels.values())))
        problems.append(
            f"{files}: all background; leave {case.id} out (data.exclude) or set data.empty_cases: allow"
        )
    _measure(facts, [i for _, i in there], images, masks)
    return facts, problems


def label_mask(mask: NiftiVolume, values: list[int] | None) -> NDArray[np.bool_]:
    """Where the label is: its values, or all that is not 0 in a mask of its own."""
    if values is None:
        return np.asarray(mask.array != 0)
    return np.asarray(np.isin(np.rint(mask.array), values))


def _read(path: Path, problems: list[str]) -> NiftiVolume | None:
    try:
        return read_volume(path)
    except UserError as error:
        problems.append(str(error))
        return None


def _image_problems(
    path: Path, image: NiftiVolume, first: tuple[Path, NiftiVolume], tolerance: float
) -> list[str]:
    problems = []
    a = image.array
    if 0 in a.shape:
        return [f"{path}: has no voxels, its shape is {a.shape}"]
    if not np.isfinite(nib.orientations.io_orientation(image.affine)).all():
        problems.append(f"{path}: its affine is not usable: {image.affine.tolist()}")
    if a.dtype.kind not in "biuf":
        problems.append(f"{path}: voxels must be numbers, got {a.dtype}")
    elif a.dtype.kind == "f" and not np.isfinite(a).all():
        problems.append(f"{path}: {int((~np.isfinite(a)).sum())} voxels are NaN or infinite")
    elif a.min() == a.max():
        problems.append(f"{path}: every voxel is {a.min():g}")
    if path != first[0] and (difference := same_grid(first[1], image, tolerance)) is not None:
        problems.append(f"{path}: not on the grid of {first[0]}: {difference}")
    return problems


def _label_problems(
    path: Path,
    mask: NiftiVolume,
    names: list[str],
    data: Data,
    image: tuple[Path, NiftiVolume] | None,
) -> list[str]:
    problems = []
    if (
        image is not None
        and (difference := same_grid(image[1], mask, data.grid_tolerance)) is not None
    ):
        problems.append(f"{path}: not on the grid of its image {image[0]}: {difference}")
    values = np.unique(mask.array)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return [*problems, f"{path}: label values are NaN or infinite"]
    if any(data.labels[n].values is None for n in names):
        return problems
    declared = {0, *data.ignore_values}
    declared.update(v for label in data.labels.values() for v in label.values or [])
    strange = [v for v in values.tolist() if v not in declared]
    if strange:
        shown = ", ".join(f"{v:g}" for v in strange[:5]) + (" …" if len(strange) > 5 else "")
        problems.append(
            f"{path}: label values {shown} are not in the declared set {sorted(declared)}"
            " (data.labels, data.ignore_values)"
        )
    return problems


def _measure(
    facts: CaseFacts,
    there: list[NiftiVolume],
    images: list[NiftiVolume | None],
    masks: dict[str, NDArray[np.bool_]],
) -> None:
    affine = there[0].affine
    orientation = nib.orientations.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(0))
    facts.shape = [int(there[0].array.shape[i]) for i in order]
    facts.spacing = [float(sizes[i]) for i in order]
    facts.orientation = "".join(nib.orientations.aff2axcodes(affine))
    facts.integers = all(i.array.dtype.kind in "iu" for i in there)
    inside = np.any(list(masks.values()), axis=0) if masks else np.zeros(there[0].array.shape, bool)
    rng = np.random.default_rng(0)
    for image in images:
        if image is None:
            facts.intensities.append(None)
            facts.inside.append(np.zeros(0, np.float32))
            continue
        x = image.array.astype(np.float64)
        low, high = np.percentile(x, (0.5, 99.5))
        facts.intensities.append(
            {
                "mean": float(x.mean()),
                "std": float(x.std()),
                "lowest": float(x.min()),
                "highest": float(x.max()),
                "percentile_00_5": float(low),
                "percentile_99_5": float(high),
            }
        )
        sample = x[inside]
        if sample.size > SAMPLED:
            sample = rng.choice(sample, SAMPLED, replace=False)
        facts.inside.append(sample.astype(np.float32))
