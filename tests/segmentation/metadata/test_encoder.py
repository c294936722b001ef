"""Columns of the metadata encoder at their edges: separators, bins, equal numbers, hidden keys, growth."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("scipy", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.sections import MetadataKey
from fastfilm.segmentation.metadata.density import density_edges, log_density
from fastfilm.segmentation.metadata.encoder import KeyEncoder, MetadataEncoder


def fit(given: list[Any], **options: Any) -> MetadataEncoder:
    rows = {f"case-{i}": {"k": v} for i, v in enumerate(given)}
    return MetadataEncoder.fit(rows, {"k": MetadataKey(**options)})


def on(encoder: MetadataEncoder, value: Any) -> list[str]:
    """The columns that are 1."""
    row = encoder.encode({"k": value})
    assert set(row.tolist()) <= {0, 1}
    return [c for c, x in zip(encoder.columns(), row.tolist(), strict=True) if x]


def test_the_separator_parts_labels_and_nothing_else_does() -> None:
    encoder = fit(["x;1 | y", "z"], kind="multilabel", separator="|", dropout=0)
    assert encoder.values("k") == ["x;1", "y", "z"]
    assert on(encoder, "z|x;1") == ["k=x;1", "k=z"] and on(encoder, ["y", "x;1"]) == [
        "k=x;1",
        "k=y",
    ]


def test_a_number_on_an_edge_belongs_to_the_bin_above() -> None:
    """As the columns are named: [low, high)."""
    key = KeyEncoder(name="k", kind="continuous", edges=[1.0, 2.5])
    encoder = MetadataEncoder(keys=[key])
    assert encoder.columns() == ["k in [-inf, 1)", "k in [1, 2.5)", "k in [2.5, inf)"]
    below = np.nextafter(2.5, 0)
    for value, bin_ in ((0.5, 0), (1.0, 1), (float(below), 1), (2.5, 2), (9, 2)):
        assert on(encoder, value) == [encoder.columns()[bin_]]


@pytest.mark.parametrize("scaling", ["standardise", "log"])
def test_one_number_is_0_and_others_are_its_distance(scaling: Any) -> None:
    encoder = fit(["7", 7.0, "7"], kind="continuous", scaling=scaling, dropout=0)
    far = 7 * np.exp(2.0) if scaling == "log" else 9.0
    assert encoder.encode({"k": 7})[0] == 0
    assert encoder.encode({"k": far})[0] == pytest.approx(2.0, rel=1e-5)


def test_keys_are_hidden_independently_each_with_its_own_share() -> None:
    rows = {"a": {"p": "x", "q": "x", "r": "x"}}
    keys = {
        "p": MetadataKey(dropout=0.5),
        "q": MetadataKey(dropout=0.2),
        "r": MetadataKey(dropout=0),
    }
    encoder = MetadataEncoder.fit(rows, {**keys})
    rng = np.random.default_rng(0)
    seen = Counter(tuple(sorted(encoder.draw_hidden(rng))) for _ in range(4000))
    expected = {(): 0.4, ("p",): 0.4, ("q",): 0.1, ("p", "q"): 0.1}
    assert seen.keys() == expected.keys()
    for hidden, share in expected.items():
        assert seen[hidden] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("unknown", [False, True])
@pytest.mark.parametrize("kind", ["category", "multilabel", "ordered"])
def test_a_grown_key_has_its_new_column_where_it_says(kind: Any, unknown: bool) -> None:
    share = 0.1 * unknown
    rows = {str(i): {"a": "uv"[i], "b": "st"[i], "c": i} for i in range(2)}
    keys = {
        "a": MetadataKey(dropout=share),
        "b": MetadataKey(kind=kind, values=["s", "t"], dropout=share),
        "c": MetadataKey(kind="continuous", dropout=share),
    }
    encoder = MetadataEncoder.fit(rows, keys)
    grown, at = encoder.grow("b", "new")
    new = "b>t" if kind == "ordered" else "b=new"
    assert [c for c in grown.columns() if c not in encoder.columns()] == [new]
    assert grown.columns()[at] == new and grown.encode({"a": "u", "b": "new", "c": 0})[at] == 1
    for values in rows.values():
        assert np.array_equal(np.delete(grown.encode(values), at), encoder.encode(values))


def test_the_bandwidth_is_the_one_that_predicts_values_left_out() -> None:
    """By the definition, on two close groups; a bandwidth that is fitted to its own data is too small."""
    x = np.sort(np.concatenate([np.random.default_rng(0).normal(m, 1.0, 60) for m in (0.0, 5.0)]))
    z = (x - x.mean()) / x.std()
    fold = np.random.default_rng(0).permutation(len(z)) % 5
    widths = np.logspace(-3, 0.5, 50)
    score = [
        sum(log_density(z[fold == k], z[fold != k], w).sum() for k in range(5)) for w in widths
    ]
    best = float(widths[int(np.argmax(score))])
    at = np.linspace(z[0], z[-1], 1000)
    density = np.exp(-0.5 * ((at[:, None] - z) / best) ** 2).sum(1)
    lowest = [i for i in range(1, 999) if density[i - 1] > density[i] < density[i + 1]]
    # in the tails a single value has a minimum beside it: such bins are joined
    inner = [at[i] for i in lowest if 0.02 <= (z < at[i]).mean() <= 0.98]
    assert len(inner) == 1 and density_edges(x) == pytest.approx(
        [inner[0] * x.std() + x.mean()], rel=1e-6
    )


def test_single_values_far_off_get_no_bin_of_their_own() -> None:
    x = np.concatenate([np.random.default_rng(1).normal(0, 1, 200), [40.0, -35.0]])
    assert density_edges(x) == []
    crowd = np.concatenate([x, np.random.default_rng(2).normal(40, 1, 10)])
    (edge,) = density_edges(crowd)
    assert 4 < edge < 37
