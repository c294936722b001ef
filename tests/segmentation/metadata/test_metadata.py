"""The metadata encoder: values of every kind, missing and unseen ones, growth."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("scipy", reason="needs the extra [segmentation]")

import fastfilm
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.metadata.density import density_edges
from fastfilm.segmentation.metadata.encoder import (
    MetadataEncoder,
    MetadataError,
    encode_rows,
)
from fastfilm.segmentation.support.errors import Problems
from fastfilm.segmentation.training.finetuning import grown_encoder


def fit(given: list[Any], **options: Any) -> MetadataEncoder:
    rows = {f"case-{i}": {"k": v} for i, v in enumerate(given)}
    return MetadataEncoder.fit(rows, {"k": MetadataKey(**options)})


def row(encoder: MetadataEncoder, value: Any) -> list[float]:
    return [float(x) for x in encoder.encode({"k": value})]


def test_categories_are_one_hot_in_sorted_order_with_unknown_last() -> None:
    encoder = fit(["b", "a", "b"])
    assert encoder.columns() == ["k=a", "k=b", "k=unknown"]
    assert row(encoder, "b") == [0, 1, 0] and row(encoder, None) == [0, 0, 1]


def test_numbers_as_categories_are_one_whether_written_3_or_3_0() -> None:
    encoder = fit([3, 1.5, "3"])
    assert encoder.values("k") == ["1.5", "3"]
    assert row(encoder, 3.0) == row(encoder, "3") == [0, 1, 0]


def test_ordered_values_switch_on_all_ranks_below() -> None:
    encoder = fit(["G2", "G4"], kind="ordered", values=["G2", "G3", "G4"], dropout=0)
    assert encoder.columns() == ["k>G2", "k>G3"]
    assert [row(encoder, v) for v in ("G2", "G3", "G4")] == [[0, 0], [1, 0], [1, 1]]


def test_several_labels_at_once_and_none_of_them() -> None:
    encoder = fit(["x; y", ["z"], "y"], kind="multilabel", dropout=0)
    assert row(encoder, "z;x") == [1, 0, 1]
    with pytest.raises(MetadataError, match="missing"):
        encoder.encode({"k": []})


def test_continuous_values_have_mean_0_and_deviation_1() -> None:
    values = [1.0, 2.0, 6.0, 11.0]
    encoder = fit([str(v) for v in values], kind="continuous")
    rows = encode_rows(encoder, [{"k": v} for v in values])
    np.testing.assert_allclose(rows[:, 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(rows[:, 0].std(), 1, atol=1e-6)
    assert row(encoder, None) == [0, 1]


def test_the_logarithm_of_a_value_needs_a_positive_one() -> None:
    encoder = fit([1, 10, 100], kind="continuous", scaling="log")
    assert row(encoder, 10)[0] == pytest.approx(0, abs=1e-6)
    assert row(encoder, 1)[0] == pytest.approx(-row(encoder, 100)[0])
    with pytest.raises(MetadataError, match="positive number, got 0"):
        encoder.encode({"k": 0})


def test_echo_times_of_several_echoes_are_averaged() -> None:
    encoder = fit([[1, 3], 4.0], kind="continuous")
    assert row(encoder, [1, 3]) == row(encoder, 2)


def test_bins_lie_between_clusters_of_values() -> None:
    rng = np.random.default_rng(0)
    groups = [rng.normal(m, 0.5, 40) for m in (9.0, 30.0, 90.0)]
    edges = density_edges(np.concatenate(groups))
    assert len(edges) == 2 and 12 < edges[0] < 27 and 33 < edges[1] < 87
    encoder = fit([float(v) for g in groups for v in g], kind="continuous", scaling="bins")
    assert [int(np.argmax(row(encoder, v))) for v in (8, 31, 1000, None)] == [0, 1, 2, 3]


def test_one_cluster_or_one_value_is_one_bin() -> None:
    assert density_edges(np.full(30, 2.5)) == []
    assert density_edges(np.random.default_rng(1).normal(size=200)) == []


def test_a_missing_value_is_an_error_where_nothing_trained_unknown() -> None:
    encoder = fit(["a", "b"], dropout=0)
    for missing in (None, "n/a", " N/A ", float("nan"), "", " "):
        with pytest.raises(MetadataError, match=r"'k' is missing.*one of a, b"):
            encoder.encode({"k": missing})
    trained = fit(["a", "b", "n/a"], dropout=0)
    assert row(trained, None) == [0, 0, 1]


def test_spellings_of_missing_are_the_listed_ones_and_values_are_values() -> None:
    assert row(fit(["a", "?"], missing=["?"]), "?") == [0, 1]
    assert fit(["a", "?", "n/a"], missing=["?"]).values("k") == ["a", "n/a"]
    assert fit(["a", "none", "NA", "null", "nan"]).values("k") == ["NA", "a", "nan", "none", "null"]
    chosen = fit(
        ["none", "gadolinium", "NA"], values=["none", "gadolinium"], missing=["none", "na"]
    )
    assert row(chosen, "none") == [1, 0, 0] and row(chosen, "None") == row(chosen, None) == [
        0,
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("source", "missing"), [("bids", ["n/a"]), ("csv", ["n/a", "na", "nan", "none", "null"])]
)
def test_what_counts_as_missing_depends_on_the_layout_of_the_data(
    source: str, missing: list[str]
) -> None:
    data = {"source": source, "root": "x", "contrasts": ["T1w"], "labels": {"a": 1}}
    config = parse({"data": data, "metadata": {"k": {}, "own": {"missing": ["-9"]}}}, "test")
    assert config.metadata["k"].missing == missing and config.metadata["own"].missing == ["-9"]


@pytest.mark.parametrize("value", [True, None])
def test_values_that_yaml_does_not_read_as_text_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="in quotes"):
        MetadataKey(values=["a", value])


def test_an_unseen_value_is_an_error_or_unknown_by_choice() -> None:
    with pytest.raises(MetadataError, match=r"'k' has the value 'c'.*one of a, b"):
        fit(["a", "b"]).encode({"k": "c"})
    assert row(fit(["a", "b"], unseen="unknown"), "c") == [0, 0, 1]
    with pytest.raises(Problems, match="needs dropout"):
        fit(["a", "b"], unseen="unknown", dropout=0)


def test_a_slip_in_a_key_is_not_unknown() -> None:
    with pytest.raises(MetadataError, match="'tumour_type' is not one of the model's: k"):
        fit(["a"]).encode({"tumour_type": "a"})


def test_every_value_that_does_not_fit_is_listed_with_its_case() -> None:
    with pytest.raises(Problems) as error:
        fit(["1", "x", "3", "y"], kind="continuous")
    assert [p.split(":")[0] for p in error.value.problems] == ["case-1", "case-3"]
    with pytest.raises(Problems, match="case-1"):
        fit(["a", "c"], values=["a", "b"])


def test_a_key_without_any_value_is_named() -> None:
    with pytest.raises(Problems, match="'k' has no value"):
        fit([None, "n/a"])


def test_dropout_hides_its_share_of_the_values() -> None:
    encoder = fit(["a", "b"], dropout=0.25)
    rng = np.random.default_rng(0)
    hidden = sum("k" in encoder.draw_hidden(rng) for _ in range(4000))
    assert 900 < hidden < 1100
    assert encoder.encode({"k": "a"}, {"k"}).tolist() == [0, 0, 1]


def test_json_brings_back_the_same_encoder() -> None:
    rows = {
        f"c{i}": {"a": "xy"[i % 2], "b": i * 1.1, "c": i % 3, "d": "p;q", "e": i + 1}
        for i in range(9)
    }
    keys = {
        "a": MetadataKey(),
        "b": MetadataKey(kind="continuous", scaling="bins"),
        "c": MetadataKey(kind="ordered", values=["0", "1", "2"]),
        "d": MetadataKey(kind="multilabel"),
        "e": MetadataKey(kind="continuous", scaling="log"),
    }
    encoder = MetadataEncoder.fit(rows, keys)
    again = MetadataEncoder.from_json(json.loads(json.dumps(encoder.to_json())))
    for values in rows.values():
        assert np.array_equal(encoder.encode(values), again.encode(values))
    assert len(encoder.columns()) == encoder.size == len(encoder.encode(rows["c0"]))


@pytest.mark.parametrize("network", ["FiLMedUNet", "Modified3DUNet"])
def test_a_grown_encoder_leaves_the_values_that_were_there_as_they_were(network: str) -> None:
    rows = {f"c{i}": {"a": "xy"[i % 2], "b": "pq"[i % 2]} for i in range(4)}
    encoder = MetadataEncoder.fit(rows, {"a": MetadataKey(), "b": MetadataKey()})
    torch.manual_seed(0)
    size, options = (32, 32), {"depth": 2}
    if network == "Modified3DUNet":
        size, options = (16, 16, 32), {}
    cls = getattr(fastfilm, network)
    net = cls(1, 1, base_filters=4, metadata_size=encoder.size, **options).eval()
    image = torch.randn(2, 1, *size)
    before = net(image, encode_rows(encoder, [rows["c0"], rows["c1"]]))
    grown = grown_encoder(net, encoder, [("a", "z")])
    after = net(image, encode_rows(grown, [rows["c0"], rows["c1"]]))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    new = net(image, encode_rows(grown, [{"a": "z", "b": "p"}] * 2))
    assert torch.isfinite(new).all() and not torch.allclose(new, after)
    assert grown.values("a") == ["x", "y", "z"] and encoder.values("a") == ["x", "y"]
    # what is shared stays shared, so that one optimiser step moves all
    firsts = {id(g.hidden[0].weight) for g in net.film}
    assert len(firsts) == 1
