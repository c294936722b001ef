"""Whether to use the metadata: one of three answers, by rules that are fixed before the trial.

The margin is the smallest difference of the mean Dice that is worth having, and the interval that of conditioned -
unconditioned. The first rule that holds gives the answer:

1. One seed, fewer than ``MINIMUM`` subjects, or no interval: "cannot tell yet". With one seed the noise of
   training is not known, and the interval leaves it out; a trial that cannot say yes for that reason cannot say no
   either. The same where neither arm reaches a mean Dice of ``LEARNED``: networks that have not learned the task
   do not differ, whatever the metadata are worth.
2. The interval lies below the margin (below 0 too): "do not". Metadata have to be asked for, checked and kept, and
   a wrong value can do harm: what brings less than is worth having is not used, even where it is surely above 0.
3. The interval lies above 0, p is below alpha, and the mean is the margin or more; and, where there is an arm
   "shuffled", so does the interval of conditioned - shuffled: "use it". Shuffled metadata leave the network its
   additional parameters and take the meaning from the values: only the values are a reason to ask for metadata.
   Both have to hold, so that no correction for two tests is needed (Berger 1982).
4. As rule 3, but the interval of conditioned - shuffled lies below the margin: "do not". The gain comes with the
   additional parameters, and a network without metadata can have these.
5. "cannot tell yet", with what would decide.

With fewer than ``MINIMUM`` pairs of networks or clusters p cannot be below 0.05, so that rule 3 never holds; rule
2 may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..reports.layout import NONE
from .scores import CONDITIONED, SHUFFLED, UNCONDITIONED
from .statistics import MINIMUM, Difference, Needed

Answer = Literal["use it", "do not", "cannot tell yet"]

LEARNED = 0.1
"""Mean Dice that the better of the two main arms needs: below it the networks have not learned the task."""


@dataclass(frozen=True)
class Verdict:
    """The answer to "does my metadata help?".

    Attributes:
        reasons: what the answer follows from, one rule's condition each.
        sentences: five lines: answer; effect; values or parameters; where it helps and hurts; next step.
    """

    answer: Answer
    reasons: tuple[str, ...]
    sentences: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Trial:
    """What the rules look at."""

    results: Mapping[str, Any]
    primary: Difference
    shuffled: Difference | None
    margin: float
    alpha: float

    @property
    def gains(self) -> bool:
        """Rule 3 without the arm shuffled."""
        p = self.primary
        return p.superior and p.p is not None and p.p < self.alpha and p.mean >= self.margin


def verdict(results: Mapping[str, Any]) -> Verdict:
    """The answer that ``results`` (of ``results.collect``) give."""
    shuffled = results["against"].get(SHUFFLED)
    trial = _Trial(
        results,
        Difference(**_own(results["primary"])),
        None if shuffled is None else Difference(**_own(shuffled)),
        results["design"]["margin"],
        results["design"]["alpha"],
    )
    answer, reasons = _answer(trial)
    lines = (
        _first_line(trial, answer),
        _effect(trial),
        _values_or_parameters(trial),
        _where(trial),
        _next(trial, answer),
    )
    return Verdict(answer, tuple(reasons), lines)


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a row that are a Difference's."""
    return {name: row[name] for name in Difference.__dataclass_fields__}


def _answer(trial: _Trial) -> tuple[Answer, list[str]]:
    p, margin = trial.primary, trial.margin
    little = [*_too_little(p), *_not_learned(trial)]
    if little:
        return "cannot tell yet", little
    lies = f"the interval, {signed(p.low)} to {signed(p.high)}, lies"
    if p.excludes(margin):
        return "do not", [f"{lies} below {'0' if below(p) else f'the margin of {margin:g}'}"]
    if trial.gains:
        reasons = [
            f"{lies} above 0 (p {p_text(p.p)})",
            f"the mean, {signed(p.mean)}, is at least the margin of {margin:g}",
        ]
        if trial.shuffled is None:
            return "use it", reasons
        s = trial.shuffled
        lies = f"the interval against shuffled metadata, {signed(s.low)} to {signed(s.high)}, lies"
        if s.superior:
            return "use it", [*reasons, f"{lies} above 0"]
        if s.excludes(margin):
            return "do not", [f"{lies} below the margin of {margin:g}"]
        return "cannot tell yet", [f"{lies} on both sides of 0"]
    reasons = []
    if not p.superior:
        reasons.append(f"{lies} on both sides of 0")
    elif p.p is None or p.p >= trial.alpha:
        reasons.append(f"p {p_text(p.p)} is not below {trial.alpha:g}")
    if p.superior and p.mean < margin:
        reasons.append(f"the mean, {signed(p.mean)}, is below the margin of {margin:g}")
    if p.p_smallest >= trial.alpha:
        reasons += _few_units(p)
    return "cannot tell yet", reasons


def _too_little(p: Difference) -> list[str]:
    """What rule 1 finds."""
    found = []
    if not p.training_known:
        found.append("one seed: how much a result depends on the training run is not known")
    if p.subjects < MINIMUM:
        found.append(f"{p.subjects} subjects: {MINIMUM} are the least")
    if p.low is None and p.clusters is not None:
        found.append("all subjects are of one cluster: nothing is known of others")
    return found


def _not_learned(trial: _Trial) -> list[str]:
    """What rule 1 finds in the level of Dice."""
    best = max(trial.results["arms"][arm]["mean"] for arm in (CONDITIONED, UNCONDITIONED))
    if best >= LEARNED:
        return []
    return [f"mean Dice is {best:.3f} at the most: the networks have not learned the task"]


def _few_units(p: Difference) -> list[str]:
    counts = (p.networks, "pairs of networks"), (p.clusters, "clusters")
    return [
        f"{n} {what}: no permutation of fewer than {MINIMUM} gives p < 0.05"
        for n, what in counts
        if n is not None and n < MINIMUM
    ]


def below(p: Difference) -> bool:
    """Whether the interval lies below 0."""
    return p.excludes(0.0)


def _first_line(trial: _Trial, answer: Answer) -> str:
    keys = ", ".join(trial.results["design"]["keys"]) or "no key"
    if answer == "use it":
        return f"Use it: the metadata ({keys}) make the segmentation of new cases better."
    if answer == "cannot tell yet":
        return f"Cannot tell yet whether the metadata ({keys}) help."
    if below(trial.primary):
        return f"Do not use it: the metadata ({keys}) make the segmentation of new cases worse."
    if trial.primary.excludes(trial.margin):
        return f"Do not use it: the metadata ({keys}) bring less than is worth having."
    return f"Do not use it: the gain does not come from the values of the metadata ({keys})."


def _effect(trial: _Trial) -> str:
    p, arms = trial.primary, trial.results["arms"]
    with_, without = (arms[a]["mean"] for a in (CONDITIONED, UNCONDITIONED))
    text = f"Mean Dice of held-out cases: {with_:.3f} with metadata, {without:.3f} without: {signed(p.mean)}"
    if p.low is None or p.high is None:
        return f"{text}; no interval from one {'subject' if p.clusters is None else 'cluster'}."
    text += f" (95 % interval {signed(p.low)} to {signed(p.high)}"
    if not p.training_known:
        return f"{text}, for these networks alone: one seed)."
    return f"{text}; p {p_text(p.p)}): {p_words(p.p)}."


def _values_or_parameters(trial: _Trial) -> str:
    s = trial.shuffled
    if s is None:
        return (
            "Values or parameters: not known, the trial has no arm shuffled (trial.arms), in which the network has"
            " the same parameters and wrong values."
        )
    mean = trial.results["arms"][SHUFFLED]["mean"]
    text = f"trained with other cases' metadata the network reaches {mean:.3f}, conditioned - shuffled is"
    text += f" {signed(s.mean)}"
    if s.low is None or not s.training_known:
        return f"Values or parameters: not known; {text}, without an interval for new trainings."
    text += f" (95 % interval {signed(s.low)} to {signed(s.high)})"
    if s.superior:
        return f"It is the values, not the additional parameters: {text}."
    if below(s):
        return f"The true values do worse than wrong ones: {text}."
    if s.excludes(trial.margin):
        return f"The values bring less than is worth having: {text}."
    return f"Values or parameters: not clear yet; {text}."


def _where(trial: _Trial) -> str:
    groups, extremes = trial.results["groups"], trial.results["extremes"]
    if extremes is None:
        return "Where it helps and hurts: the metadata make no groups of two subjects or more."
    rows = [
        (group_name(key, name, found["binned"]), row)
        for key, found in groups.items()
        for name, row in found["groups"].items()
        if row["high"] is not None
    ]
    best, worst = (
        (group_name(key, name, groups[key]["binned"]), groups[key]["groups"][name])
        for key, name in (extremes["best"], extremes["worst"])
    )
    text = f"Largest difference in {best[0]}, {_group(best[1])}, smallest in {worst[0]}, {_group(worst[1])}"
    hurt = [name for name, row in rows if row["high"] < 0]
    if hurt:
        return f"{text}; it hurts (interval below 0) in {', '.join(hurt)}."
    return f"{text}; in none of {len(rows)} groups does the interval lie below 0."


def _group(row: Mapping[str, Any]) -> str:
    return f"{signed(row['mean'])} ({ends(row)}, {row['cases']} cases)"


def group_name(key: str, group: str, binned: bool) -> str:
    """``sex = f``, ``age 20–34``."""
    return f"{key} {group}" if binned else f"{key} = {group}"


def _next(trial: _Trial, answer: Answer) -> str:
    p = trial.primary
    unused = [key for key, swap in trial.results["swaps"].items() if swap["used"] is False]
    if answer == "use it":
        text = "Next: train with metadata (fastfilm train), and take care that values are right"
        if unused:
            text += (
                f"; the networks do not use {', '.join(unused)} (a wrong value costs less than"
                f" {trial.margin:g}): try without"
            )
        return f"{text}."
    if answer == "do not":
        if p.excludes(trial.margin):
            return "Next: train without metadata (the configuration without its metadata section)."
        return (
            "Next: train without metadata; if the gain is wanted, give that network more filters"
            " (network.base_filters)."
        )
    if not p.training_known:
        return "Next: the same trial with trial.seeds: 3 or more."
    if p.subjects < MINIMUM:
        return f"Next: more subjects, {MINIMUM} at the least."
    if _not_learned(trial):
        return (
            "Next: a trial whose networks learn the task: more training.epochs, or another network."
        )
    if p.low is None:
        return f"Next: subjects of more clusters, {MINIMUM} at the least, or no trial.cluster."
    which = SHUFFLED if trial.gains else UNCONDITIONED
    return f"Next: {needed_text(Needed(**trial.results['needed'][which]), which)}."


def needed_text(needed: Needed, arm: str) -> str:
    """What would decide, without a full stop.

    Args:
        arm: that the arm conditioned is compared with.
    """
    more = []
    if needed.subjects:
        more.append(f"{needed.subjects} more subjects")
    if needed.seeds:
        more.append(f"{needed.seeds} more {'seed' if needed.seeds == 1 else 'seeds'} for each fold")
    aim = "above 0" if needed.target == "zero" else "below the margin"
    against = "" if arm == UNCONDITIONED else f" against {arm} metadata"
    if more:
        return (
            f"{' or '.join(more)} would probably bring the interval{against} {aim} (80 % power, if the true"
            " difference is the one that was found)"
        )
    if needed.subjects is None and needed.seeds is None:
        return (
            "neither more subjects nor more seeds alone would bring the interval"
            f"{against} {aim}, if the true difference is the one that was found: more of both, or another margin"
        )
    return f"a few more seeds: the interval{against} is nearly {aim}"


def signed(value: float | None, digits: int = 3) -> str:
    """With the sign, which zero has not; – for None."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return text if text.strip("+-0.") else text[1:]


def ends(row: Mapping[str, Any], digits: int = 3) -> str:
    """``low to high`` of a difference; – where it has no interval."""
    if row["low"] is None:
        return NONE
    return f"{signed(row['low'], digits)} to {signed(row['high'], digits)}"


def p_text(p: float | None) -> str:
    """``= 0.013``, ``< 0.001``."""
    if p is None:
        return "not defined"
    return "< 0.001" if p < 0.001 else f"= {p:.2g}" if p < 0.1 else f"= {p:.2f}"


def p_words(p: float | None) -> str:
    """How often chance alone would do as much."""
    if p is None:
        return "how likely chance would do as much is not defined"
    if p < 0.001:
        often = "fewer than 1 of 1000"
    elif p < 0.01:
        often = f"about {max(round(1000 * p), 1)} of 1000"
    else:
        often = f"about {round(100 * p)} of 100"
    return (
        f"if metadata changed nothing, chance would bring a difference as large in {often} trials"
    )
