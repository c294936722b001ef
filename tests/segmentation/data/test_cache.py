"""The cache of preprocessed cases: what makes an entry stale, and what is in one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

import nibabel as nib

from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.data.cache import CachedCase, cached
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.images.preprocessing import Normalisation, Preprocessing

SHAPE = (14, 12, 11)
PLAIN = Preprocessing(channels=[Normalisation(kind="none")], crop=False)


def write(path: Path, array: np.ndarray) -> None:
    """Uncompressed, so that other values make a file of the same size."""
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture
def entry(tmp_path: Path) -> Callable[..., CachedCase]:
    """The cached case of an image and two label files, made with the settings that are given."""
    rng = np.random.default_rng(0)
    write(tmp_path / "image.nii", rng.random(SHAPE, np.float32))
    write(tmp_path / "a.nii", rng.integers(0, 4, SHAPE).astype(np.uint8))
    write(tmp_path / "b.nii", rng.integers(0, 4, SHAPE).astype(np.uint8))

    def make(
        labels: Any = (("a", 1), ("b", 1)),
        files: str = "ab",
        preprocessing: Preprocessing = PLAIN,
    ) -> CachedCase:
        data = {"root": "x", "contrasts": ["image"], "labels": dict(labels), "source": "csv"}
        config = parse({"data": data}, "test")
        paths = {n: tmp_path / f"{n}.nii" for n in files}
        case = Case("c", "c", (tmp_path / "image.nii",), paths)
        return cached([case], config.data, preprocessing, tmp_path / "cache")[0]

    return make


def turned(array: np.ndarray) -> np.ndarray:
    """Of [X, Y, Z] what the network sees: axial slices first."""
    return array.transpose(2, 0, 1)


@pytest.mark.parametrize("name", ["image", "a", "b"])
def test_a_file_of_the_same_size_but_another_time_is_read_again(
    entry: Callable[..., CachedCase], tmp_path: Path, name: str
) -> None:
    first = entry()
    assert entry().folder == first.folder
    path = tmp_path / f"{name}.nii"
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    other = np.asarray(nib.load(path).dataobj)[::-1].copy()
    write(path, other)
    os.utime(path, ns=(time, time + 1))
    assert path.stat().st_size == size
    second = entry()
    assert second.folder != first.folder
    array = second.image()[0] if name == "image" else second.masks()["ab".index(name)]
    expected = other if name == "image" else other == 1
    assert np.array_equal(array, turned(expected))


def test_labels_and_preprocessing_have_entries_of_their_own(
    entry: Callable[..., CachedCase], tmp_path: Path
) -> None:
    values = np.asarray(nib.load(tmp_path / "a.nii").dataobj)
    made = {
        "plain": entry(),
        "values": entry([("a", [2, 3]), ("b", 1)]),
        "order": entry([("b", 1), ("a", 1)]),
        "files": entry(files="a"),
        "channels": entry(preprocessing=Preprocessing(crop=False)),
        "spacing": entry(preprocessing=PLAIN.model_copy(update={"spacing": (2.0, None, None)})),
    }
    assert len({c.folder for c in made.values()}) == len(made)
    assert np.array_equal(made["plain"].masks()[0], turned(values == 1))
    assert np.array_equal(made["values"].masks()[0], turned(values >= 2))
    assert np.array_equal(made["order"].masks()[1], turned(values == 1))
    assert made["plain"].known == (True, True) and made["files"].known == (True, False)
    assert not made["files"].masks()[1].any()
    assert abs(made["channels"].image().mean()) < 1e-3 and made["spacing"].shape == (11, 7, 12)


def test_the_voxels_that_are_remembered_are_of_their_label_and_from_all_of_it(
    entry: Callable[..., CachedCase],
) -> None:
    """Label a has more voxels than are kept, so they are a choice by chance."""
    case = entry([("a", [1, 2, 3]), ("b", 2)])
    masks, where = case.masks(), case.where
    assert all(masks[tuple(at)] for at in where.tolist())
    for label in (0, 1):
        mine = {tuple(at[1:]) for at in where.tolist() if at[0] == label}
        there = {tuple(at) for at in np.argwhere(masks[label]).tolist()}
        assert len(mine) == min(len(there), 1000)
        assert {at[0] for at in mine} == set(range(11)), "in every slice"
