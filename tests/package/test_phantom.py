"""The built-in phantom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastfilm.phantom import LESIONS, make_phantom

SMALL = (48, 56, 24)


def arrays(**settings: Any) -> tuple[np.ndarray, np.ndarray]:
    image, mask = make_phantom(**{"shape": SMALL, **settings})
    return np.asarray(image.dataobj), np.asarray(mask.dataobj)


@pytest.mark.parametrize("tumour_type", LESIONS)
def test_image_is_finite_float32_and_mask_marks_a_small_part(tumour_type: str) -> None:
    image, mask = arrays(tumour_type=tumour_type)
    assert image.shape == mask.shape == SMALL
    assert image.dtype == np.float32 and mask.dtype == np.uint8
    assert np.isfinite(image).all() and image.min() >= 0
    assert set(np.unique(mask)) == {0, 1}
    assert 0 < mask.mean() < 0.1


def test_same_arguments_give_the_same_bits() -> None:
    first, second = arrays(seed=3), arrays(seed=3)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])


def test_seed_changes_anatomy_and_lesion() -> None:
    first, second = arrays(seed=0), arrays(seed=1)
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], second[1])


def test_tumour_types_share_everything_outside_the_lesion() -> None:
    a, b = arrays(tumour_type="astrocytoma")[0], arrays(tumour_type="hemangioblastoma")[0]
    assert 0.8 < np.isclose(a, b, rtol=1e-4, atol=1e-2).mean() < 1


def test_target_of_hemangioblastoma_is_the_bright_part_beside_a_dark_cyst() -> None:
    image, mask = arrays(tumour_type="hemangioblastoma", shape=(96, 96, 48))
    near = np.argwhere(mask)
    box = tuple(slice(low, high + 1) for low, high in zip(near.min(0), near.max(0), strict=True))
    inside, outside = image[box][mask[box] == 1], image[box][mask[box] == 0]
    assert np.median(inside) > 600
    assert (outside < 200).mean() > 0.2


def test_target_of_ependymoma_includes_its_cavity() -> None:
    image, mask = arrays(tumour_type="ependymoma", shape=(96, 96, 48))
    assert (image[mask == 1] < 250).any()


@pytest.mark.parametrize("tumour_type", LESIONS)
@pytest.mark.parametrize("shape", [(8, 8, 8), (8, 64, 9)])
def test_mask_is_never_empty(tumour_type: str, shape: tuple[int, ...]) -> None:
    for seed in range(5):
        assert arrays(tumour_type=tumour_type, shape=shape, seed=seed)[1].any()


def test_spacing_is_the_voxel_size() -> None:
    image, mask = make_phantom(shape=SMALL, spacing=(0.5, 1.0, 4.0))
    assert image.header.get_zooms() == mask.header.get_zooms() == (0.5, 1.0, 4.0)
    assert image.header.get_xyzt_units()[0] == "mm"


@pytest.mark.parametrize("name", ["head.nii.gz", "head.nii"])
def test_files_hold_what_is_returned(tmp_path: Any, name: str) -> None:
    nibabel = pytest.importorskip("nibabel")
    image, mask = make_phantom(tmp_path / name, shape=SMALL)
    for path, made in ((name, image), (name.replace("head", "head_mask"), mask)):
        read = nibabel.load(tmp_path / path)
        assert np.array_equal(np.asarray(read.dataobj), np.asarray(made.dataobj))
        assert np.array_equal(read.affine, made.affine)


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"tumour_type": "glioma"}, "tumour_type must be one of astrocytoma.*'glioma'"),
        ({"shape": (64, 64)}, r"shape must be three integers.*\(64, 64\)"),
        ({"shape": (64, 64, 7)}, "at least 8"),
        ({"shape": (64, 64, 16.5)}, "shape"),
        ({"shape": 64}, "shape"),
        ({"spacing": (1.0, 1.0)}, "spacing"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing"),
        ({"spacing": (1.0, float("nan"), 1.0)}, "spacing"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"path": "head.png"}, "path must end in .nii"),
    ],
)
def test_bad_argument_is_named(bad: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        make_phantom(**bad)


def test_a_look_of_another_type_changes_the_target_and_not_the_image() -> None:
    look = {"look": "ependymoma", "seed": 3}
    found = {t: arrays(tumour_type=t, **look) for t in LESIONS}
    images = [image for image, _ in found.values()]
    assert all(np.array_equal(images[0], i) for i in images[1:])
    astro, ependymoma, hemangio = (found[t][1] != 0 for t in LESIONS)
    assert (hemangio <= ependymoma).all() and (ependymoma <= astro).all()
    assert hemangio.sum() < ependymoma.sum() < astro.sum()
    with pytest.raises(ValueError, match="look"):
        make_phantom(shape=SMALL, look="glioma")
