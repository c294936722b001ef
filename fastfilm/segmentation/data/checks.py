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

from ..config.sections import Data
from ..images.labels import (
    listed,
    mask_of,
    whole_labels,
)
from ..images.nifti import (
    NiftiVolume,
    Remarks,
    read_volume,
    same_grid,
    voxel_problems,
)
from ..support.errors import UserError
from .sources import Case

SAMPLED = 2000
"""Voxels a case and channel that dataset-wide intensity statistics are drawn from."""

FAR = 1e4
"""Voxels count as outliers from this many widths (of 99 % of the intensities) beyond the bulk on."""

LARGE, SMALL = 50.0, 0.001
"""mm: voxels beyond these make one ask for the unit of length."""


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
        soft: label files that are soft masks.
        outliers: image files with single voxels that are far brighter than all others.
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
    soft: list[str] = field(default_factory=list)
    outliers: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, without the samples."""
        return {k: v for k, v in vars(self).items() if k not in ("inside", "soft", "outliers")}


def check_cases(
    cases: Iterable[Case], data: Data, done: Callable[[], None] = lambda: None, threads: int = 4
) -> tuple[list[CaseFacts], list[str], list[str]]:
    """Reads all files.

    Args:
        done: called after each case.

    Returns:
        the facts of the cases that can be used; one line for everything that is wrong anywhere; one line for
        everything that is remarkable.
    """
    remarks = Remarks()

    def look(case: Case) -> tuple[CaseFacts, list[str]]:
        found = check_case(case, data, remarks)
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
        annotated = [f for f in good if name in f.voxels]
        # without a file of it anywhere it is said of each case already, unless that is allowed
        asked = annotated or data.missing_labels != "error"
        if good and not problems and asked and not any(f.voxels[name] for f in annotated):
            which = f" (values {label.values})" if label.values else ""
            problems.append(f"label {name!r}{which} has no voxel in any case")
    return good, problems, [*remarks.lines(), *_notes(good)]


def _notes(facts: list[CaseFacts]) -> list[str]:
    """What is remarkable about the voxels, each kind in one line."""
    notes = []
    for what, files in (
        (
            "soft masks: voxels of 1/2 and more are the label",
            [p for f in facts for p in f.soft],
        ),
        (
            "single voxels are far brighter than all others (damaged, or metal?)",
            [p for f in facts for p in f.outliers],
        ),
        (
            f"voxels of more than {LARGE:g} mm (is the unit of length right?)",
            [f.id for f in facts if max(f.spacing) > LARGE],
        ),
        (
            f"voxels of less than {SMALL:g} mm (is the unit of length right?)",
            [f.id for f in facts if min(f.spacing) < SMALL],
        ),
    ):
        if files:
            more = ", …" if len(files) > 2 else ""
            notes.append(f"{len(files)}: {what}: {', '.join(files[:2])}{more}")
    return notes


def check_case(
    case: Case, data: Data, remarks: Remarks | None = None
) -> tuple[CaseFacts, list[str]]:
    """The facts of one case, and what is wrong with it; what is remarkable goes to ``remarks``."""
    facts = CaseFacts(case.id, case.subject)
    problems: list[str] = []
    remarks = remarks or Remarks()
    images: list[NiftiVolume | None] = []
    for path in case.images:
        images.append(None if path is None else _read(path, problems, remarks))
    there = [(p, i) for p, i in zip(case.images, images, strict=True) if p and i]
    for path, image in there:
        problems += _image_problems(path, image, there[0], data.grid_tolerance)
    digest = hashlib.sha256()
    for _, image in there:
        digest.update(np.ascontiguousarray(image.array).tobytes())
    facts.digest = digest.hexdigest()
    masks = {}
    for path in sorted(set(case.labels.values())):
        if path in case.images:
            problems.append(f"{path}: is the label of {case.id} and its image")
            continue
        mask = _read(path, problems, remarks)
        if mask is None:
            continue
        names = [n for n, p in case.labels.items() if p == path]
        try:
            labels, soft = whole_labels(path, mask.array)
            for name in names:
                masks[name] = mask_of(path, labels, data.labels[name].values)
                facts.voxels[name] = int(masks[name].sum())
        except UserError as error:
            problems.append(str(error))
            continue
        if soft:
            facts.soft.append(str(path))
        problems += _label_problems(path, mask, labels, names, data, there[0] if there else None)
    if problems or not there:
        return facts, problems
    if facts.voxels and sum(facts.voxels.values()) == 0 and data.empty_cases == "error":
        files = ", ".join(str(p) for p in sorted(set(case.labels.values())))
        problems.append(
            f"{files}: all background; leave {case.id} out (data.exclude) or set data.empty_cases: allow"
        )
    _measure(facts, [i for _, i in there], images, masks)
    facts.outliers = [
        str(path)
        for path, found in zip(case.images, facts.intensities, strict=True)
        if found is not None and _outlying(found)
    ]
    return facts, problems


def _read(path: Path, problems: list[str], remarks: Remarks) -> NiftiVolume | None:
    try:
        volume = read_volume(path)
    except UserError as error:
        problems.append(str(error))
        return None
    remarks.add(path, volume)
    return volume


def _image_problems(
    path: Path, image: NiftiVolume, first: tuple[Path, NiftiVolume], tolerance: float
) -> list[str]:
    a = image.array
    wrong = voxel_problems(path, a)
    problems = [] if wrong is None else [wrong]
    if a.size == 0:
        return problems
    if wrong is None and a.min() == a.max():
        problems.append(f"{path}: every voxel is {a.min():g}")
    if path != first[0] and (difference := same_grid(first[1], image, tolerance)) is not None:
        problems.append(f"{path}: not on the grid of {first[0]}: {difference}")
    return problems


def _label_problems(
    path: Path,
    mask: NiftiVolume,
    labels: NDArray[np.integer],
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
    if any(data.labels[n].values is None for n in names):
        return problems
    declared = {0, *data.ignore_values}
    declared.update(v for label in data.labels.values() for v in label.values or [])
    strange = [v for v in np.unique(labels).tolist() if v not in declared]
    if strange:
        problems.append(
            f"{path}: label values {listed(strange)} are not in the declared set {sorted(declared)}"
            " (data.labels, data.ignore_values)"
        )
    return problems


def _outlying(found: dict[str, float]) -> bool:
    """Whether the highest or lowest value is far beyond the bulk of them."""
    low, high = found["percentile_00_5"], found["percentile_99_5"]
    width = high - low
    return width > 0 and max(found["highest"] - high, low - found["lowest"]) > FAR * width


def _measure(
    facts: CaseFacts,
    there: list[NiftiVolume],
    images: list[NiftiVolume | None],
    masks: dict[str, NDArray[np.bool_]],
) -> None:
    affine, sizes = there[0].affine, there[0].spacing
    orientation = nib.orientations.io_orientation(affine)
    order = np.argsort(orientation[:, 0])
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
