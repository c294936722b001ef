"""Sliding windows against a whole map of weights, and where windows begin against every size there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("numpy")

from fastfilm.segmentation.prediction.windows import (
    gaussian,
    sliding_windows,
    starts,
)


def test_windows_cover_an_axis_evenly_with_the_asked_overlap_and_none_too_many() -> None:
    for size, window, overlap in itertools.product(
        range(1, 40), (1, 2, 5, 8, 12), (0, 0.2, 0.5, 0.75, 0.9)
    ):
        found = starts(size, window, overlap)
        step = max(1, int(window * (1 - overlap)))
        apart = [b - a for a, b in itertools.pairwise(found)]
        assert found[0] == 0 and found[-1] == max(0, size - window)
        assert (
            all(1 <= a <= step for a in apart)
            and max(apart, default=0) - min(apart, default=0) <= 1
        )
        assert len(found) == max(1, math.ceil((size - window) / step) + 1)


def test_weights_are_those_of_a_gaussian_about_the_middle() -> None:
    for n in (1, 2, 7, 16, 64):
        found = gaussian(n)
        expected = [
            max(1e-3, math.exp(-0.5 * ((i - (n - 1) / 2) / (n / 8)) ** 2)) for i in range(n)
        ]
        torch.testing.assert_close(found, torch.tensor(expected))


def network(x: Tensor) -> Tensor:
    """Depends on where a voxel lies in its window, and on all of the window."""
    place = sum(
        torch.linspace(0, axis + 1.0, n).reshape([-1, *[1] * (x.dim() - 3 - axis)])
        for axis, n in enumerate(x.shape[2:])
    )
    mean = x.mean(tuple(range(1, x.dim())), keepdim=True)
    return torch.cat([x[:, :1] * place, x[:, -1:] + mean], 1)


def expected(image: Tensor, patch: tuple[int, ...], overlap: float) -> Tensor:
    """All windows of the padded image summed up, over the sum of their weights."""
    flat, patch = len(patch) == 2, (1, *patch)[-3:]
    short = [max(0, p - n) for p, n in zip(patch, image.shape[1:], strict=True)]
    pads = [(s // 2, s - s // 2) for s in short]
    padded = torch.nn.functional.pad(image, [p for pair in reversed(pads) for p in pair])
    factors = [torch.ones(1) if p == 1 else gaussian(p) for p in patch]
    weight = torch.einsum("i,j,k->ijk", *factors)
    total, weights = torch.zeros(2, *padded.shape[1:]), torch.zeros(padded.shape[1:])
    begins = [starts(n, p, overlap) for n, p in zip(padded.shape[1:], patch, strict=True)]
    for corner in itertools.product(*begins):
        at = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        x = padded[(slice(None), *at)][None]
        out = network(x.squeeze(2)).unsqueeze(2) if flat else network(x)
        total[(slice(None), *at)] += weight * out[0]
        weights[at] += weight
    inside = tuple(slice(b, b + n) for (b, _), n in zip(pads, image.shape[1:], strict=True))
    return (total / weights)[(slice(None), *inside)]


@pytest.mark.parametrize(
    "patch", [(4, 6), (12, 5), (4, 4, 6), (9, 3, 12), (3, 16, 2), (16, 15, 14)]
)
@pytest.mark.parametrize("shape", [(10, 7, 9), (3, 14, 5)])
@pytest.mark.parametrize(("overlap", "batch"), [(0.5, 1), (0.25, 5), (0.7, 3)])
def test_planes_are_those_of_a_map_of_everything(
    patch: tuple[int, ...], shape: tuple[int, ...], overlap: float, batch: int
) -> None:
    image = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    parts, reached = [], 0
    for first, planes in sliding_windows(image, patch, network, overlap=overlap, batch=batch):
        assert first == reached
        reached += planes.shape[1]
        parts.append(planes.clone())
    assert reached == shape[0]
    torch.testing.assert_close(
        torch.cat(parts, 1), expected(image, patch, overlap), rtol=1e-4, atol=1e-5
    )
