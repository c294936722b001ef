"""Folds: who stays together, how even they are, what the data set's own split says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config import MetadataKey, Splits
from fastfilm.segmentation.sources import Case
from fastfilm.segmentation.splits import make_splits

TEN = [f"s{i:02d}" for i in range(10)]


def cases(subjects: list[str], split: dict[str, str] | None = None, **values: Any) -> list[Case]:
    """Two cases a subject; ``values``: key -> value of each subject."""
    made = []
    for i, s in enumerate(subjects):
        metadata = {k: v[i] for k, v in values.items()}
        for visit in "ab":
            made.append(Case(s + visit, s, (Path(s),), {}, metadata, (split or {}).get(s)))
    return made


@pytest.mark.parametrize(
    ("twins", "groups"),
    [
        ([{"s00", "s07"}, {"s03", "s04", "s09"}], ["s00 s07", "s03 s04 s09"]),
        # twins of twins, in every order of the pairs; a name that is no case's
        ([{"s01", "s05"}, {"s05", "s08"}, {"s08", "gone"}], ["s01 s05 s08"]),
        ([{"s01", "s05"}, {"s02", "s08"}, {"s05", "s02"}], ["s01 s02 s05 s08"]),
    ],
)
def test_subjects_with_identical_images_are_validated_on_together(
    twins: list[set[str]], groups: list[str]
) -> None:
    """By 30 seeds, since two subjects of ten are in one of four folds by chance too."""
    for seed in range(30):
        folds, wrong = make_splits(cases(TEN), Splits(folds=4, seed=seed), {}, twins)
        assert not wrong and sorted(s for f in folds for s in f["val"]) == TEN
        for fold in folds:
            assert sorted(fold["train"] + fold["val"]) == TEN
            for group in groups:
                assert len({s in fold["val"] for s in group.split()}) == 1


def test_the_seed_decides_the_folds() -> None:
    found = [make_splits(cases(TEN), Splits(folds=5, seed=s), {})[0] for s in (0, 0, 1, 2)]
    assert found[0] == found[1] and found[0] != found[2] != found[3]


def test_folds_are_even_in_size_and_over_small_strata() -> None:
    kinds = ["a", "b", "c", "d", "e"] * 2
    for seed in range(5):
        config = Splits(folds=4, seed=seed, stratify=["kind"])
        folds, _ = make_splits(cases(TEN, kind=kinds), config, {"kind": MetadataKey()})
        assert sorted(len(f["val"]) for f in folds) == [2, 2, 3, 3]
        for kind in "abcde":
            of_kind = {s for s, k in zip(TEN, kinds, strict=True) if k == kind}
            assert max(len(of_kind & {*f["val"]}) for f in folds) == 1


def test_quarters_of_a_number_and_missing_values_are_strata() -> None:
    names = [f"s{i:02d}" for i in range(20)]
    ages = [*map(str, range(100, 116)), "n/a", None, "", "n/a"]
    quarter = {s: i // 4 for i, s in enumerate(names)}
    for seed in range(5):
        config = Splits(folds=4, seed=seed, stratify=["age"])
        keys = {"age": MetadataKey(kind="continuous")}
        for fold in make_splits(cases(names, age=ages), config, keys)[0]:
            assert Counter(quarter[s] for s in fold["val"]) == dict.fromkeys(range(5), 1)


def test_a_fixed_split_is_taken_as_it_is_and_twins_in_two_parts_are_named() -> None:
    where = dict(zip(TEN, ["train"] * 5 + ["val"] * 2 + ["test"] * 2 + ["none"], strict=True))
    fixed = Splits(column="split")
    (fold,), wrong = make_splits(cases(TEN, where), fixed, {}, [{"s00", "s01"}, {"s06", "s05"}])
    assert not wrong and fold == {"train": TEN[:5], "val": TEN[5:7], "test": TEN[7:9]}
    _, wrong = make_splits(cases(TEN, where), fixed, {}, [{"s00", "s01"}, {"s07", "s02"}])
    assert wrong == ["s02, s07 have identical images but are in different splits"]
    _, wrong = make_splits(cases(["a"], {"a": "test"}), fixed, {})
    assert wrong == ["no subject is in split 'train'", "no subject is in split 'val'"]


def test_more_folds_than_units_are_refused() -> None:
    _, wrong = make_splits(cases(TEN[:5]), Splits(folds=4), {}, [{"s00", "s01", "s02"}])
    assert len(wrong) == 1 and "4 folds need as many subjects" in wrong[0] and "got 3" in wrong[0]
