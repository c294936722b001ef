"""Preprocessing against interpolation, boxes and statistics that are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.images.preprocessing import Normalisation, Preprocessing

PLAIN = Normalisation(kind="none")


def linear(a: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """[D, H, W] axis by axis: the values at the centres of ``grid``'s voxels over the same extent."""
    for axis, n in enumerate(grid):
        at = (np.arange(n) + 0.5) * a.shape[axis] / n - 0.5
        a = np.apply_along_axis(lambda v, at=at: np.interp(at, np.arange(len(v)), v), axis, a)
    return a


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing", [(0.8, 1.7, 3.0), (2.5, None, 1.3)])
def test_images_and_masks_are_resampled_linearly_over_the_same_extent(
    axis: Any, spacing: Any
) -> None:
    rng = np.random.default_rng(axis)
    image, mask = rng.random((7, 9, 8)), rng.random((2, 7, 9, 8)) < 0.4
    now = (1.0, 1.5, 2.0)
    preprocessing = Preprocessing(slice_axis=axis, spacing=spacing, channels=[PLAIN], crop=False)
    done = preprocessing([image], np.diag([*now, 1]))
    order = [axis, *(a for a in range(3) if a != axis)]
    sizes = [image.shape[a] for a in order]
    extents = [image.shape[a] * now[a] for a in order]
    for n, size, extent, mm, a in zip(
        done.geometry.grid, sizes, extents, done.geometry.spacing, order, strict=True
    ):
        wanted = spacing[a]
        assert n * mm == pytest.approx(extent), "the extent is kept"
        assert n == size if wanted is None else abs(n - extent / wanted) <= 0.5
    np.testing.assert_allclose(
        done.image[0], linear(image.transpose(order), done.geometry.grid), atol=1e-5
    )
    placed = preprocessing.masks(mask, done.geometry)
    for got, m in zip(placed, mask, strict=True):
        expected = linear(m.transpose(order).astype(float), done.geometry.grid)
        sure = abs(expected - 0.5) > 1e-4
        np.testing.assert_array_equal(got[sure], (expected > 0.5)[sure])
    back = done.geometry.from_network(done.image)[0].transpose(order)
    np.testing.assert_allclose(back, linear(done.image[0], tuple(sizes)), atol=1e-5)


def test_the_box_holds_what_any_channel_has_and_the_rest_gets_the_value_outside() -> None:
    images = np.zeros((3, 9, 8, 7), np.float32)
    images[0, 2, 3, 1] = images[1, 6, 4, 5] = 1
    done = Preprocessing(channels=[PLAIN] * 4)([*images, None], np.diag([-1, 1, 1, 1]))
    assert done.image.shape == (4, 5, 5, 2)
    inside = np.zeros((9, 8, 7), bool)
    inside[2:7, 3:5, 1:6] = True
    back = done.geometry.from_network(done.image + 1, outside=-3)
    assert (back[:, ~inside] == -3).all() and (back[:, inside] >= 1).all()
    assert np.array_equal(back[:3, inside], images[:, inside] + 1)


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("kind", ["zscore", "percentile", "minmax", "ct"])
def test_normalisation_is_that_of_its_formula(kind: Any, nonzero: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.gamma(2, 50, (12, 13, 14)).astype(np.float32)
    x[:4] = 0
    constants = {"low": 20.0, "high": 250.0, "mean": 90.0, "std": 40.0}
    found = Normalisation(kind=kind, nonzero=nonzero, **constants)(x)
    if kind == "ct":
        expected = (np.clip(x, 20, 250) - 90) / 40
    else:
        used = x[x != 0] if nonzero else x
        low, high = np.quantile(used, (0.005, 0.995))
        y, used = (np.clip(v, low, high) if kind == "percentile" else v for v in (x, used))
        shift, scale = used.mean(), used.std()
        if kind == "minmax":
            shift, scale = used.min(), used.max() - used.min()
        expected = np.where((x != 0) | (not nonzero), (y - shift) / scale, 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)
