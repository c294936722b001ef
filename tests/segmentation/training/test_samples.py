"""Training samples: tasks, places, hidden metadata, windows of image and mask, random changes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.sections import Augmentation, MetadataKey
from fastfilm.segmentation.data.cache import CachedCase
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.metadata.encoder import MetadataEncoder
from fastfilm.segmentation.training.augment import Augment, is_flat
from fastfilm.segmentation.training.dataset import (
    Samples,
    collate,
    cut,
)
from fastfilm.segmentation.training.sampling import (
    Draw,
    Draws,
    Steps,
    place,
)

OFF = dict.fromkeys(("affine", "noise", "blur", "brightness", "gamma"), 0.0)


def made(
    shape: tuple[int, ...], where: Any = (), folder: Path = Path("x"), name: str = "c"
) -> CachedCase:
    points = np.array(where, np.int16).reshape(-1, 4)
    case = Case(name, name, (Path("x"),), {}, {"kind": "ab"[len(name) % 2]})
    return CachedCase(case, folder, (True, True), points, shape, (1.0, 1.0, 1.0))


def corners(
    case: CachedCase, size: Any, share: float, count: int, task: Any = None
) -> list[tuple[int, ...]]:
    draws = (Draw(0, task, np.random.default_rng([7, n])) for n in range(count))
    return [place(d, case, size, share) for d in draws]


def test_the_tasks_of_different_cases_are_mixed_within_a_round() -> None:
    draws = Draws([[True, True]] * 6, tasks=True)
    for r in range(4):
        seen = Counter(draws(n).task for n in range(6 * r, 6 * r + 6))
        assert seen == {0: 3, 1: 3}


def test_orders_follow_the_seed() -> None:
    orders = {tuple(Draws([[True]] * 9, seed=s)(n).case for n in range(9)) for s in range(5)}
    assert len(orders) == 5


def test_labels_are_drawn_equally_often_however_large_they_are() -> None:
    case = made((20, 4, 4), [[0, d, 1, 1] for d in range(10)] * 20 + [[1, 15, 1, 1]])
    found = Counter(c[0] == 15 for c in corners(case, (1, 4, 4), 1.0, 400))
    assert 150 < found[True] < 250


def test_the_asked_share_of_the_patches_has_a_label() -> None:
    case = made((50, 4, 4), [[0, 7, 1, 1]])
    for share in (0.0, 0.3, 1.0):
        hit = np.mean([c[0] == 7 for c in corners(case, (1, 4, 4), share, 1000)])
        assert hit == pytest.approx(share + (1 - share) / 50, abs=0.05)


@pytest.mark.parametrize("at", [(0, 9, 19), (12, 3, 10)])
def test_the_labels_voxel_is_at_every_place_of_the_patch_that_the_image_allows(at: Any) -> None:
    case, size = made((20, 20, 20), [[1, *at], [0, 10, 10, 10]]), (4, 4, 4)
    found = corners(case, size, 1.0, 600, task=1)
    for axis in range(3):
        allowed = {c for c in range(17) if c <= at[axis] < c + 4}
        assert {c[axis] for c in found} == allowed


def test_a_window_that_leaves_the_array_is_zero_there() -> None:
    array = np.random.default_rng(0).random((2, 4, 5, 6))
    for corner in ((-2, 3, 4), (1, -1, 0), (-3, -3, -3), (0, 2, -1)):
        size = (5, 4, 7)
        expected = np.zeros((2, *size))
        for offset in np.ndindex(*size):
            at = tuple(c + o for c, o in zip(corner, offset, strict=True))
            if all(0 <= i < n for i, n in zip(at, array.shape[1:], strict=True)):
                expected[(slice(None), *offset)] = array[(slice(None), *at)]
        assert np.array_equal(cut(array, corner, size), expected)


@pytest.fixture
def samples(tmp_path: Path) -> dict[str, Any]:
    """What samples are made of: two cases in which mask k is the k-th bit of the image, encoder, labels."""
    cases = []
    for i, name in enumerate(("c", "cc")):
        folder = tmp_path / name
        folder.mkdir()
        image = np.random.default_rng(i).integers(0, 4, (1, 6, 7, 8)).astype(np.float32)
        np.save(folder / "image.npy", image)
        masks = np.concatenate([image % 2, image // 2]).astype(np.uint8)
        np.save(folder / "masks.npy", masks)
        cases.append(made((6, 7, 8), np.argwhere(masks), folder, name))
    rows = {c.case.id: {**c.case.metadata, "task": t} for c, t in zip(cases, "xy", strict=True)}
    keys = {"kind": MetadataKey(dropout=0.5), "task": MetadataKey(dropout=0.0)}
    return {"cases": cases, "encoder": MetadataEncoder.fit(rows, keys), "labels": ["x", "y"]}


@pytest.mark.parametrize("patch", [[4, 5], [3, 4, 5]])
def test_image_mask_and_task_of_a_sample_belong_together(
    samples: dict[str, Any], patch: list[int]
) -> None:
    """And every sample is changed by a seed of its own, which is the same when it is asked for again."""
    encoder, seeds = samples["encoder"], []

    def changed(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        seeds.append(seed)
        return x, y

    draws = Draws([[True, True]] * 2, tasks=True, seed=1)
    dataset = Samples(
        draws=draws,
        patch_size=patch,
        foreground=0.5,
        augment=changed,  # type: ignore[arg-type]
        task_key="task",
        **samples,
    )
    seen = Counter()
    for n in range(40):
        batch, draw = dataset[n], draws(n)
        assert batch.image.shape == (1, 1, *patch) and batch.known.tolist() == [[True]]
        bit = batch.image % 2 if draw.task == 0 else batch.image // 2
        assert torch.equal(bit, batch.masks.float())
        row = dict(zip(encoder.columns(), batch.rows[0].tolist(), strict=True))
        assert (row["task=x"], row["task=y"]) == ((1, 0), (0, 1))[draw.task or 0]
        kind = samples["cases"][draw.case].case.metadata["kind"]
        assert row[f"kind={kind}"] + row["kind=unknown"] == 1
        seen[row["kind=unknown"]] += 1
    assert seen[1.0] > 10 and seen[0.0] > 10
    assert len(set(seeds)) == 40
    again = dataset[3]
    assert seeds[-1] == seeds[3] and torch.equal(again.image, dataset[3].image)


def test_parts_of_a_batch_are_its_samples_in_order(samples: dict[str, Any]) -> None:
    draws = Draws([[True, True]] * 2, tasks=True)
    dataset = Samples(
        draws=draws, patch_size=[4, 4], foreground=0, augment=None, task_key="task", **samples
    )
    batch = collate([dataset[n] for n in range(6)])
    assert torch.equal(batch.image[4:5], dataset[4].image) and len(batch.cases) == 6
    for count in (1, 2, 3, 6):
        parts = [batch.part(i, count) for i in range(count)]
        assert [c for p in parts for c in p.cases] == batch.cases
        for name in ("image", "masks", "known", "rows"):
            whole = torch.cat([getattr(p, name) for p in parts])
            assert torch.equal(whole, getattr(batch, name))
        assert all(len(p.cases) == len(p.image) for p in parts)


def test_steps_deal_out_every_sample_number_once() -> None:
    dealt = [list(Steps(2, 5, 6, rank, 3)) for rank in range(3)]
    assert sorted(n for share in dealt for batch in share for n in batch) == list(range(12, 30))


@pytest.mark.parametrize("dims", [2, 3])
def test_masks_keep_their_values_when_they_are_turned(dims: int) -> None:
    """200 and 0: interpolated linearly there would be values between them at the borders."""
    config = Augmentation(**{**OFF, "affine": 1.0, "elastic": 1.0}, rotation=40)
    augment = Augment(config, spatial_dims=dims, slice_axis=2)
    mask = 200 * (torch.rand(2, *(12,) * dims, generator=torch.Generator().manual_seed(0)) > 0.6)
    for seed in range(4):
        out = augment(mask[:1].float(), mask, seed)[1]
        assert set(out.unique().tolist()) == {0, 200} and not torch.equal(out, mask)


def test_thick_slices_stay_what_they_are() -> None:
    config = Augmentation(**{**OFF, "affine": 1.0}, rotation=40, scaling=0.3)
    image = torch.zeros(1, 9, 16, 16)
    image[:, 2, 3:12, 4:12] = 1
    found = {}
    for flat in (False, True):
        augment = Augment(config, spatial_dims=3, slice_axis=2, flat=flat)
        outs = [augment(image, image.byte(), s) for s in range(6)]
        found[flat] = [(x[0].amax((1, 2)) > 1e-3).nonzero().flatten().tolist() for x, _ in outs]
        assert all(not torch.equal(x, image) for x, _ in outs)
    assert all(f == [2] for f in found[True]) and any(f != [2] for f in found[False])


def test_slices_are_thick_beyond_three_times_the_finer_side_of_their_pixels() -> None:
    assert is_flat([[3.1, 1.0, 2.0]]) and not is_flat([[2.9, 1.0, 1.0]])
    assert is_flat([[9.0, 1.0, 1.0], [1.0, 1.0, 1.0], [4.0, 1.0, 1.0]])
    assert not is_flat([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [4.0, 1.0, 1.0]])


def test_each_channel_is_dropped_with_its_probability_and_never_all_of_them() -> None:
    augment = Augment(Augmentation(**OFF, drop_channel=0.2), spatial_dims=2, slice_axis=2)
    image, mask = torch.ones(2, 4, 4), torch.ones(1, 4, 4)
    left = torch.stack([augment(image, mask, s)[0][:, 0, 0] for s in range(500)])
    assert set(left.unique().tolist()) == {0, 1} and left.any(1).all()
    # one of two: 0.2 · 0.8
    assert (1 - left).mean(0).tolist() == pytest.approx([0.16, 0.16], abs=0.05)
    assert augment(image[:1], mask, 0)[0].all()
