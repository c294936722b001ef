"""Missing metadata: the mean over the values that a case may have, and how much the prediction depends on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

from fastfilm.__main__ import main
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.config.sections import MetadataKey, NetworkConfig
from fastfilm.segmentation.data.plan import make_plan
from fastfilm.segmentation.data.sources import Case
from fastfilm.segmentation.images.preprocessing import Geometry, Preprocessed
from fastfilm.segmentation.metadata.encoder import KeyEncoder, MetadataEncoder
from fastfilm.segmentation.models.folder import (
    LabelInfo,
    LoadedModel,
    ModelInfo,
    load_model,
    save_model,
)
from fastfilm.segmentation.prediction.averaging import (
    MOST,
    likely,
    parse_prior,
    weighted,
)
from fastfilm.segmentation.prediction.one_case import (
    CaseNetwork,
    Options,
    predict,
)
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.training.finetuning import start_from

from ...support.models import TYPES, make_model
from ...support.phantoms import settings, write_bids

AVERAGE = Options(missing="average")


def fit(given: list[Any], **options: Any) -> KeyEncoder:
    rows = {f"case-{i}": {"k": v} for i, v in enumerate(given)}
    return MetadataEncoder.fit(rows, {"k": MetadataKey(**options)})["k"]


# what is known of the values


def test_categories_weigh_as_often_as_they_were_in_training() -> None:
    key = fit(["b", "a", "b", None, "b"])
    assert key.counts == [1, 3] and likely(key) == [("a", 0.25), ("b", 0.75)]


def test_a_value_that_was_declared_and_never_there_has_no_weight() -> None:
    key = fit(["G4", "G2", "G4"], kind="ordered", values=["G2", "G3", "G4"])
    assert key.counts == [1, 0, 2] and dict(likely(key)) == {"G2": 1 / 3, "G4": 2 / 3}


@pytest.mark.parametrize("scaling", ["standardise", "log"])
def test_a_number_has_nine_quantiles_of_equal_weight(scaling: Any) -> None:
    key = fit([*range(1, 19)], kind="continuous", scaling=scaling)
    # the middles of nine equal parts of 18 values: the odd ones
    values, weights = zip(*likely(key), strict=True)
    assert values == pytest.approx(range(1, 19, 2)) and weights == pytest.approx([1 / 9] * 9)


def test_quantiles_are_values_that_were_there_and_equal_ones_count_together() -> None:
    assert dict(likely(fit([1.5] * 8 + [3] * 4, kind="continuous"))) == pytest.approx(
        {1.5: 6 / 9, 3: 3 / 9}
    )
    assert likely(fit([7, 9], kind="continuous")) == [(7, 0.5), (9, 0.5)]


@pytest.mark.parametrize("scaling", ["bins", "log"])
def test_each_bin_has_a_value_that_lies_in_it(scaling: str) -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(m, 0.5, n) for m, n in ((9.0, 40), (30.0, 40), (90.0, 40))]
    key = fit([float(v) for g in groups for v in g], kind="continuous", scaling="bins")
    if scaling == "log":
        # bins of a logarithm, as a model may have them
        edges = [math.log(e) for e in key.edges or []]
        low, high = math.log(key.lowest), math.log(key.highest)
        key = key.model_copy(update={"log": True, "edges": edges, "lowest": low, "highest": high})
    assert key.counts == [40, 40, 40]
    found = likely(key)
    assert [int(np.argmax(key.encode(v))) for v, _ in found] == [0, 1, 2]
    assert [w for _, w in found] == [1 / 3] * 3


def test_one_bin_is_one_value() -> None:
    key = fit([2.5] * 4, kind="continuous", scaling="bins")
    assert likely(key) == [(2.5, 1.0)]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (fit([[1, 2], [3, 4]], kind="vector"), "'k' is a vector, over which there is no mean"),
        (fit(["a;b", "a"], kind="multilabel"), "combinations training does not count.*a;b:1,a:2"),
        (fit(["a"]).model_copy(update={"counts": None}), "does not know how often.*--prior k="),
        (fit([1, 2], kind="continuous").model_copy(update={"quantiles": []}), "older fastfilm"),
    ],
)
def test_keys_over_which_there_is_no_mean_say_why(key: KeyEncoder, message: str) -> None:
    with pytest.raises(UserError, match=message):
        likely(key)


def two_keys(folder: Path, **keys: Any) -> LoadedModel:
    rows = {str(i): {"a": "xxy"[i % 3], "b": i} for i in range(18)}
    config = {"a": MetadataKey(), "b": MetadataKey(kind="continuous", dropout=0), **keys}
    return make_model(folder, metadata=MetadataEncoder.fit(rows, config))


def test_two_missing_keys_are_combined_and_what_is_known_stays(tmp_path: Path) -> None:
    model = two_keys(tmp_path / "m")
    found = weighted(model, {})
    assert len(found) == 18 and sum(w for w, _ in found) == pytest.approx(1)
    assert found[0] == (pytest.approx(2 / 3 / 9), {"a": "x", "b": 0})
    assert weighted(model, {"a": "n/a", "b": 5}) == [
        (pytest.approx(2 / 3), {"a": "x", "b": 5}),
        (pytest.approx(1 / 3), {"a": "y", "b": 5}),
    ]
    assert weighted(model, {"a": "y", "b": 5}) == [(1.0, {"a": "y", "b": 5})]


def test_too_many_combinations_are_refused_with_the_number_of_each_key(tmp_path: Path) -> None:
    rows = {str(i): {n: i for n in "abc"} for i in range(9)}
    keys = {n: MetadataKey(kind="continuous") for n in "abc"}
    model = make_model(tmp_path / "m", metadata=MetadataEncoder.fit(rows, keys))
    assert 81 <= MOST < 729 and len(weighted(model, {"a": 1})) == 81
    with pytest.raises(UserError, match=r"729 combinations of missing metadata .a 9 × b 9 × c 9."):
        weighted(model, {})


# a prior


def test_a_prior_is_normalised_and_goes_before_the_frequency(tmp_path: Path) -> None:
    model = two_keys(tmp_path / "m")
    prior = parse_prior(["a=y:3, x:1", "b=4.5:2"], model)
    assert prior == (("a", (("y", 0.75), ("x", 0.25))), ("b", (("4.5", 1.0),)))
    assert weighted(model, {}, prior) == [
        (0.75, {"a": "y", "b": "4.5"}),
        (0.25, {"a": "x", "b": "4.5"}),
    ]
    assert parse_prior(["a=y:1,x:0"], model) == (("a", (("y", 1.0),)),)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "takes KEY=VALUE:WEIGHT"),
        (["c=x:1"], "no metadata key 'c'; it has a, b"),
        (["a=x"], "weight of 0 or more, got 'x'"),
        (["a=x:-1"], "weight of 0 or more, got 'x:-1'"),
        (["a=x:nan"], "weight of 0 or more"),
        (["a=x:inf"], "weight of 0 or more"),
        (["a=x:much"], "got 'x:much'"),
        (["a=x:0,y:0"], "weights add up to 0"),
        (["a=z:1"], "'z', which was not in training"),
        (["a=:1"], "'' is not a value"),
        (["a=n/a:1"], "'n/a' is not a value"),
        (["a=x:1,x:2"], "the same to the model"),
        (["a=x:1", "a=y:1"], "gives 'a' twice"),
        (["b=high:1"], "must be a number"),
    ],
)
def test_wrong_priors_are_refused(tmp_path: Path, texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_prior(texts, two_keys(tmp_path / "m"))


def test_a_prior_can_name_several_labels_at_once_and_no_vector(tmp_path: Path) -> None:
    rows = {"1": {"k": "a;b", "v": [1, 2]}, "2": {"k": "b", "v": [2, 1]}}
    keys = {"k": MetadataKey(kind="multilabel"), "v": MetadataKey(kind="vector")}
    model = make_model(tmp_path / "m", metadata=MetadataEncoder.fit(rows, keys))
    assert parse_prior(["k=a;b:1,b:1"], model) == (("k", (("a;b", 0.5), ("b", 0.5))),)
    with pytest.raises(UserError, match="'v' is a vector"):
        parse_prior(["v=[1]:1"], model)


# the network


class Fed(torch.nn.Module):
    """A voxel of brightness x has the probability P[value, label] of each label, wherever x is above 0."""

    def __init__(self, p: list[list[float]]) -> None:
        super().__init__()
        self.p = torch.tensor(p)
        self.calls = 0

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        p = row[0] @ self.p
        shape = (1, -1, *[1] * (x.ndim - 2))
        return torch.where(x > 0, torch.logit(p).reshape(shape), torch.tensor(-20.0))


def fed(p: list[list[float]], **changes: Any) -> LoadedModel:
    """Three types, of which training had 1, 1 and 2; one row of probabilities each, and one for "unknown"."""
    given = [*TYPES, TYPES[2]]
    rows = {str(i): {"tumor_type": t} for i, t in enumerate(given)}
    labels = [LabelInfo(name=f"l{i}", values=[i], value=i) for i in range(1, len(p[0]) + 1)]
    info = ModelInfo.model_validate(
        {
            "network": NetworkConfig(),
            "spatial_dims": 3,
            "in_channels": 1,
            "contrasts": ["FLAIR"],
            "labels": labels,
            "output": "channels",
            "metadata": MetadataEncoder.fit(rows, {"tumor_type": MetadataKey()}),
            "preprocessing": {"channels": [{"kind": "none"}], "crop": False},
            "patch_size": [4, 4, 4],
            **changes,
        }
    )
    return LoadedModel(Fed(p), info, torch.device("cpu"), Path("m"))


def bits(*p: float) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


def test_probabilities_are_weighted_by_frequency_and_the_information_is_that_of_the_value() -> None:
    model = fed([[0.9, 0.5], [0.1, 0.5], [0.2, 0.5], [0.7, 0.7]])
    out = CaseNetwork(model, {}, AVERAGE)(torch.ones(1, 1, 4, 4, 4))
    mean = (0.9 + 0.1 + 2 * 0.2) / 4
    within = (bits(0.9, 0.1) + bits(0.1, 0.9) + 2 * bits(0.2, 0.8)) / 4
    expected = [mean, 0.5, bits(mean, 1 - mean) - within]  # the second label tells nothing
    np.testing.assert_allclose(out[0, :, 0, 0, 0], expected, atol=1e-5)
    assert model.network.calls == 3
    known = CaseNetwork(model, {"tumor_type": TYPES[0]}, AVERAGE)(torch.ones(1, 1, 4, 4, 4))
    np.testing.assert_allclose(known[0, :, 0, 0, 0], [0.9, 0.5], atol=1e-6)
    unknown = CaseNetwork(model, {}, Options())(torch.ones(1, 1, 4, 4, 4))
    np.testing.assert_allclose(unknown[0, :, 0, 0, 0], [0.7, 0.7], atol=1e-6)


def test_a_prediction_that_a_value_decides_has_one_bit_and_one_that_none_changes_has_none() -> None:
    prior = (("tumor_type", ((TYPES[0], 0.5), (TYPES[1], 0.5))),)
    x = torch.ones(1, 1, 4, 4, 4)
    for second, expected in ((1 - 1e-7, 0.0), (1e-7, 1.0)):
        model = fed([[1 - 1e-7], [second], [0.5], [0.5]])
        out = CaseNetwork(model, {}, Options(missing="average", prior=prior))(x)
        assert float(out[0, 1, 0, 0, 0]) == pytest.approx(expected, abs=1e-4)


def test_exclusive_labels_have_the_information_of_labels_and_background_together() -> None:
    model = fed([[0.5] * 2] * 4, output="classes")
    # softmax over background and labels, so probabilities are given as logits
    p = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4], [1 / 3] * 3])

    class Classes(torch.nn.Module):
        def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            return (row[0] @ p).log().reshape(1, 3, 1, 1, 1).expand(len(x), 3, *x.shape[2:])

    model.network = Classes()
    out = CaseNetwork(model, {}, AVERAGE)(torch.ones(1, 1, 4, 4, 4))[0, :, 0, 0, 0]
    w = np.array([0.25, 0.25, 0.5])
    mean = w @ p[:3].numpy()
    expected = bits(*mean) - sum(a * bits(*q) for a, q in zip(w, p[:3].tolist(), strict=True))
    np.testing.assert_allclose(out, [*mean[1:], expected], atol=1e-5)


def test_tasks_are_each_averaged_over_the_values() -> None:
    keys = {"tumor_type": MetadataKey(), "task": MetadataKey(values=["l1", "l2"], dropout=0)}
    rows = {str(i): {"tumor_type": t, "task": "l1"} for i, t in enumerate(TYPES[:2])}
    encoder = MetadataEncoder.fit(rows, keys)
    # rows: two types, unknown; then both tasks
    model = fed([[0.5, 0.5]] * 4, output="task", task_key="task", metadata=encoder)
    model.network = Fed([[0.6], [0.2], [0.9], [0.0], [0.2]])
    out = CaseNetwork(model, {}, AVERAGE)(torch.ones(1, 1, 4, 4, 4))[0, :, 0, 0, 0]
    first = bits(0.4, 0.6) - (bits(0.6, 0.4) + bits(0.2, 0.8)) / 2
    second = bits(0.6, 0.4) - (bits(0.8, 0.2) + bits(0.4, 0.6)) / 2
    np.testing.assert_allclose(out, [0.4, 0.6, max(first, second)], atol=1e-5)


def geometry(shape: tuple[int, int, int]) -> Geometry:
    model = fed([[0.5]] * 4)
    return model.preprocess([np.zeros(shape, np.float32)], np.eye(4)).geometry


def test_windows_that_overlap_and_flips_change_nothing_of_a_voxelwise_information() -> None:
    model = fed([[0.9], [0.1], [0.2], [0.7]])
    array = np.zeros((1, 7, 6, 9), np.float32)
    array[0, 2:5, 1:4, 3:8] = 1
    case = Preprocessed(array, geometry((6, 9, 7)))
    found = predict(
        model, case, {}, Options(missing="average", flips=("axial",)), probabilities=True
    )
    on = found.probabilities[0] > 0.1
    assert on.sum() == array.sum() and found.entropy is None
    mean = (0.9 + 0.1 + 2 * 0.2) / 4
    within = (bits(0.9, 0.1) + bits(0.1, 0.9) + 2 * bits(0.2, 0.8)) / 4
    np.testing.assert_allclose(found.metadata_entropy[on], bits(mean, 1 - mean) - within, atol=1e-5)
    np.testing.assert_allclose(found.metadata_entropy[~on], 0, atol=1e-5)
    assert predict(model, case, {"tumor_type": TYPES[0]}, AVERAGE).metadata_entropy is None


def test_a_real_network_gives_the_mean_of_its_predictions_under_each_value(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    array = np.random.default_rng(0).normal(size=(10, 9, 12)).astype(np.float32)
    ready = model.preprocess([array], np.eye(4))
    found = predict(model, ready, {}, AVERAGE, probabilities=True)
    each = [predict(model, ready, {"tumor_type": t}, probabilities=True) for t in TYPES]
    expected = np.mean([e.probabilities for e in each], 0)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    assert 0 < found.metadata_entropy.max() < math.log2(3)


def test_the_mean_needs_no_unknown_and_no_dropout_samples(tmp_path: Path) -> None:
    model = two_keys(tmp_path / "m")
    case = model.preprocess([np.ones((8, 8, 8), np.float32)], np.eye(4))
    with pytest.raises(UserError, match="'b' is missing, and the model was trained without"):
        predict(model, case, {"a": "x"})
    assert predict(model, case, {"a": "x"}, AVERAGE).metadata_entropy is not None
    dropping = make_model(tmp_path / "d", network={"dropout": 0.5})
    for options, message in (
        (Options(samples=2, missing="average"), "do not go together"),
        (Options(prior=(("tumor_type", ((TYPES[0], 1.0),)),)), "--prior is for --missing average"),
    ):
        with pytest.raises(UserError, match=message):
            predict(dropping, case, {}, options)


# the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model and two images, of which the table knows the type of one."""
    make_model(tmp_path / "m")
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        array = rng.normal(size=(9, 8, 10)).astype(np.float32)
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "in" / f"c{i}.nii.gz")
    (tmp_path / "t.csv").write_text(f"case,tumor_type\nc0,\nc1,{TYPES[1]}\n")
    return tmp_path


def command(folder: Path, *more: str) -> int:
    names = [str(folder / n) for n in ("m", "in", "out")]
    return main(["predict", *names, "--table", str(folder / "t.csv"), *more])


def listed(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "predictions.json").read_text())["cases"]


def test_cases_without_the_value_get_a_map_and_a_number(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, "--missing", "average") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "tumor_type is missing, and averaged over, in 1 of 2 cases: c0" in text
    cases = listed(folder)
    assert "metadata_entropy" not in cases["c1"]["outputs"] and "averaged" not in cases["c1"]
    assert cases["c0"]["averaged"] == ["tumor_type"]
    entropy = nib.load(folder / "out" / "c0_metadata_entropy.nii.gz").get_fdata()
    mask = nib.load(folder / "out" / "c0.nii.gz").get_fdata() > 0
    expected = entropy[mask].mean() if mask.any() else None
    assert cases["c0"]["metadata_entropy"] == pytest.approx(expected, rel=1e-5)
    # what was given since is no longer averaged, and its map has gone
    (folder / "t.csv").write_text(f"case,tumor_type\nc0,{TYPES[0]}\nc1,{TYPES[1]}\n")
    assert command(folder, "--missing", "average") == 0
    assert not (folder / "out" / "c0_metadata_entropy.nii.gz").exists()


def test_a_run_goes_on_with_the_same_prior_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prior = ("--missing", "average", "--prior", f"tumor_type={TYPES[0]}:1,{TYPES[1]}:3")
    assert command(folder, *prior) == 0
    capsys.readouterr()
    assert command(folder, *prior, "--continue") == 0
    assert "0 predicted, 2 were there" in " ".join(capsys.readouterr().out.split())
    for other in (("--missing", "average"), (*prior[:3], f"tumor_type={TYPES[0]}:1"), ()):
        assert command(folder, *other, "--continue") == 1
        assert "with other settings" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--missing", "mean"), "--missing must be unknown or average, got 'mean'"),
        (("--missing", "average", "--swap", "tumor_type"), "goes with --missing unknown"),
        (("--prior", "tumor_type=astrocytoma:1"), "--prior is for --missing average"),
        (("--missing", "average", "--samples", "2"), "needs a network with dropout"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    folder: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(folder, *more) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "out" / "predictions.json").exists()


def test_an_older_model_asks_for_a_prior(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = load_model(folder / "m").info
    value = info.model_dump(mode="json")
    for name in ("counts", "quantiles", "vector", "table_columns"):
        del value["metadata"]["keys"][0][name]
    save_model(folder / "m", ModelInfo.model_validate(value))
    assert command(folder, "--missing", "average") == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "c0.nii.gz: --missing average: metadata 'tumor_type': the model does not know" in text
    assert list(listed(folder)) == ["c1"]
    assert command(folder, "--missing", "average", "--prior", f"tumor_type={TYPES[0]}:1") == 0


# the model folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [1, 1]}, r"counts do not fit the values: \[1, 1\]"),
        ({"counts": [1, 1, -1]}, r"counts do not fit"),
        ({"quantiles": [float("nan")]}, "finite number"),
    ],
)
def test_damaged_counts_of_a_model_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    value = make_model(tmp_path / "m").info.model_dump(mode="json")
    value["metadata"]["keys"][0].update(change)
    with pytest.raises(ValidationError, match=message):
        ModelInfo.model_validate(value)


def test_fine_tuning_adds_the_new_cases_to_the_counts(tmp_path: Path) -> None:
    old = make_model(tmp_path / "m")
    plan, _ = make_plan(parse(settings(write_bids(tmp_path / "b")), "test"), tmp_path / "plan")
    given = [TYPES[0], TYPES[0], "glioma"]
    rows = {str(i): {"tumor_type": t} for i, t in enumerate(given)}
    encoder = MetadataEncoder.fit(rows, {"tumor_type": MetadataKey()})
    new = old.info.model_copy(update={"metadata": encoder})
    cases = [Case(i, i, (None,), {}, row) for i, row in rows.items()]
    info, _ = start_from(tmp_path / "m", new, cases, plan.config)
    key = info.metadata["tumor_type"]
    assert dict(zip(key.values, key.counts or [], strict=True)) == {
        TYPES[0]: 3,
        TYPES[1]: 1,
        TYPES[2]: 1,
        "glioma": 1,
    }
