"""Folds: who stays together, how even they are, what the data set's own split says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from fastfilm.__main__ import main
from fastfilm.segmentation.config.schema import (
    config_text,
    parse,
    write_config,
)
from fastfilm.segmentation.config.sections import MetadataKey, Splits
from fastfilm.segmentation.data.plan import make_plan, read_plan
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.data.splits import make_splits, split_notes
from fastfilm.segmentation.models.folder import load_model
from fastfilm.segmentation.support.errors import Problems
from fastfilm.segmentation.support.files import read_json
from fastfilm.segmentation.support.yaml_files import load_yaml

from ...support.phantoms import settings, write_bids

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


def keyed(**kinds: str) -> dict[str, MetadataKey]:
    return {k: MetadataKey(kind=kind) for k, kind in kinds.items()}  # type: ignore[arg-type]


def test_subjects_of_one_group_stay_together_also_with_identical_images_and_missing_values() -> (
    None
):
    """s00, s01, s02 by family; s03 has the images of s02; those without a family are alone, not one group."""
    family = ["f", "f", "f", "", "g", "g", "", None, "n/a", "h"]
    for seed in range(20):
        config = Splits(folds=4, seed=seed, group="family")
        made = cases(TEN, family=family)
        folds, wrong = make_splits(made, config, keyed(family="category"), [{"s02", "s03"}])
        assert not wrong and sorted(s for f in folds for s in f["val"]) == TEN
        # groups of 4, 2, 1, 1, 1, 1; as one group, those without a value would be 3
        assert sorted(len(f["val"]) for f in folds) == [2, 2, 2, 4]
        for fold in folds:
            assert len({s in fold["val"] for s in TEN[:4]}) == 1
            assert len({s in fold["val"] for s in TEN[4:6]}) == 1
            assert not {*fold["train"]} & {*fold["val"]}


def test_a_subject_in_two_groups_joins_them() -> None:
    made = [
        Case(f"{s}-{site}", s, (Path(s),), {}, {"site": site})
        for s, sites in [("a", "x"), ("b", "xy"), ("c", "y"), ("d", "z"), ("e", "z"), ("f", "w")]
        for site in sites
    ]
    folds, wrong = make_splits(made, Splits(folds=3, group="site"), keyed(site="category"))
    assert not wrong
    assert sorted(tuple(f["val"]) for f in folds) == [("a", "b", "c"), ("d", "e"), ("f",)]
    _, wrong = make_splits(made, Splits(folds=4, group="site"), keyed(site="category"))
    assert wrong == [
        "4 folds need as many subjects, got 3 (splits.folds; subjects that stay together count once)"
    ]


def test_groups_of_different_sizes_make_folds_of_one_size() -> None:
    """Groups of 8, 4, 4, 2, 2, 2, 2 subjects in three folds of 8."""
    sizes = {"a": 8, "b": 4, "c": 4, "d": 2, "e": 2, "f": 2, "g": 2}
    families = [name for name, n in sizes.items() for _ in range(n)]
    names = [f"s{i:02d}" for i in range(len(families))]
    made = cases(names, family=families)
    for seed in range(10):
        config = Splits(folds=3, seed=seed, group="family")
        folds, wrong = make_splits(made, config, keyed(family="category"))
        assert not wrong and [len(f["val"]) for f in folds] == [8, 8, 8]


def test_groups_are_spread_evenly_over_each_key_even_where_no_combination_is_common() -> None:
    """12 pairs, all of one sex in each, half of them old; three folds: two pairs of each sex, half of them old."""
    names = [f"s{i:02d}" for i in range(24)]
    families = [str(i // 2) for i in range(24)]
    sexes, ages = ["f", "f", "m", "m"] * 6, ["old", "young"] * 12
    made = cases(names, family=families, sex=sexes, age=ages, only=names)
    for seed in range(10):
        config = Splits(folds=3, seed=seed, group="family", stratify=["sex", "age", "only"])
        keys = keyed(family="category", sex="category", age="category", only="category")
        folds, wrong = make_splits(made, config, keys)
        assert not wrong
        for fold in folds:
            of = [names.index(s) for s in fold["val"]]
            assert Counter(sexes[i] for i in of) == {"f": 4, "m": 4}
            assert Counter(ages[i] for i in of) == {"old": 4, "young": 4}


SITES = ["10", "9", "9", "10", "x", "x", "x", "9", "9", "x"]


def test_each_value_of_a_key_is_held_out_by_a_fold_and_the_note_says_which() -> None:
    config = Splits(leave_out="site")
    made = cases(TEN, site=SITES)
    folds, wrong = make_splits(made, config, keyed(site="category"), [{"s04", "s05"}])
    assert not wrong
    assert [f["val"] for f in folds] == [
        ["s00", "s03"],
        ["s01", "s02", "s07", "s08"],
        ["s04", "s05", "s06", "s09"],
    ]
    assert all(sorted(f["train"] + f["val"]) == TEN and set(f) == {"train", "val"} for f in folds)
    (note,) = split_notes(made, folds, config)
    assert note.endswith("held out (subjects): fold 0: 10 (2), fold 1: 9 (4), fold 2: x (4)")


def test_what_cannot_be_left_out_is_named() -> None:
    made = cases(TEN, site=SITES)
    config, keys = Splits(leave_out="site"), keyed(site="category")
    _, wrong = make_splits(made, config, keys, [{"s00", "s01"}])
    assert len(wrong) == 1 and wrong[0].startswith("splits.leave_out: site: s00, s01 stay together")
    made[3] = Case("s01b", "s01", made[3].images, {}, {"site": "x"})
    made[5] = Case("s02b", "s02", made[5].images, {}, {"site": " "})
    folds, wrong = make_splits(made, config, keys)
    assert folds == [] and len(wrong) == 2
    assert wrong[0].startswith("splits.leave_out: site is missing in s02b (1 in all)")
    assert wrong[1] == "splits.leave_out: site: s01 has several values: 9, x"
    _, wrong = make_splits(cases(TEN, site=["3"] * 10), config, keys)
    assert wrong == ["splits.leave_out: site needs two values or more, got 3"]


@pytest.mark.parametrize("group", [None, "family"])
def test_nested_validation_is_of_the_training_subjects_and_leaves_the_held_out_ones_as_test(
    group: str | None,
) -> None:
    names = [f"s{i:02d}" for i in range(40)]
    kinds, families = ["a", "b", "b", "b"] * 10, [str(i // 2) for i in range(40)]
    keys = keyed(kind="category", family="category")
    made = cases(names, kind=kinds, family=families)
    twins = [{names[i], names[i + 1]} for i in range(0, 40, 2)]
    for seed in range(5):
        plain = Splits(folds=4, seed=seed, stratify=["kind"], group=group)
        nested = plain.model_copy(update={"nested": 3})
        held = [f["val"] for f in make_splits(made, plain, keys, () if group else twins)[0]]
        folds, wrong = make_splits(made, nested, keys, () if group else twins)
        # the same subjects are held out as without it
        assert not wrong and [f["test"] for f in folds] == held
        for fold in folds:
            assert sorted(fold["train"] + fold["val"] + fold["test"]) == names
            assert len(fold["val"]) == 10
            for part in ("train", "val", "test"):
                assert all(len(t & {*fold[part]}) in (0, 2) for t in twins)
            assert sum(kinds[names.index(s)] == "a" for s in fold["val"]) in (2, 3)
    assert make_splits(made, nested, keys)[0] == make_splits(made, nested, keys)[0]
    assert "--part test" in split_notes(made, folds, nested)[-1]


def test_nested_left_out_values_choose_nothing() -> None:
    config = Splits(leave_out="site", nested=2)
    made = cases(TEN, site=SITES)
    folds, wrong = make_splits(made, config, keyed(site="category"))
    assert not wrong and folds[0]["test"] == ["s00", "s03"]
    assert [(len(f["train"]), len(f["val"])) for f in folds] == [(4, 4), (3, 3), (3, 3)]
    assert "fold 2: x (4)" in split_notes(made, folds, config)[0]
    _, wrong = make_splits(made, Splits(leave_out="site", nested=7), keyed(site="category"))
    assert wrong[0].startswith(
        "fold 1: 7 parts of the training subjects need as many subjects, got 6"
    )


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"leave_out": "site", "folds": 3}, "leave_out and folds exclude each other"),
        ({"leave_out": "site", "stratify": ["site"]}, "leave_out and stratify need nested"),
        ({"leave_out": "site", "column": "split"}, "column and leave_out exclude each other"),
        ({"group": "site", "column": "split"}, "column and group exclude each other"),
        ({"nested": 4, "column": "split"}, "column and nested exclude each other"),
        ({"nested": 1}, "splits.nested: Input should be greater than or equal to 2"),
        ({"leave_out": "sit"}, "'sit' is no metadata key; did you mean 'site'?"),
        ({"group": "family"}, "(metadata.family.input: false reads it"),
        ({"leave_out": "age"}, "'age' must be of kind category or ordered, got continuous"),
        ({"group": "age"}, "splits.group: 'age' must be of kind category or ordered"),
    ],
)
def test_designs_that_contradict_themselves_are_refused(
    splits: dict[str, Any], message: str
) -> None:
    data = {"root": "x", "contrasts": ["T1w"], "labels": {"a": 1}}
    metadata = {"site": {"input": False}, "age": {"kind": "continuous"}}
    with pytest.raises(Problems) as error:
        parse({"data": data, "metadata": metadata, "splits": splits}, "test")
    assert message in str(error.value)


def test_a_configuration_as_a_plan_keeps_it_is_read_again() -> None:
    data = {"root": "x", "contrasts": ["T1w"], "labels": {"a": 1}}
    for splits in ({"leave_out": "site"}, {"column": "split"}, {"nested": 3}, {"folds": 5}):
        value = {"data": data, "metadata": ["site"], "splits": splits}
        config = parse(value, "test")
        assert parse(load_yaml(config_text(config)), "plan") == config
    # a fixed split as plans of earlier versions have it
    value["splits"] = {"folds": 5, "column": "split"}
    assert parse(value, "test").splits.column == "split"


def test_a_held_out_value_of_an_input_key_is_refused_with_what_to_do(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    chosen = {"splits": {"folds": None, "leave_out": "tumor_type"}}
    value = settings(root, **chosen) | {"metadata": {"tumor_type": {}}}
    with pytest.raises(Problems) as error:
        make_plan(parse(value, "test"), tmp_path / "plan")
    assert len(error.value.problems) == 3
    assert all(
        p.endswith(
            "splits.leave_out keeps every held-out value from its fold's training:"
            " metadata.tumor_type.input: false keeps the key from the network,"
            " metadata.tumor_type.unseen: unknown accepts them"
        )
        for p in error.value.problems
    )
    for mended in ({"input": False}, {"unseen": "unknown"}):
        value["metadata"] = {"tumor_type": mended}
        made, notes = make_plan(parse(value, "test"), tmp_path / "plan")
        assert len(made.folds) == 3
        assert any("fold 0: astrocytoma (2), fold 1: ependymoma (2)" in n for n in notes)


def test_a_nested_fold_is_trained_predicted_and_evaluated_on_its_test_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_bids(tmp_path / "bids", count=7)
    value = settings(root, splits={"folds": None, "leave_out": "tumor_type", "nested": 2})
    value["metadata"] = {"age": {"kind": "continuous"}, "tumor_type": {"input": False}}
    write_config(parse(value, "test"), tmp_path / "config.yaml")
    plan, model, out = (str(tmp_path / n) for n in ("plan", "model", "out"))
    assert main(["plan", str(tmp_path / "config.yaml"), plan]) == 0
    text = capsys.readouterr().out
    assert "fold 1: ependymoma (2)" in text and "--part test" in text
    assert main(["train", plan, model, "--fold", "1"]) == 0
    fold = read_plan(Path(plan)).folds[1]
    assert read_json(tmp_path / "model" / "splits.json") == fold
    assert load_model(Path(model)).metadata_keys() == ["age"]
    assert main(["predict", model, plan, out, "--fold", "1", "--part", "test"]) == 0
    assert main(["evaluate", out]) == 0
    cases = {c["case"] for c in read_json(tmp_path / "out" / "summary.json")["metric_per_case"]}
    assert {c[:6] for c in cases} == {*fold["test"]} == {"sub-01", "sub-04"}
