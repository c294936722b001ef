"""Metadata that are vectors: where they come from, how they are encoded, what can and cannot be done with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

from sklearn.decomposition import PCA

from fastfilm.__main__ import main
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.data.datasets import find_cases
from fastfilm.segmentation.data.plan import (
    PlanFolder,
    make_plan,
    read_plan,
)
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.metadata.encoder import MetadataEncoder
from fastfilm.segmentation.metadata.groups import grouping
from fastfilm.segmentation.metadata.vectors import (
    VectorEncoder,
    expanded,
    read_vector,
)
from fastfilm.segmentation.models.folder import (
    LoadedModel,
    ModelInfo,
    load_model,
    save_model,
    save_weights,
)
from fastfilm.segmentation.prediction.inputs import find_inputs, parse_meta
from fastfilm.segmentation.prediction.swap import swap_values
from fastfilm.segmentation.reports.inspection import inspect
from fastfilm.segmentation.support.errors import (
    MetadataError,
    Problems,
    UserError,
)
from fastfilm.segmentation.training.finetuning import start_from
from fastfilm.segmentation.training.fold import Start, describe

from ...support.models import make_model
from ...support.phantoms import settings, write_bids


def fit(given: list[Any], **options: Any) -> MetadataEncoder:
    rows = {f"case-{i}": {"k": v} for i, v in enumerate(given)}
    return MetadataEncoder.fit(rows, {"k": MetadataKey(kind="vector", **options)})


def row(encoder: MetadataEncoder, value: Any) -> list[float]:
    return [float(x) for x in encoder.encode({"k": value})]


# encoding


def test_each_component_has_mean_0_and_deviation_1_over_the_training_cases() -> None:
    encoder = fit([[1, 10], [3, 30]])
    assert encoder.columns() == ["k[0]", "k[1]", "k=unknown"]
    assert row(encoder, [1, 10]) == [-1, -1, 0] and row(encoder, ["5", 20.0]) == [3, 0, 0]
    assert row(encoder, None) == row(encoder, []) == [0, 0, 1]


def test_a_component_that_never_changed_in_training_is_0_whatever_it_is_later() -> None:
    encoder = fit([[1, 0.1], [3, 0.1], [5, 0.1]], dropout=0)
    assert row(encoder, [3, 1000.0]) == [0, 0]


def test_the_projection_is_that_of_scikit_learn_with_unit_variance() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)) @ rng.normal(size=(5, 5)) + 7
    encoder = fit(x.tolist(), projection=3, dropout=0)
    got = np.array([row(encoder, v) for v in x.tolist()])
    z = (x - x.mean(0)) / x.std(0)
    expected = PCA(3, whiten=True).fit_transform(z) * np.sqrt(12 / 11)
    signs = np.sign((got * expected).sum(0))
    np.testing.assert_allclose(got, expected * signs, atol=1e-4)
    np.testing.assert_allclose(got.std(0), 1, atol=1e-5)
    assert encoder.columns() == [f"k component {i}" for i in (1, 2, 3)]


def test_the_largest_loading_of_a_component_is_positive_however_the_cases_are_turned() -> None:
    x = np.random.default_rng(1).normal(size=(9, 4))
    components = [
        np.array(VectorEncoder.fit(rows, 2).components) for rows in (x, x[::-1].copy(), -x)
    ]
    for c in components:
        assert (c[np.arange(2), np.abs(c).argmax(1)] > 0).all()
        np.testing.assert_allclose(c, components[0], atol=1e-5)


def test_more_components_than_the_vectors_span_are_refused_with_the_number_there_is() -> None:
    x = np.outer(np.arange(6), [1.0, 2, 3]) + np.outer(np.arange(6) ** 2, [1.0, 0, 0])
    assert fit(x.tolist(), projection=2).size == 3
    with pytest.raises(Problems, match=r"'k': projection: 3 principal components.*6.*have 2"):
        fit(x.tolist(), projection=3)
    with pytest.raises(Problems, match=r"have 0"):
        fit([[1, 2], [1, 2]], projection=1)


def test_a_step_along_one_number_changes_that_number_alone() -> None:
    x = np.random.default_rng(2).normal(size=(10, 4)) * [1, 10, 100, 0] + 5
    for projection in (None, 2):
        vector = VectorEncoder.fit(x, projection)
        for i in range(2):
            expected = np.eye(vector.width)[i] * 1.5
            np.testing.assert_allclose(
                vector.encode(np.array(vector.along(i, 1.5))), expected, atol=1e-5
            )


def test_lengths_that_differ_are_listed_with_their_cases() -> None:
    with pytest.raises(Problems) as error:
        fit([[1, 2], [1, 2, 3], [2, 3], [1]])
    assert error.value.problems == [
        "case-1: metadata 'k' has 3 components, 2 other cases have 2",
        "case-3: metadata 'k' has 1 components, 2 other cases have 2",
    ]
    with pytest.raises(MetadataError, match="'k' has 3 components, expected 2"):
        fit([[1, 2], [3, 4]]).encode({"k": [1, 2, 3]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, float("nan")], r"finite numbers; \[1\] is nan"),
        ([1, float("inf")], r"\[1\] is inf"),
        ([1, True], r"\[1\] is True"),
        ([1, "1_0"], r"\[1\] is '1_0'"),
        ([None, 1], r"\[0\] is None"),
        (3.5, "must be a list of numbers, got 3.5"),
        ([1, [2]], "must be text, a number or a list of them"),
        ([1e300, 1], "beyond all numbers"),
    ],
)
def test_what_is_no_vector_of_finite_numbers_is_refused(value: Any, message: str) -> None:
    with pytest.raises(MetadataError, match=f"'k'.*{message}"):
        fit([[1, 2], [3, 4]]).encode({"k": value})
    if value != [1e300, 1]:
        with pytest.raises(Problems, match=f"case-1: metadata 'k'.*{message}"):
            fit([[1, 2], value, [3, 4]])


def test_vectors_beyond_all_numbers_are_refused_in_training() -> None:
    with pytest.raises(Problems, match=r"up to 1.7e\+308 are beyond"):
        fit([[1.7e308, 1], [-1.7e308, 2]])


def test_a_missing_vector_is_an_error_where_nothing_trained_unknown() -> None:
    with pytest.raises(MetadataError, match=r"missing.*give a vector of 2 numbers"):
        fit([[1, 2], [3, 4]], dropout=0).encode({})


def test_the_encoder_survives_json_to_the_bit() -> None:
    encoder = fit(np.random.default_rng(3).normal(size=(8, 6)).tolist(), projection=4)
    again = MetadataEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    assert again == encoder
    assert row(again, [1, 2, 3, 4, 5, 6]) == row(encoder, [1, 2, 3, 4, 5, 6])


# reading


def test_a_vector_is_a_list_a_json_array_or_a_file_of_one_row(tmp_path: Path) -> None:
    for kind in (np.float16, np.float32, np.float64, np.int16):
        np.save(tmp_path / "v.npy", np.array([1, -2, 3], kind))
        assert read_vector(" v.npy ", tmp_path) == ([1, -2, 3], tmp_path / "v.npy")
    assert read_vector("[1, 2.5]", tmp_path) == read_vector([1, "2.5"], tmp_path)
    assert read_vector(str(tmp_path / "v.npy"), Path("elsewhere"))[0] == [1, -2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 2)), r"1-D\), got shape \[2, 2\], float64"),
        (np.array(["a"]), r"got shape \[1\], <U1"),
        (np.array([1, np.nan]), r"v.npy: must be finite numbers; \[1\] is nan"),
        (np.array([{}], object), "cannot be read as a .npy file of numbers"),
        (np.zeros(2**16 + 1, np.int8), "has 65537 components; at most 65536"),
        (b"", "cannot be read"),
        (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8'", "cannot be read"),
        (None, "v.npy: no such file"),
    ],
)
def test_files_that_hold_no_vector_are_named_with_what_they_hold(
    tmp_path: Path, content: Any, message: str
) -> None:
    if isinstance(content, bytes):
        (tmp_path / "v.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "v.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        read_vector("v.npy", tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1, 2", "cannot be read as a JSON array"),
        ("[1, NaN]", r"\[1\] is nan"),
        ("embedding.npz", "path of a .npy file, got 'embedding.npz'"),
        ({"a": 1}, "got {'a': 1}"),
    ],
)
def test_texts_that_are_no_vector_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_vector(value, Path())


def test_patterns_of_columns_keep_the_order_of_the_table() -> None:
    columns = ["id", "r_b", "age", "r_a", "x[1]"]
    assert expanded(["age", "r_*"], columns) == ["age", "r_b", "r_a"]
    assert expanded(["x[1]"], columns) == ["x[1]"]
    for patterns, message in (
        (["s_*"], "no column fits 's_*'"),
        (["r_a", "r_*"], "'r_a' is named"),
    ):
        with pytest.raises(ValueError) as error:
            expanded(patterns, columns)
        assert message in str(error.value)


# from a data set to a model

KEYS: dict[str, Any] = {
    "shape": {"kind": "vector", "columns": ["r_*"]},
    "text": {"kind": "vector", "projection": 2, "dropout": 0.5},
}


def vectors_in(root: Path, count: int = 6) -> Path:
    """``write_bids`` with three columns of radiomics and a file with an embedding for each subject."""
    write_bids(root, count)
    rng = np.random.default_rng(4)
    lines = (root / "participants.tsv").read_text().splitlines()
    lines[0] += "\tr_b\tr_a\ttext"
    for i in range(count):
        np.save(root / f"{i}.npy", rng.normal(size=5).astype(np.float32))
        lines[i + 1] += f"\t{i}\t{i * i}\t{i}.npy"
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return vectors_in(tmp_path / "bids")


def planned(data: Path, **sections: Any) -> tuple[PlanFolder, list[str]]:
    given = {"metadata": KEYS, **sections}
    config = settings(data) | {"metadata": given.pop("metadata")}
    return make_plan(parse(config | given, "test"), data.parent / "plan")


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vectors")
    plan, _ = planned(vectors_in(root / "bids"))
    info, network = describe(Start(plan, 0, root / "model"), plan.cases_of(0, "train"))
    save_model(root / "model", info)
    save_weights(root / "model", "best", network)
    return root


def test_plan_keeps_the_numbers_the_files_and_the_columns_that_were_meant(data: Path) -> None:
    plan, notes = planned(data)
    plan = read_plan(data.parent / "plan")
    case = plan.cases[2]
    assert case.metadata["shape"] == [2, 4]
    assert case.metadata["text"] == np.load(data / "2.npy").tolist()
    assert case.vectors == {"text": (data / "2.npy").resolve()} and plan.keys()[
        "shape"
    ].columns == [
        "r_b",
        "r_a",
    ]
    assert any(n.startswith("text: in 6 of 6 cases (table 6)") for n in notes)


def test_a_vector_in_the_sidecar_is_a_list_or_a_path_from_the_root(data: Path) -> None:
    for i, value in enumerate([[1, 2], "own.npy", "[5, 6]"]):
        path = data / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_FLAIR.json"
        path.write_text(json.dumps({"e": value}))
    np.save(data / "own.npy", [3.0, 4.0])
    config = settings(data) | {"metadata": {"e": {"kind": "vector", "source": "sidecar"}}}
    found = find_cases(parse(config, "test"))
    assert [c.metadata["e"] for c in found.cases[:4]] == [[1, 2], [3, 4], [5, 6], None]


def test_bad_vectors_are_problems_with_their_case_and_key(data: Path) -> None:
    lines = (data / "participants.tsv").read_text().splitlines()
    cells = [line.split("\t") for line in lines]
    cells[1][3] = cells[1][4] = "n/a"  # all components: a vector that is not there
    cells[2][4] = "n/a"
    cells[3][3] = "much"
    cells[4][5] = "gone.npy"
    np.save(data / "4.npy", np.ones(7))
    (data / "participants.tsv").write_text("\n".join("\t".join(c) for c in cells) + "\n")
    with pytest.raises(Problems) as error:
        planned(data)
    text = "\n".join(error.value.problems)
    assert "sub-00" not in text
    assert "sub-01: metadata 'shape': 1 of 2 components are missing: r_a" in text
    assert "sub-02: metadata 'shape': must be finite numbers; [0] is 'much'" in text
    assert f"sub-03: metadata 'text': {data / 'gone.npy'}: no such file" in text
    assert "sub-04: metadata 'text' has 7 components, 4 other cases have 5" in text
    assert "no value in any case" not in text


def test_columns_that_are_not_there_are_named(data: Path) -> None:
    for columns, message in ((["r_c"], "no column 'r_c'"), (["s_*"], r"no column fits 's_\*'")):
        with pytest.raises(Problems, match=message):
            planned(data, metadata={"k": {"kind": "vector", "columns": columns}})


def test_a_file_that_changed_since_the_plan_is_refused_and_a_copy_is_not(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned(data)
    np.save(data / "0.npy", np.load(data / "0.npy"))  # another time, the same numbers
    assert [c.changed_vectors() for c in read_plan(data.parent / "plan").cases] == [[]] * 6
    np.save(data / "1.npy", np.zeros(5))
    (data / "2.npy").unlink()
    assert main(["train", str(data.parent / "plan"), str(data.parent / "model")]) == 1
    text = capsys.readouterr().err
    assert "sub-01: metadata 'text': " in text and "1.npy: has changed since the plan" in text
    assert "2.npy: no such file" in text and not (data.parent / "model" / "model.json").exists()


def test_the_same_vectors_are_found_in_the_plan_the_folder_and_the_options(modelled: Path) -> None:
    model = load_model(modelled / "model")
    plan = read_plan(modelled / "plan")
    options = {"info": model.info, "meta": {}}
    by_plan = {c.id: c.metadata for c in find_inputs(modelled / "plan", **options)}
    by_folder = {c.id: c.metadata for c in find_inputs(modelled / "bids", **options)}
    assert by_plan and all(by_folder[k] == v for k, v in by_plan.items())
    texts = ["shape=[2, 4]", f"text={modelled / 'bids' / '2.npy'}"]
    assert parse_meta(texts, model) == plan.cases[2].metadata
    for text, message in (
        ("shape=[1]", "'shape' has 1 components, expected 2"),
        ("text=none.npy", "none.npy: no such file"),
        ("shape=5", "path of a .npy file, got '5'"),
    ):
        with pytest.raises(UserError, match=message):
            parse_meta([text], model)


def test_a_vector_that_cannot_be_read_is_said_with_its_image(
    modelled: Path, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("subject,r_b,r_a,text\nsub-00,1,,[1]\n")
    image = modelled / "bids" / "sub-00" / "anat" / "sub-00_FLAIR.nii.gz"
    info = load_model(modelled / "model").info
    (case,) = find_inputs(image, info, meta={}, table=table)
    assert case.problem and "sub-00_FLAIR.nii.gz: metadata 'shape': 1 of 2" in case.problem


def test_predictions_hold_the_vectors_and_evaluation_makes_no_groups_of_them(
    modelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = modelled / "out"
    arguments = ["predict", str(modelled / "model"), str(modelled / "plan"), str(out)]
    assert main(arguments) == 0 and main(["evaluate", str(out)]) == 0
    cases = json.loads((out / "predictions.json").read_text())["cases"]
    assert {tuple(c["metadata"]["shape"]) for c in cases.values()} <= {(i, i * i) for i in range(6)}
    assert "shape" not in (out / "cases.csv").read_text()
    assert json.loads((out / "summary.json").read_text())["labels"]["1"]["groups"] == {}
    capsys.readouterr()
    assert main([*arguments, "--continue"]) == 0
    assert f"0 predicted, {len(cases)} were there" in " ".join(capsys.readouterr().out.split())


def vector_model(folder: Path, **options: Any) -> LoadedModel:
    rows = {str(i): {"k": [i, i * i, i % 2]} for i in range(6)}
    encoder = MetadataEncoder.fit(rows, {"k": MetadataKey(kind="vector", **options)})
    return make_model(folder, metadata=encoder)


def test_inspection_steps_away_from_the_mean_vector(tmp_path: Path) -> None:
    (found,) = inspect(vector_model(tmp_path / "m", projection=2))
    steps = [f"k component {i} {s}2σ" for i in (1, 2) for s in "-+"]
    assert found.values == ["mean", *steps, "unknown"]
    gamma = next(layer.gamma for layer in found.layers)
    assert not np.array_equal(gamma[1], gamma[2])


def test_swap_balance_and_strata_of_a_vector_are_refused(tmp_path: Path) -> None:
    model = vector_model(tmp_path / "m")
    for text in ("k", "k=1,2"):
        with pytest.raises(UserError, match=r"--swap k: is a vector of 3 numbers.*--meta k=FILE"):
            swap_values(text, model)
    data = {"root": "x", "contrasts": ["T1w"], "labels": {"a": 1}}
    config = {"data": data, "metadata": {"k": {"kind": "vector"}}}
    for section, setting in (
        ({"splits": {"stratify": ["k"]}}, "splits.stratify"),
        ({"training": {"balance": "k"}}, "training.balance"),
        ({"trial": {"cluster": "k"}}, "trial.cluster"),
    ):
        with pytest.raises(Problems, match=f"{setting}: 'k' is a vector"):
            parse(config | section, "test")
    with pytest.raises(MetadataError, match="vector: it has no values to add to"):
        model.encoder.grow("k", "x")
    assert grouping({"a": [1, 2], "b": [1, 2]}, "vector") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "vector", "values": ["a"]}, "kind 'vector' takes no values"),
        ({"columns": ["a"]}, "columns is for kind 'vector'"),
        ({"kind": "continuous", "projection": 2}, "projection is for kind 'vector'"),
        ({"kind": "vector", "columns": []}, "at least 1"),
        (
            {"kind": "vector", "columns": ["a"], "source": "sidecar"},
            "columns are those of the table",
        ),
        ({"kind": "vector", "projection": 0}, "greater than or equal to 1"),
    ],
)
def test_settings_that_do_not_fit_a_vector_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MetadataKey(**options)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda k: k.update(vector=None), "kind 'vector' needs vector"),
        (lambda k: k.update(kind="category", values=["a"]), "kind 'category' takes no vector"),
        (lambda k: k["vector"]["std"].pop(), "vector.std needs 3 entries, got 2"),
        (lambda k: k["vector"]["std"].__setitem__(0, -1.0), "std must not be below 0, got -1"),
        (lambda k: k["vector"]["mean"].__setitem__(0, float("nan")), "finite number"),
        (lambda k: k["vector"]["components"][1].pop(), r"components\[1\] needs 3 entries, got 2"),
        (lambda k: k["vector"]["components"].clear(), "at least 1"),
        (lambda k: k["vector"].update(components=[[0.0] * 3]), r"components\[0\] is 0 throughout"),
        (lambda k: k.update(table_columns=["a"]), "1 table_columns do not fit the vector"),
    ],
)
def test_damaged_vectors_of_a_model_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    value = vector_model(tmp_path / "m", projection=2).info.model_dump(mode="json")
    damage(value["metadata"]["keys"][0])
    with pytest.raises(ValidationError, match=message):
        ModelInfo.model_validate(value)


def test_fine_tuning_keeps_the_old_encoder_and_refuses_other_columns(modelled: Path) -> None:
    plan, old = read_plan(modelled / "plan"), load_model(modelled / "model").info
    case = Case("x", "x", (None,), {}, {"shape": [9, 9], "text": [1, 2, 3, 4, 5]})
    info, _ = start_from(modelled / "model", old, [case], plan.config)
    assert info.metadata == old.metadata
    keys = [k.model_copy() for k in old.metadata.keys]
    keys[0].table_columns = ["r_a", "r_b"]
    other = old.model_copy(update={"metadata": MetadataEncoder(keys=keys)})
    with pytest.raises(UserError, match=r"columns r_b, r_a, the plan's r_a, r_b.*same order"):
        start_from(modelled / "model", other, [case], plan.config)
