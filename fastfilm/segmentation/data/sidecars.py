"""JSON sidecars of images, with BIDS inheritance: files further up hold for all images that their name fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..support.errors import UserError
from ..support.tables import read_object
from .sources import (
    Sidecar,
    parts,
    stem,
)


class Sidecars:
    """Reads sidecars; each JSON file once.

    Args:
        wrong: gets one line for every file that cannot be read.

    A file applies to an image if it lies in the image's folder or one above it (up to the data set's root), has
    the image's suffix, and has no entity that the image has not (``T2w.json``, ``sub-01_T2w.json``). The nearest
    wins, key by key; in one folder, the name with more entities (BIDS specification, "The Inheritance Principle").
    """

    def __init__(self, wrong: Callable[[str], None]) -> None:
        self.wrong = wrong
        self.folders: dict[Path, list[Path]] = {}
        self.read: dict[Path, dict[str, Any]] = {}

    def of(self, image: Path, root: Path | None = None) -> Sidecar:
        """What holds for ``image``.

        Args:
            root: of its BIDS data set; None: only the file of the same name beside the image counts.
        """
        own = image.with_name(f"{stem(image)}.json")
        values: dict[str, Any] = {}
        if root is not None:
            for path in self._above(image, root):
                if path != own:
                    values |= self._object(path)
        beside = self._object(own) if own.exists() or own.is_symlink() else {}
        return Sidecar(
            {**values, **beside}, frozenset(values.keys() - beside.keys()), root or image.parent
        )

    def _above(self, image: Path, root: Path) -> list[Path]:
        """The files that apply, the least specific first."""
        entities, suffix = parts(image)
        have = set(entities.items())
        levels = [image.parent, *image.parent.parents]
        levels = levels[: levels.index(root) + 1] if root in levels else levels[:1]
        found = []
        for folder in reversed(levels):
            if folder not in self.folders:
                self.folders[folder] = sorted(folder.glob("*.json"))
            here = []
            for path in self.folders[folder]:
                theirs, last = parts(path)
                if last == suffix and have.issuperset(theirs.items()):
                    here.append((len(theirs), path))
            found += [path for _, path in sorted(here)]
        return found

    def _object(self, path: Path) -> dict[str, Any]:
        if path not in self.read:
            try:
                self.read[path] = read_object(path)
            except UserError as error:
                self.wrong(str(error))
                self.read[path] = {}
        return self.read[path]


def data_set_of(image: Path) -> Path | None:
    """The root of the BIDS data set that ``image`` lies in: where dataset_description.json is."""
    for folder in image.parents:
        if (folder / "dataset_description.json").is_file():
            return folder
    return None
