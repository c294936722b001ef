"""The verdict of a trial: each rule by itself, and whole trials that are drawn from a known truth."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")

from fastfilm.segmentation.trial.results import collect
from fastfilm.segmentation.trial.statistics import Needed
from fastfilm.segmentation.trial.verdict import needed_text, p_text, p_words, signed, verdict

from ...support.trials import write_trial


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a trial with arms conditioned, unconditioned and shuffled; margin 0.01, alpha 0.05."""
    out = write_trial(
        tmp_path_factory.mktemp("trial"), subjects=20, folds=2, wrong={"tumor_type": 0.1}
    )
    return collect(out)


SURE = {"mean": 0.03, "low": 0.02, "high": 0.04, "p": 0.001}
OPEN = {"mean": 0.012, "low": -0.004, "high": 0.028, "p": 0.12}
NONE = {"mean": 0.001, "low": -0.006, "high": 0.008, "p": 0.7}


def given(
    base: dict[str, Any],
    primary: dict[str, Any],
    shuffled: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """``base`` with other numbers of conditioned - unconditioned and conditioned - shuffled."""
    results = copy.deepcopy(base)
    results["primary"].update(primary, **more)
    if shuffled is None:
        results["against"] = {}
    else:
        results["against"]["shuffled"].update(shuffled, **more)
    return results


@pytest.mark.parametrize(
    ("primary", "shuffled", "answer", "reason"),
    [
        (SURE, SURE, "use it", "against shuffled metadata, +0.020 to +0.040, lies above 0"),
        (SURE, None, "use it", "the mean, +0.030, is at least the margin of 0.01"),
        (SURE, NONE, "do not", "against shuffled metadata, -0.006 to +0.008, lies below the margin"),
        (SURE, OPEN, "cannot tell yet", "against shuffled metadata, -0.004 to +0.028, lies on both sides"),
        (OPEN, SURE, "cannot tell yet", "the interval, -0.004 to +0.028, lies on both sides of 0"),
        (NONE, SURE, "do not", "-0.006 to +0.008, lies below the margin of 0.01"),
        (NONE, OPEN, "do not", "lies below the margin"),
        # surely better, but by less than is worth having
        ({"mean": 0.005, "low": 0.002, "high": 0.008, "p": 0.01}, SURE, "do not", "below the margin"),
        # surely better, and perhaps by enough
        (
            {"mean": 0.009, "low": 0.002, "high": 0.016, "p": 0.01}, SURE, "cannot tell yet",
            "the mean, +0.009, is below the margin of 0.01",
        ),
        ({"mean": -0.03, "low": -0.05, "high": -0.01, "p": 0.01}, SURE, "do not", "lies below 0"),
        # the permutation tests disagree with the interval
        (SURE | {"p": 0.06}, SURE, "cannot tell yet", "p = 0.06 is not below 0.05"),
        # the ends of the rules: low at 0 is not above it, high at the margin not below it
        (SURE | {"low": 0.0}, SURE, "cannot tell yet", "on both sides of 0"),
        (NONE | {"high": 0.01}, SURE, "cannot tell yet", "on both sides of 0"),
        ({"mean": 0.01, "low": 0.001, "high": 0.019, "p": 0.03}, SURE, "use it", "at least the margin"),
    ],
)  # fmt: skip
def test_each_rule_gives_its_answer_with_its_reason(
    base: dict[str, Any],
    primary: dict[str, Any],
    shuffled: dict[str, Any] | None,
    answer: str,
    reason: str,
) -> None:
    found = verdict(given(base, primary, shuffled))
    assert found.answer == answer
    assert any(reason in r for r in found.reasons), found.reasons
    assert len(found.sentences) == 5 and all(s.endswith(".") for s in found.sentences)


@pytest.mark.parametrize("numbers", [SURE, NONE, OPEN])
@pytest.mark.parametrize(
    ("more", "reason", "then"),
    [
        ({"training_known": False, "seeds": 1}, "one seed", "trial.seeds: 3 or more"),
        ({"subjects": 5}, "5 subjects: 6 are the least", "more subjects, 6 at the least"),
        (
            {"low": None, "high": None, "p": None, "clusters": 1},
            "of one cluster",
            "subjects of more clusters",
        ),
    ],
)
def test_too_little_is_neither_yes_nor_no(
    base: dict[str, Any], numbers: dict[str, Any], more: dict[str, Any], reason: str, then: str
) -> None:
    found = verdict(given(base, numbers, numbers, **more))
    assert found.answer == "cannot tell yet"
    assert any(reason in r for r in found.reasons) and then in found.sentences[4]


def test_few_pairs_of_networks_or_clusters_cannot_say_yes_and_say_why(base: dict[str, Any]) -> None:
    few = {"networks": 4, "p": 0.125, "p_smallest": 0.125}
    found = verdict(given(base, SURE | few, SURE))
    assert found.answer == "cannot tell yet"
    assert "4 pairs of networks: no permutation of fewer than 6 gives p < 0.05" in found.reasons
    sites = {"clusters": 3, "p": 0.25, "p_smallest": 0.25}
    assert any("3 clusters" in r for r in verdict(given(base, SURE | sites, SURE)).reasons)
    # the interval can still say no
    assert verdict(given(base, NONE | sites, SURE)).answer == "do not"


def test_the_lines_say_the_effect_the_source_the_places_and_the_next_step(
    base: dict[str, Any],
) -> None:
    results = given(base, SURE, SURE)
    results["arms"]["conditioned"]["mean"], results["arms"]["unconditioned"]["mean"] = 0.75, 0.72
    results["arms"]["shuffled"]["mean"] = 0.72
    first, effect, source, places, then = verdict(results).sentences
    assert first == "Use it: the metadata (tumor_type) make the segmentation of new cases better."
    assert effect == (
        "Mean Dice of held-out cases: 0.750 with metadata, 0.720 without: +0.030 (95 % interval +0.020 to +0.040;"
        " p = 0.001): if metadata changed nothing, chance would bring a difference as large in about 1 of 1000"
        " trials."
    )
    assert source.startswith("It is the values, not the additional parameters: ")
    assert (
        places.startswith("Largest difference in tumor_type = ") and "in none of 2 groups" in places
    )
    assert then.startswith("Next: train with metadata (fastfilm train)")


def test_groups_that_lose_and_keys_that_are_not_used_are_named(base: dict[str, Any]) -> None:
    results = given(base, SURE, SURE)
    group = results["groups"]["tumor_type"]["groups"]["ependymoma"]
    group.update(mean=-0.02, low=-0.03, high=-0.01)
    results["extremes"]["worst"] = ["tumor_type", "ependymoma"]
    results["swaps"]["tumor_type"]["used"] = False
    lines = verdict(results).sentences
    assert "it hurts (interval below 0) in tumor_type = ependymoma." in lines[3]
    assert "do not use tumor_type (a wrong value costs less than 0.01)" in lines[4]
    results["extremes"] = None
    assert "make no groups" in verdict(results).sentences[3]


def test_a_gain_of_the_parameters_is_called_so(base: dict[str, Any]) -> None:
    lines = verdict(given(base, SURE, NONE)).sentences
    assert lines[0].startswith("Do not use it: the gain does not come from the values")
    assert "more filters" in lines[4]
    assert "less than is worth having" in verdict(given(base, NONE, NONE)).sentences[0]
    worse = {"mean": -0.03, "low": -0.05, "high": -0.01, "p": 0.01}
    lines = verdict(given(base, worse, worse)).sentences
    assert "worse" in lines[0] and lines[2].startswith("The true values do worse than wrong ones")
    assert "no arm shuffled" in verdict(given(base, SURE)).sentences[2]
    assert (
        verdict(given(base, OPEN, OPEN)).sentences[2].startswith("Values or parameters: not clear")
    )


def test_the_next_step_names_the_numbers_of_the_comparison_that_is_open(
    base: dict[str, Any],
) -> None:
    results = given(base, OPEN, SURE)
    results["needed"]["unconditioned"] = {"target": "zero", "subjects": 12, "seeds": None}
    results["needed"]["shuffled"] = {"target": "margin", "subjects": 30, "seeds": 4}
    text = verdict(results).sentences[4]
    assert text.startswith(
        "Next: 12 more subjects would probably bring the interval above 0 (80 % power"
    )
    results = given(results, SURE, OPEN)
    text = verdict(results).sentences[4]
    assert "30 more subjects or 4 more seeds for each fold would probably" in text
    assert "the interval against shuffled metadata below the margin" in text


def test_what_is_needed_is_said_in_words() -> None:
    assert "1 more seed for each fold would" in needed_text(Needed("zero", 0, 1), "unconditioned")
    assert needed_text(Needed("zero", None, None), "unconditioned").startswith(
        "neither more subjects"
    )
    assert needed_text(Needed("margin", 0, 0), "unconditioned").startswith("a few more seeds")


def test_numbers_are_said_in_words() -> None:
    assert [signed(x) for x in (0.01234, -0.5, 0.0001, -0.0001, None)] == [
        "+0.012", "-0.500", "0.000", "0.000", "–"
    ]  # fmt: skip
    texts = {0.0002: "< 0.001", 0.0123: "= 0.012", 0.5: "= 0.50", None: "not defined"}
    assert {p: p_text(p) for p in texts} == texts
    for p, words in (
        (0.0001, "fewer than 1 of 1000"),
        (0.004, "about 4 of 1000"),
        (0.26, "about 26 of 100"),
    ):
        assert words in p_words(p)
    assert "not defined" in p_words(None)


@pytest.mark.parametrize(
    ("gain", "answer"),
    [
        ({"conditioned": 0.05, "shuffled": 0.0}, "use it"),
        ({"conditioned": 0.0, "shuffled": 0.0}, "do not"),
        ({"conditioned": 0.05, "shuffled": 0.05}, "do not"),
        ({"conditioned": 0.008, "shuffled": 0.0}, "cannot tell yet"),
    ],
)
def test_a_trial_with_a_known_truth_finds_it(
    tmp_path: Path, gain: dict[str, float], answer: str
) -> None:
    small = {"subject": 0.006, "run": 0.002, "rest": 0.004} if answer != "cannot tell yet" else {}
    out = write_trial(tmp_path, gain, subjects=24, folds=3, seed=1, **small)  # type: ignore[arg-type]
    found = verdict(collect(out))
    assert found.answer == answer, found.sentences
    assert found.to_json()["answer"] == answer


def test_networks_that_learned_nothing_give_no_answer(base: dict[str, Any]) -> None:
    results = given(base, NONE, NONE)
    assert verdict(results).answer == "do not"
    for arm in ("conditioned", "unconditioned"):
        results["arms"][arm]["mean"] = 0.09
    found = verdict(results)
    assert found.answer == "cannot tell yet"
    assert found.reasons == (
        "mean Dice is 0.090 at the most: the networks have not learned the task",
    )
    assert "more training.epochs" in found.sentences[-1]
    # one arm that did is enough
    results["arms"]["unconditioned"]["mean"] = 0.11
    assert verdict(results).answer == "do not"
