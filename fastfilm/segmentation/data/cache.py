"""Preprocessed cases on disk: arrays that loaders map into memory, so that memory stays flat.

    CACHE/<case>-<digest>/image.npy   float32 [C, D, H, W]
                          masks.npy   uint8 [K, D, H, W], one channel a label (zeros where it is not annotated)
                          where.npy   int16 [P, 4]: label and position of voxels inside labels, a sample
                          info.json   known labels, spacing

The digest covers the preprocessing, the labels and size and time of the files, so that a stale entry is never
used. An entry is made in a folder of its own and moved into place: it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..config.sections import Data
from ..images.labels import mask_of, whole_labels
from ..images.nifti import read_volume, same_grid
from ..images.preprocessing import Preprocessing
from ..support.console import say
from ..support.errors import Problems, UserError
from ..support.files import read_json
from ..support.names import file_name
from .checks import check_case
from .sources import Case

FORMAT = 3
"""Of the entries: one more where the same files make other arrays than before."""

POINTS = 1000
"""Voxels remembered of each label."""


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case.

    Attributes:
        case: where it came from.
        folder: of its arrays.
        known: per label, whether it was annotated.
        where: label and position [P, 4] of voxels inside labels.
        shape: (D, H, W).
        spacing: mm along D, H, W.
    """

    case: Case
    folder: Path
    known: tuple[bool, ...]
    where: NDArray[np.int16]
    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    def image(self) -> NDArray[np.float32]:
        """[C, D, H, W], mapped into memory read-only."""
        return np.asarray(np.load(self.folder / "image.npy", mmap_mode="r"))

    def masks(self) -> NDArray[np.uint8]:
        """[K, D, H, W], mapped into memory read-only."""
        return np.asarray(np.load(self.folder / "masks.npy", mmap_mode="r"))


def cached(
    cases: Sequence[Case],
    data: Data,
    preprocessing: Preprocessing,
    folder: Path,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> list[CachedCase]:
    """The preprocessed form of each case, made where it is not there yet.

    Raises:
        Problems: files that have become unreadable since the plan was made.
        UserError: the cache cannot be written.
    """
    done = progress(len(cases))
    result, wrong = [], []
    for case in cases:
        try:
            result.append(_one(case, data, preprocessing, folder))
        except _Unreadable as error:
            wrong.append(f"{case.id}: {error}")
        done()
    if wrong:
        raise Problems("cases that cannot be preprocessed", wrong)
    return result


class _Unreadable(UserError):
    pass


def _one(case: Case, data: Data, preprocessing: Preprocessing, root: Path) -> CachedCase:
    folder = root / f"{file_name(case.id)}-{_digest(case, data, preprocessing)}"
    if not (folder / "info.json").is_file():
        if case.stamps and case.stamped().stamps != case.stamps:
            # not the files that the plan was made of
            problems = check_case(case, data)[1]
            if problems:
                raise _Unreadable(f"has changed since the plan was made: {'; '.join(problems)}")
            say(f"note: {case.id}: files have changed since the plan was made")
        try:
            arrays = _make(case, data, preprocessing)
        except UserError as error:
            raise _Unreadable(str(error)) from error
        _write(folder, *arrays)
    info = read_json(folder / "info.json")
    return CachedCase(
        case,
        folder,
        tuple(info["known"]),
        np.load(folder / "where.npy"),
        tuple(info["shape"]),
        tuple(info["spacing"]),
    )


def _digest(case: Case, data: Data, preprocessing: Preprocessing) -> str:
    files = []
    for path in [*case.images, *case.labels.values()]:
        with contextlib.suppress(OSError):
            stat = None if path is None else path.stat()
            files.append(stat and [str(path), stat.st_size, stat.st_mtime_ns])
    labels = {n: label.model_dump() for n, label in data.labels.items()}
    value = [FORMAT, preprocessing.model_dump(), labels, sorted(case.labels), files]
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _make(
    case: Case, data: Data, preprocessing: Preprocessing
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.int16], dict[str, object]]:
    images = [None if p is None else read_volume(p) for p in case.images]
    first = next(i for i in images if i is not None)
    done = preprocessing([None if i is None else i.array for i in images], first.affine)
    masks = np.zeros((len(data.labels), *first.array.shape), np.uint8)
    for k, (name, label) in enumerate(data.labels.items()):
        path = case.labels.get(name)
        if path is not None:
            volume = read_volume(path)
            if (difference := same_grid(first, volume, data.grid_tolerance)) is not None:
                raise UserError(f"{path}: not on the grid of its image: {difference}")
            masks[k] = mask_of(path, whole_labels(path, volume.array)[0], label.values)
    placed = preprocessing.masks(masks, done.geometry)
    rng = np.random.default_rng(0)
    where = []
    for k in range(len(placed)):
        at = np.argwhere(placed[k])
        if len(at) > POINTS:
            at = rng.choice(at, POINTS, replace=False)
        where.append(np.column_stack([np.full(len(at), k), at]))
    info: dict[str, object] = {
        "known": [name in case.labels for name in data.labels],
        "shape": list(done.geometry.grid),
        "spacing": list(done.geometry.spacing),
    }
    return done.image, placed, np.concatenate(where).astype(np.int16), info


def _write(
    folder: Path,
    image: NDArray[np.float32],
    masks: NDArray[np.uint8],
    where: NDArray[np.int16],
    info: dict[str, object],
) -> None:
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".writing-"))
        np.save(temporary / "image.npy", image)
        np.save(temporary / "masks.npy", masks)
        np.save(temporary / "where.npy", where)
        (temporary / "info.json").write_text(json.dumps(info), encoding="utf-8")
        # another process may have made the same entry meanwhile
        with contextlib.suppress(FileExistsError):
            os.rename(temporary, folder)
    except OSError as error:
        if not (folder / "info.json").is_file():
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
