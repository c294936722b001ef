"""NIfTI files: damage, units of length, affines that disagree, sizes; label files that are not quite whole."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

import nibabel as nib

from fastfilm.segmentation.images.labels import mask_of, whole_labels
from fastfilm.segmentation.images.nifti import (
    Remarks,
    read_volume,
    same_grid,
    voxel_problems,
)
from fastfilm.segmentation.support import memory
from fastfilm.segmentation.support.errors import UserError

ARRAY = np.random.default_rng(0).normal(100, 20, (9, 8, 7)).astype(np.float32)
AFFINE = np.diag([1.5, 2.0, 3.0, 1.0])


def written(path: Path, array: Any = ARRAY, affine: Any = AFFINE, unit: str = "mm") -> Path:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units(xyz=unit)
    nib.save(image, path)
    return path


def said(*paths: Path) -> list[str]:
    remarks = Remarks()
    for path in paths:
        remarks.add(path, read_volume(path))
    return list(remarks.lines())


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_file_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path / f"a.{ending}")
    volume = read_volume(path)
    assert np.array_equal(volume.array, ARRAY) and np.array_equal(volume.affine, AFFINE)
    assert volume.spacing == (1.5, 2.0, 3.0) and said(path) == []


def test_a_flipped_bit_anywhere_in_a_compressed_file_is_refused_or_changes_nothing(
    tmp_path: Path,
) -> None:
    data = written(tmp_path / "a.nii.gz").read_bytes()
    refused = 0
    for i in np.random.default_rng(1).integers(10, len(data), 60):
        for bit in (1, 64):
            damaged = bytearray(data)
            damaged[i] ^= bit
            (tmp_path / "b.nii.gz").write_bytes(damaged)
            try:
                assert np.array_equal(read_volume(tmp_path / "b.nii.gz").array, ARRAY)
            except UserError as error:
                assert "b.nii.gz" in str(error)
                refused += 1
    assert refused >= 110  # of 120: few bits of the gzip header say nothing about the data


@pytest.mark.parametrize("cut", [1, 8, 100, 600])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int, ending: str) -> None:
    path = written(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="cannot be read as NIfTI"):
        read_volume(path)


def test_the_unit_of_length_is_respected_and_an_unknown_one_is_said_once(tmp_path: Path) -> None:
    scale = np.diag([1000.0] * 3 + [1])
    volumes = [
        read_volume(written(tmp_path / "mm.nii.gz")),
        read_volume(written(tmp_path / "um.nii.gz", affine=scale @ AFFINE, unit="micron")),
        read_volume(
            written(tmp_path / "m.nii.gz", affine=np.linalg.inv(scale) @ AFFINE, unit="meter")
        ),
    ]
    for v in volumes:
        np.testing.assert_allclose(v.affine, AFFINE, rtol=1e-6)
        assert same_grid(v, volumes[0]) is None
    unknown = [written(tmp_path / f"{i}.nii.gz", unit="unknown") for i in range(3)]
    (line,) = said(*unknown, tmp_path / "mm.nii.gz")
    assert line.startswith("3 files: no unit of length in the header; taken as mm: ")


def test_affines_that_disagree_or_are_sheared_are_said_with_what_is_used(tmp_path: Path) -> None:
    moved = nib.Nifti1Image(ARRAY, AFFINE)
    moved.header.set_xyzt_units(xyz="mm")
    moved.set_sform(AFFINE, 1)
    other = AFFINE.copy()
    other[0, 3] += 30
    moved.set_qform(other, 1)
    nib.save(moved, tmp_path / "q.nii.gz")
    (line,) = said(tmp_path / "q.nii.gz")
    assert "the sform is used" in line and "30 mm apart" in line
    assert np.array_equal(read_volume(tmp_path / "q.nii.gz").affine, AFFINE)
    bent = AFFINE.copy()
    bent[0, 1] = 0.4
    (line,) = said(written(tmp_path / "s.nii.gz", affine=bent))
    assert "not at right angles" in line and "by 11 degrees" in line
    none = nib.Nifti1Image(ARRAY, None)
    none.header.set_xyzt_units(xyz="mm")
    nib.save(none, tmp_path / "n.nii.gz")
    (line,) = said(tmp_path / "n.nii.gz")
    assert "neither sform nor qform" in line
    turned = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ AFFINE[:3, :3], [1, 2, 3]
    )
    assert said(written(tmp_path / "o.nii.gz", affine=turned)) == [], "oblique is not sheared"


def test_what_the_memory_does_not_hold_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((2000, 2000, 800))
    header.set_data_dtype(np.float32)
    header["vox_offset"] = 352
    with gzip.open(tmp_path / "bomb.nii.gz", "wb") as file:
        file.write(header.binaryblock + bytes(4 + 1000))
    monkeypatch.setattr(memory, "available", lambda: 8 * 2**30)
    with pytest.raises(UserError, match=r"2000x2000x800 voxels need 83\.4 GiB .* 8\.0 GiB are"):
        read_volume(tmp_path / "bomb.nii.gz")


def test_bytes_behind_the_data_are_said(tmp_path: Path) -> None:
    plain = written(tmp_path / "a.nii")
    plain.write_bytes(plain.read_bytes() + bytes(40))
    with gzip.open(tmp_path / "b.nii.gz", "wb") as file:
        file.write(plain.read_bytes())
    (line,) = said(plain, tmp_path / "b.nii.gz")
    assert "2 files: the file holds more than its header says" in line and "40 bytes" in line


@pytest.mark.parametrize(
    ("value", "message"),
    [(1.8e21, "1.8e+21 in 1 voxels"), (-1e13, "1e+13"), (np.nan, "1 voxels are NaN")],
)
def test_intensities_that_no_scanner_gives_are_named(
    tmp_path: Path, value: float, message: str
) -> None:
    array = ARRAY.copy()
    array[1, 2, 3] = value
    assert message in (voxel_problems(tmp_path / "a.nii", array) or "")
    assert voxel_problems(tmp_path / "a.nii", ARRAY * 1e6) is None


def test_a_link_to_a_file_that_was_not_fetched_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").symlink_to(tmp_path / "annex" / "objects" / "x")
    with pytest.raises(UserError, match=r"is a link to .* not there .*datalad get"):
        read_volume(tmp_path / "a.nii.gz")


def labels(values: list[float], dtype: Any = np.float64) -> tuple[list[int], bool]:
    array, soft = whole_labels(Path("l.nii"), np.array(values, dtype))
    assert array.dtype.kind in "iu"
    return array.tolist(), soft


def test_labels_that_are_nearly_whole_are_whole() -> None:
    assert labels([0, 1.0000000591, 2.0004, 2.9996]) == ([0, 1, 2, 3], False)
    assert labels([0, 255], np.uint8) == ([0, 255], False)
    assert labels([-1e-7, 1], np.float32) == ([0, 1], False)
    assert labels([True, False], bool) == ([1, 0], False)


def test_a_soft_mask_is_cut_at_one_half() -> None:
    assert labels([1e-6, 0.3, 0.4999, 0.5, 0.7, 1.0]) == ([0, 0, 0, 1, 1, 1], True)
    assert labels([1e-6, 1.0]) == ([0, 1], False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1.5, 2], "label values 1.5 are neither whole"),
        ([0, 0.25, 2], "0.25 .*1 voxels"),
        ([-0.5, 1], "-0.5"),
        ([0, np.nan], "NaN"),
        ([0, 1e20], "1e\\+20"),
    ],
)
def test_labels_that_are_neither_are_refused_with_their_values(
    values: list[float], message: str
) -> None:
    with pytest.raises(UserError, match=f"l.nii: .*{message}"):
        labels(values)


def test_digits_tell_a_label_from_a_whole_number() -> None:
    with pytest.raises(UserError, match=r"values 3\.0011 are"):
        labels([0, 3.0011])


def test_a_mask_of_its_own_is_all_that_is_above_0_and_has_no_negative_values() -> None:
    array = np.array([0, 1, 7])
    assert mask_of(Path("l"), array, None).tolist() == [False, True, True]
    assert mask_of(Path("l"), array, [7, 2]).tolist() == [False, False, True]
    with pytest.raises(UserError, match="values below 0"):
        mask_of(Path("l"), np.array([-1, 1]), None)
