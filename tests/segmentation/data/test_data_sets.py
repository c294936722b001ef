"""From files to cases, checks, splits and plans; everything that can be wrong with a data set."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastfilm.segmentation.config.schema import parse, read_config
from fastfilm.segmentation.data.cache import cached
from fastfilm.segmentation.data.checks import CaseFacts
from fastfilm.segmentation.data.datasets import find_cases
from fastfilm.segmentation.data.decisions import decide
from fastfilm.segmentation.data.plan import make_plan, read_plan
from fastfilm.segmentation.data.splits import make_splits
from fastfilm.segmentation.images.preprocessing import Normalisation, Preprocessing
from fastfilm.segmentation.support import memory
from fastfilm.segmentation.support.errors import Problems, UserError
from fastfilm.segmentation.support.files import write_json

from ...support.phantoms import TYPES, settings, write_bids


def image(root: Path, i: int, contrast: str = "FLAIR") -> Path:
    return root / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_{contrast}.nii.gz"


def label(root: Path, i: int) -> Path:
    name = f"sub-{i:02d}"
    return root / "derivatives" / "labels" / name / "anat" / f"{name}_FLAIR_dseg.nii.gz"


def change(path: Path, edit: Callable[[Any], Any], affine: Any = None) -> None:
    old = nib.load(path)
    array = edit(np.asarray(old.dataobj).copy())
    nib.save(nib.Nifti1Image(array, old.affine if affine is None else affine), path)


def problems(root: Path, tmp_path: Path, **sections: Any) -> list[str]:
    with pytest.raises(Problems) as error:
        make_plan(parse(settings(root, **sections), "test"), tmp_path / "plan")
    assert not (tmp_path / "plan").exists(), "nothing is written"
    return error.value.problems


def test_every_bad_file_is_listed_at_once_with_its_name(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=12)
    affine = nib.load(image(root, 0)).affine

    def poke(value: float) -> Callable[[Any], Any]:
        def edit(a: Any) -> Any:
            a[0, 0, 0] = value
            return a

        return edit

    image(root, 0).write_bytes(image(root, 0).read_bytes()[:2000])
    image(root, 1).write_bytes(b"")
    image(root, 2).write_bytes(gzip.compress(b"not an image"))
    change(image(root, 3), poke(np.nan))
    change(image(root, 4), lambda a: np.stack([a, a], -1))
    change(image(root, 5), lambda a: 0 * a)
    change(label(root, 6), lambda a: a[1:])
    change(label(root, 7), lambda a: a, affine + np.eye(4)[:, [3, 0, 1, 2]])
    change(label(root, 8), poke(7))
    change(label(root, 9), lambda a: 0 * a)
    label(root, 10).unlink()
    found = problems(root, tmp_path)
    expected = [
        (image(root, 0), "cannot be read"),
        (image(root, 1), "empty"),
        (image(root, 2), "cannot be read"),
        (image(root, 3), "1 voxels are NaN"),
        (image(root, 4), "(16, 16, 12, 2)"),
        (image(root, 5), "every voxel is 0"),
        (label(root, 6), "not on the grid of its image"),
        (label(root, 7), "mm apart"),
        (label(root, 8), "label values 7 are not in the declared set [0, 1]"),
        (label(root, 9), "all background"),
        ("sub-10", "no label file for lesion"),
    ]
    for name, reason in expected:
        assert any(str(name) in p and reason in p for p in found), (name, reason, found)
    assert len(found) == len(expected)


def test_rows_and_values_of_the_table_that_are_wrong_are_named(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    table = root / "participants.tsv"
    lines = table.read_text().splitlines()
    lines[2] = lines[2].replace("31", "old")
    table.write_text("\n".join([*lines[:4], *lines[5:], lines[1]]) + "\n")
    found = problems(root, tmp_path, metadata={"age": {"kind": "continuous"}})
    assert any("no row for sub-03" in p for p in found)
    assert any("line 7: a second row for sub-00" in p for p in found)
    assert any(p.startswith("sub-01") and "'age' must be a number, got 'old'" in p for p in found)


def test_a_value_that_only_a_held_out_subject_has_is_named(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    table = root / "participants.tsv"
    table.write_text(table.read_text().replace(f"sub-00\t{TYPES[0]}", "sub-00\trare"))
    found = problems(root, tmp_path, metadata={"tumor_type": {"unseen": "error"}})
    assert any("sub-00" in p and "'rare', which was not in training" in p for p in found)


def test_a_label_that_no_case_has_is_named(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    data = {"labels": {"lesion": 1, "cord": 2}}
    assert any(
        "'cord'" in p and "no voxel in any case" in p for p in problems(root, tmp_path, data=data)
    )


def test_plan_brings_back_what_it_wrote(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    made, _ = make_plan(parse(settings(root), "test"), tmp_path / "plan")
    again = read_plan(tmp_path / "plan")
    assert again == made
    fingerprint = json.loads((tmp_path / "plan" / "fingerprint.json").read_text())
    assert fingerprint["median_shape"] == [16, 16, 12] and len(fingerprint["cases"]) == 6


def facts(
    shape: tuple[int, ...] = (64, 64, 64),
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    lowest: float = 0.0,
) -> CaseFacts:
    numbers = {"mean": 0.0, "std": 1.0, "lowest": lowest, "highest": 3000.0}
    inside = np.linspace(-100, 300, 500, dtype=np.float32)
    return CaseFacts("c", "c", list(shape), list(spacing), "RAS", [numbers], {"a": 9}, [inside])


def decided(*cases: CaseFacts, **sections: Any) -> Any:
    value = {"data": {"root": "x", "contrasts": ["T1w"], "labels": {"a": 1}}, **sections}
    return decide(parse(value, "test"), cases)


def test_thick_slices_are_taken_one_by_one_across_their_axis() -> None:
    plan = decided(facts((12, 200, 180), (6.0, 1.0, 1.0)))
    assert plan.spatial_dims == 2 and plan.preprocessing.slice_axis == 0
    assert all(n <= p < n + 32 for p, n in zip(plan.patch_size, (200, 180), strict=True))
    assert plan.preprocessing.spacing[0] is None
    assert decided(facts()).spatial_dims == 3
    forced = {"preprocessing": {"dimensions": "2d", "slice_axis": "coronal"}}
    assert decided(facts(), **forced).preprocessing.slice_axis == 1


def test_spacing_that_differs_between_cases_becomes_the_median() -> None:
    cases = [facts((48, 48, 32), (1.0, 1.0, z)) for z in (1.0, 1.5, 2.0)]
    assert decided(*cases).preprocessing.spacing == (None, None, 1.5)
    assert decided(*cases, preprocessing={"spacing": "keep"}).preprocessing.spacing == (None,) * 3
    exact = decided(*cases, preprocessing={"spacing": [2, None, 1]})
    assert exact.preprocessing.spacing == (2, None, 1)
    # half the voxels along the first axis
    assert min(exact.patch_size) == 24 < min(decided(*cases).patch_size)


def test_hounsfield_units_are_normalised_by_constants_of_the_labels() -> None:
    (channel,) = decided(facts(lowest=-1024)).preprocessing.channels
    assert channel.kind == "ct" and -100 <= channel.low < channel.high <= 300
    done = channel(np.full((2, 2, 2), -1024, np.float32))
    np.testing.assert_allclose(done, (channel.low - channel.mean) / channel.std, rtol=1e-5)
    assert decided(facts()).preprocessing.channels[0].kind == "zscore"


def test_batches_fit_the_memory_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    for gigabytes in (1, 4, 64):
        monkeypatch.setattr(memory, "available", lambda g=gigabytes: g * 2**30)
        sizes.append(decided(facts()).batch_size)
    assert sizes[0] <= sizes[1] <= sizes[2] == 4 and sizes[0] == 1


@pytest.mark.parametrize(
    ("patch", "message"),
    [([16, 16], "needs 3 numbers"), ([16, 16, 24], "divisible by 16"), ([16] * 3, "one voxel")],
)
def test_patches_that_a_network_cannot_take_are_refused(patch: list[int], message: str) -> None:
    sections = {"network": {"name": "Modified3DUNet"}, "preprocessing": {"patch_size": patch}}
    with pytest.raises(UserError, match=message):
        decided(facts(), **sections)


def test_an_empty_case_may_be_allowed(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    change(label(root, 1), lambda a: 0 * a)
    config = settings(root, data={"empty_cases": "allow"})
    _, notes = make_plan(parse(config, "test"), tmp_path / "plan")
    assert any("empty in 1 cases" in n for n in notes)


def test_identical_images_under_two_names_stay_in_one_fold(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    image(root, 4).write_bytes(image(root, 1).read_bytes())
    made, notes = make_plan(parse(settings(root), "test"), tmp_path / "plan")
    assert any("sub-01, sub-04: identical images" in n for n in notes)
    for fold in made.folds:
        assert ("sub-01" in fold["val"]) == ("sub-04" in fold["val"])


def test_folds_part_subjects_and_are_even_over_strata(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=12)
    config = parse(settings(root, splits={"folds": 4, "stratify": ["tumor_type"]}), "test")
    cases = find_cases(config).cases
    folds, wrong = make_splits(cases, config.splits, config.metadata)
    assert not wrong
    kinds = {c.subject: c.metadata["tumor_type"] for c in cases}
    assert sorted(s for f in folds for s in f["val"]) == sorted(kinds)
    for fold in folds:
        assert not set(fold["train"]) & set(fold["val"])
        assert len(fold["train"]) + len(fold["val"]) == 12
        assert sorted(kinds[s] for s in fold["val"]) == sorted(TYPES)


def test_a_subject_in_two_parts_of_a_fixed_split_is_named(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=3)
    rows = [
        {
            "image": str(image(root, i)),
            "label": str(label(root, i)),
            "subject": s,
            "split": p,
            "id": n,
        }
        for i, s, p, n in ((0, "a", "train", "a1"), (1, "a", "val", "a2"), (2, "b", "test", "b1"))
    ]
    table = tmp_path / "table.csv"
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    data = {"source": "csv", "root": str(table), "contrasts": ["image"]}
    found = problems(root, tmp_path, data=data, metadata=[], splits={"column": "split"})
    assert "a is in more than one split: train, val" in found
    table.write_text(table.read_text().replace("a2", "c1").replace(",a,val", ",c,val"))
    config = parse(settings(root, data=data, metadata=[], splits={"column": "split"}), "test")
    made, _ = make_plan(config, tmp_path / "plan")
    assert made.folds == [{"train": ["a"], "val": ["c"], "test": ["b"]}]
    table.write_text(table.read_text().replace("c1", "a1"))
    assert any("line 3: case 'a1' is in line 2 already" in p for p in find_cases(config).problems)


def test_contrasts_are_channels_or_each_a_case(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=3)
    for i in range(3):
        for contrast in ("T1w", "ce-gadolinium_T1w")[: 2 - (i == 2)]:
            image(root, i, contrast).write_bytes(image(root, i).read_bytes())
    names = ["FLAIR", "ce-gadolinium_T1w", "T1w"]

    def found(**data: Any) -> Any:
        return find_cases(parse(settings(root, data={"contrasts": names, **data}), "test"))

    assert found().problems == ["sub-02: no image of contrast ce-gadolinium_T1w"]
    zeros = found(missing_contrast="zeros").cases
    assert [p and p.name for p in zeros[2].images] == [
        "sub-02_FLAIR.nii.gz",
        None,
        "sub-02_T1w.nii.gz",
    ]
    assert [c.id for c in found(missing_contrast="skip").cases] == ["sub-00", "sub-01"]
    samples = found(combine="samples", label_contrast="FLAIR", missing_labels="mask")
    assert len(samples.cases) == 3  # the labels are those of the FLAIR image


def test_metadata_come_from_table_name_and_sidecar(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=2)
    for i in range(2):
        side = {"EchoTime": [0.01, 0.03], "Manufacturer": "X", "age": 99}
        image(root, i).with_name(f"sub-0{i}_FLAIR.json").write_text(json.dumps(side))
    keys: Any = {
        "age": {"kind": "continuous"},
        "EchoTime": {"kind": "continuous"},
        "contrast": {},
        "Manufacturer": {"source": "table"},
    }
    case = find_cases(parse(settings(root, metadata=keys), "test")).cases[0]
    assert case.metadata["age"] == "30" and case.metadata["EchoTime"] == [0.01, 0.03]
    assert case.metadata["contrast"] == "FLAIR" and case.metadata["Manufacturer"] is None


def test_unknown_keys_and_wrong_values_of_a_configuration_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "data: {root: x, contrasts: [T1w], labels: {a: 1}}\n"
        "training: {epoch: 3, batch_size: 0}\nnetwork: {order: conv}\n"
    )
    with pytest.raises(Problems) as error:
        read_config(path)
    text = "\n".join(error.value.problems)
    for part in (
        "training.epoch: unknown key",
        "training.batch_size",
        "network.order",
        "got 'conv'",
    ):
        assert part in text
    path.write_text("data: [")
    with pytest.raises(UserError, match=r"c\.yaml: not YAML"):
        read_config(path)


def test_a_relative_root_is_relative_to_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {root: d, contrasts: [T1w], labels: {a: 1}}")
    config = read_config(tmp_path / "c.yaml", {"training.epochs": 3})
    assert config.data.root == tmp_path / "d" and config.training.epochs == 3


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_orientation_gives_the_network_the_same_voxels_and_finds_the_way_back(
    axis: int,
) -> None:
    rng = np.random.default_rng(0)
    a = rng.random((5, 6, 7)).astype(np.float32)
    a[:, :1] = 0
    reference = nib.Nifti1Image(a, np.diag([1, 1, 2, 1]))
    preprocessing = Preprocessing(slice_axis=axis)
    expected = preprocessing([a], reference.affine)
    assert expected.image.shape[1] == (5, 5, 7)[axis], "the border of zeros is cut off"
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turned = reference.as_reoriented(np.column_stack([order, flips]))
            array = np.asarray(turned.dataobj)
            done = preprocessing([array], turned.affine)
            assert np.array_equal(done.image, expected.image)
            kept = done.geometry.to_network(array)
            assert np.array_equal(done.geometry.from_network(kept[None])[0], array)


def test_resampling_keeps_the_extent_and_comes_back_to_the_file_grid() -> None:
    x = np.linspace(0, 1, 20, dtype=np.float32)[:, None, None] * np.ones((1, 8, 6), np.float32)
    done = Preprocessing(
        spacing=(2.0, None, 0.5), channels=[Normalisation(kind="none")], crop=False
    )([x + 1], np.diag([1, 1, 1, 1]))
    assert done.image.shape == (1, 12, 10, 8) and done.geometry.spacing == (0.5, 2.0, 1.0)
    back = done.geometry.from_network(done.image)[0]
    np.testing.assert_allclose(back[2:-2], (x + 1)[2:-2], atol=1e-3)
    mask = (x > 0.5)[None]
    placed = Preprocessing(spacing=(2.0, None, 0.5)).masks(mask, done.geometry)
    assert placed.mean() == pytest.approx(mask.mean(), abs=0.06)


@pytest.mark.parametrize("kind", ["zscore", "percentile", "minmax", "ct"])
def test_normalisation_of_constant_images_is_finite(kind: Any) -> None:
    done = Normalisation(kind=kind, high=1.0)(np.full((3, 4, 5), 1e6, np.float32))
    assert np.isfinite(done).all() and (kind == "ct" or not done.any())


def test_normalisation_may_leave_the_background_out() -> None:
    x = np.zeros((4, 4, 4), np.float32)
    x[1:3] = np.random.default_rng(0).normal(100, 10, (2, 4, 4))
    done = Normalisation(nonzero=True)(x)
    assert not done[0].any() and done[1:3].std() == pytest.approx(1, abs=1e-5)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_json(tmp_path / "a.json", 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"a\.json: cannot be written: No space left"):
        write_json(tmp_path / "a.json", 2)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_the_cache_is_made_once_anew_when_a_file_changes_and_never_by_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_bids(tmp_path / "bids", count=2)
    config = parse(settings(root), "test")
    cases, cache = find_cases(config).cases, tmp_path / "cache"
    first = cached(cases, config.data, Preprocessing(), cache)
    assert first[0].image().shape == (1, *first[0].shape) and first[0].image().std() > 0.5
    expected = nib.load(label(root, 0)).get_fdata()
    back = np.flatnonzero(first[0].masks().sum((0, 2, 3)))
    assert (back == np.flatnonzero(expected.sum((0, 1)))).all(), "slices across the third axis"
    stamps = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    cached(cases, config.data, Preprocessing(), cache)
    assert stamps == {p: p.stat().st_mtime_ns for p in cache.rglob("*")}
    change(image(root, 0), lambda a: a[::-1])
    second = cached(cases, config.data, Preprocessing(), cache)
    assert second[0].folder != first[0].folder and second[1].folder == first[1].folder

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.save", full)
        change(image(root, 1), lambda a: a[::-1])
        with pytest.raises(UserError, match=r"sub-01.*cannot be written: No space left"):
            cached(cases, config.data, Preprocessing(), cache)
    assert len(list(cache.iterdir())) == 3
    image(root, 1).write_bytes(b"")
    with pytest.raises(Problems, match=r"sub-01_FLAIR\.nii\.gz: the file is empty"):
        cached(cases, config.data, Preprocessing(), cache)


def test_a_data_set_half_in_microns_is_planned_as_one_in_millimetres(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    config = settings(root, preprocessing={"spacing": "median", "patch_size": None})
    expected, _ = make_plan(parse(config, "test"), tmp_path / "mm")
    for i in (1, 3, 5):
        for path in (image(root, i), label(root, i)):
            old = nib.load(path)
            made = nib.Nifti1Image(
                np.asarray(old.dataobj), np.diag([1000.0] * 3 + [1]) @ old.affine
            )
            made.header.set_xyzt_units(xyz="micron")
            nib.save(made, path)
    made, _ = make_plan(parse(config, "test"), tmp_path / "mixed")
    for mine, theirs in zip(
        made.plan.preprocessing.spacing, expected.plan.preprocessing.spacing, strict=True
    ):
        assert mine == (None if theirs is None else pytest.approx(theirs, rel=1e-5))
    assert made.plan.patch_size == expected.plan.patch_size


def test_each_key_is_said_with_its_cases_and_where_it_was_found(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    (root / "FLAIR.json").write_text('{"EchoTime": 0.1}')
    image(root, 2).with_name("sub-02_FLAIR.json").write_text('{"EchoTime": 0.2}')
    image(root, 3).with_name("sub-03_FLAIR.json").write_text('{"EchoTime": null}')
    config = settings(root, metadata={"EchoTime": {"kind": "continuous"}})
    made, notes = make_plan(parse(config, "test"), tmp_path / "plan")
    assert "tumor_type: in 6 of 6 cases (table 6)" in notes
    (line,) = [n for n in notes if n.startswith("EchoTime")]
    assert line == "EchoTime: in 5 of 6 cases (sidecar further up 4, sidecar 1); missing in sub-03"
    values = [c.metadata["EchoTime"] for c in made.cases]
    assert values == [0.1, 0.1, 0.2, None, 0.1, 0.1]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids")
    label(root, 4).unlink()
    config = settings(root, data={"missing_labels": "skip", "exclude": ["sub-00", "sub-o1"]})
    made, notes = make_plan(parse(config, "test"), tmp_path / "plan")
    assert [c.subject for c in made.cases] == ["sub-01", "sub-02", "sub-03", "sub-05"]
    assert any("1 cases left out for want of a label file" in n and "sub-04" in n for n in notes)
    assert [n for n in notes if "data.exclude" in n] == [
        "data.exclude: there is no subject or case 'sub-o1'; did you mean 'sub-01'?"
    ]


@pytest.mark.parametrize("name", ["config.yaml", "cases.json", "splits.json", "fingerprint.json"])
def test_a_plan_of_files_that_were_not_written_together_is_refused(
    tmp_path: Path, name: str
) -> None:
    root = write_bids(tmp_path / "bids")
    make_plan(parse(settings(root), "test"), tmp_path / "plan")
    make_plan(parse(settings(root, splits={"seed": 3, "folds": 3}), "test"), tmp_path / "other")
    old = (tmp_path / "plan" / name).read_bytes()
    (tmp_path / "plan" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    if (tmp_path / "plan" / name).read_bytes() == old:
        read_plan(tmp_path / "plan")
        (tmp_path / "plan" / name).write_bytes(old + b" ")
    with pytest.raises(UserError, match=f"{name}: is not the file that plan.json was written with"):
        read_plan(tmp_path / "plan")


def test_a_case_has_the_labels_that_its_row_names(tmp_path: Path) -> None:
    root = write_bids(tmp_path / "bids", count=3)
    rows = ["participant_id\tannotated", "sub-00\ta", "sub-01\tb; a", "sub-02\tn/a"]
    (root / "participants.tsv").write_text("\n".join(rows))
    data = {"labels": {"a": 1, "b": 2}, "annotated_column": "annotated"}
    found = find_cases(parse(settings(root, data=data, metadata={}), "test"))
    assert {c.id: sorted(c.labels) for c in found.cases} == {
        "sub-00": ["a"],
        "sub-01": ["a", "b"],
    }
    assert found.unlabelled == ["sub-02"] and not found.problems


@pytest.mark.parametrize(
    ("value", "message"),
    [([{}], "0.id: missing"), (3, "valid list"), ([3], "0: .* got 3"), ({"a": 1}, "valid list")],
)
def test_a_list_of_cases_that_is_none_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    made, _ = make_plan(parse(settings(write_bids(tmp_path / "bids")), "test"), tmp_path / "plan")
    # a plan without digests of its files, as early versions wrote it
    made.plan.files = {}
    (tmp_path / "plan" / "plan.json").write_text(made.plan.model_dump_json())
    assert read_plan(tmp_path / "plan").cases == made.cases
    (tmp_path / "plan" / "cases.json").write_text(json.dumps(value))
    with pytest.raises(Problems, match=f"(?s)cases.json: not a list of cases.*{message}"):
        read_plan(tmp_path / "plan")


def test_a_plan_that_cannot_be_written_whole_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_bids(tmp_path / "bids")
    before, _ = make_plan(parse(settings(root), "test"), tmp_path / "plan")
    write = Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        if "splits" in text or '"val"' in text:
            raise OSError(28, "No space left on device")
        return write(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device"):
        make_plan(parse(settings(root, splits={"seed": 3}), "test"), tmp_path / "plan")
    monkeypatch.undo()
    assert read_plan(tmp_path / "plan") == before
    assert sorted(p.name for p in (tmp_path / "plan").iterdir()) == [
        "cases.json", "config.yaml", "fingerprint.json", "plan.json", "splits.json",
    ]  # fmt: skip
