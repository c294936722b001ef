"""The true × fed table and the sensitivity, of predictions that are made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")

from fastfilm.segmentation.evaluation import true_by_fed as counterfactual
from fastfilm.segmentation.evaluation.true_by_fed import sensitivity, swap_table

TRUE = {"c0": "a", "c1": "b", "c2": "a", "c3": "b", "c4": "a"}


def scored(case: str, dice: float | None, mask: Any = None) -> Any:
    """One label of one case: its Dice, and its mask in place of its file."""
    pair = SimpleNamespace(
        case=case,
        subject=case,
        label=SimpleNamespace(name="lesion"),
        prediction=np.array([] if mask is None else mask, bool),
        written=None,
    )
    return SimpleNamespace(pair=pair, values={"Dice": dice})


def test_rows_are_the_cases_of_a_value_and_the_truth_is_compared_with_each_other_value() -> None:
    dice = {
        "a": [0.9, 0.3, 0.7, 0.5, None],
        "b": [0.4, 0.8, 0.6, 0.6, 0.1],
    }
    runs = {
        fed: [scored(c, d) for c, d in zip(TRUE, values, strict=True)]
        for fed, values in dice.items()
    }
    table = swap_table(runs, TRUE)
    for true in "ab":
        mine = [i for i, c in enumerate(TRUE) if TRUE[c] == true]
        for fed in "ab":
            known = [d for i in mine if (d := dice[fed][i]) is not None]
            assert table["rows"][true][fed]["mean"] == pytest.approx(np.mean(known))
            assert table["rows"][true][fed]["n"] == len(known)
        (other,) = {"a", "b"} - {true}
        both = [(dice[true][i], dice[other][i]) for i in mine if dice[true][i] is not None]
        found = table["differences"][true]
        assert found.keys() == {other}
        # positive: the true value is better
        assert found[other]["difference"] == pytest.approx(np.mean([x - y for x, y in both]))
        assert found[other]["effect"] == 1


def test_sensitivity_is_what_predictions_under_any_two_values_do_not_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(counterfactual, "load_mask", lambda mask, values: (None, mask))
    masks = {
        "a": {"same": [1, 1, 0, 0], "moved": [1, 1, 0, 0], "empty": [0, 0, 0, 0]},
        "b": {"same": [1, 1, 0, 0], "moved": [0, 1, 1, 1], "empty": [0, 0, 0, 0]},
        "c": {"same": [1, 1, 0, 0], "moved": [0, 0, 0, 0], "empty": [0, 0, 0, 0], "more": [1]},
    }
    runs = {fed: [scored(c, None, m) for c, m in found.items()] for fed, found in masks.items()}
    assert sensitivity(runs) == {
        "same/lesion": 0,
        "moved/lesion": pytest.approx(((1 - 2 / 5) + 1 + 1) / 3),
        "empty/lesion": 0,
    }
