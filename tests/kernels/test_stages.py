"""Partial results of many tiles: put together in two stages, whole, in a fixed order, and by enough programs."""

from __future__ import annotations

import pytest
import torch

from fastfilm.ops import reference, spec
from tests.support.yardstick import relative_error

pytest.importorskip("triton", reason="the package triton is not installed")

from fastfilm.kernels import common, conv_dgrad, conv_fprop, pointwise, taps

TILE = conv_fprop.CONFIGS_FLOAT32[1]
"""4 x 4 voxels, so that small maps have many tiles."""


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes more than 4 partial results of a sample many, and notes how many there were; 3 are put together."""
    seen: list[int] = []

    def three(slots: int) -> int:
        seen.append(slots)
        return 3

    monkeypatch.setattr(common, "SLOTS", 4)
    monkeypatch.setattr(common, "share_of", three)
    return seen


@pytest.mark.parametrize("slots", [1057, 4096, 16384, 131072, 2_000_003])
def test_the_last_stage_has_few_partial_results_and_the_first_enough_programs(slots: int) -> None:
    programs = common.cdiv(slots, common.share_of(slots))
    assert programs <= common.SLOTS == 1056
    assert slots < 4096 or programs >= 32


# 4 and 7 tiles: one share is whole, the last has one; 12 tiles: shares alone
@pytest.mark.parametrize(("depth", "staged"), [(4, False), (7, True), (12, True)])
def test_moments_of_a_convolution_are_those_of_all_its_tiles(
    depth: int, staged: bool, shares: list[int], device: str
) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, depth, 4, 4, generator=generator)
    x += torch.arange(depth)[:, None, None]  # tiles of other means
    weight = torch.randn(9, 3, 1, 1, 1, generator=generator)
    exact = reference.moments(torch.nn.functional.conv3d(x.double(), weight.double()))
    given = spec.channels_last(x.to(device)), spec.channels_last(weight.to(device))
    front = (None, None, "none", None, "none", (1, 1, 1), (0, 0, 0), True)
    _, stats = conv_fprop.fprop(*given, *front, TILE)
    assert shares == ([depth] if staged else [])
    assert relative_error(stats, exact) < 1e-6
    for n in range(2):
        assert relative_error(stats[1, n], exact[1, n]) < 1e-6
    _, again = conv_fprop.fprop(*given, *front, TILE)
    assert torch.equal(stats, again)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_gradient_at_coefficients_is_that_of_all_tiles(
    stride: int, shares: list[int], device: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    x, weight = (
        torch.randn(2, 3, 13, 7, generator=generator),
        torch.randn(4, 3, 3, 3, generator=generator),
    )
    coef = torch.randn(7, 2, 3, generator=generator)
    exact = [t.double().requires_grad_() for t in (x, coef)]
    v = reference.materialise(exact[0], exact[1], "leaky_relu")
    y = torch.nn.functional.conv2d(v, weight.double(), stride=stride, padding=1)
    e = torch.randn(y.shape, generator=generator)
    truth = torch.autograd.grad(y, exact, e.double())
    given = [spec.channels_last(t.to(device)) for t in (e, weight, x)]
    tail = (coef.to(device), "leaky_relu", (stride, stride), (1, 1), TILE)
    found = conv_dgrad.dgrad(*given, *tail)
    tiles = stride**2 * common.cdiv(-(-13 // stride), 4) * common.cdiv(-(-7 // stride), 4)
    assert shares == [tiles] and tiles % 3
    for ours, exactly in zip(found, truth, strict=True):
        assert ours is not None and relative_error(ours, exactly) < 2e-6
    for ours, again in zip(found, conv_dgrad.dgrad(*given, *tail), strict=True):
        assert ours is not None and again is not None and torch.equal(ours, again)


def test_moments_keep_their_digits_through_two_stages(shares: list[int], device: str) -> None:
    y = torch.randn(1, 2, 7, 4, 4, generator=torch.Generator().manual_seed(9)) + 1000.0
    y[0, :, :2] = 0.0  # as the border of an image
    y = spec.channels_last(y)
    exact = reference.moments(y.double())
    counts = torch.full((1, 7), 16.0, device=device)
    planes = y.double().flatten(3)
    mean = planes.mean(3)
    m2 = (planes - mean[..., None]).square().sum(3)
    partials = torch.stack([mean, m2], 1).permute(0, 3, 1, 2).float().contiguous().to(device)
    found = common.finish_moments(partials, counts).cpu().double()
    assert shares == [7]
    assert relative_error(found[0], exact[0]) < 1e-6 and relative_error(found[1], exact[1]) < 1e-6


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_passes_over_a_long_map_leave_few_partial_results(batch: int) -> None:
    """Their programs take several blocks each, so that one stage is enough."""
    *_, programs = pointwise.blocks(128**3, 64, batch, reduces=True)
    *_, gathering = taps.blocks((128, 128, 128), 64, batch, 2048)
    assert 128 < programs <= common.SLOTS and 128 < gathering <= common.SLOTS
