"""What is trained and tested in each experiment: units, and the items (case, metadata, labels) of each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Case, DataSet

BACKGROUND = -1
"""A target that is empty and counts as known: a label that was not annotated, taken for background."""

EXPERIMENTS = ("1", "2", "3", "ablation")
FEW = (2, 4, 6, 8, 12)
"""Annotated cases of the rare structure in experiment 3, beside 12 of the other."""


@dataclass(frozen=True)
class Unit:
    """One network to train and test.

    Attributes:
        key: metadata key of experiment 1 ("contrast": which contrast is shown).
        target, few: structure and number of its cases in experiment 3; the structure of a single network.
    """

    experiment: str
    data: str
    condition: str
    split: int
    key: str = ""
    target: int = -1
    few: int = 0

    @property
    def name(self) -> str:
        """For a file."""
        parts = [f"e{self.experiment}", self.data, self.key, self.condition]
        parts += [f"t{self.target}"] if self.target >= 0 else []
        parts += [f"n{self.few}"] if self.few else []
        return "_".join([p.replace(" ", "-") for p in parts if p] + [f"s{self.split}"])


@dataclass(frozen=True, eq=False)
class Item:
    """A case as the network sees it.

    Attributes:
        row: metadata [M]; None without.
        targets: for each output channel the label it stands for, BACKGROUND, or None (not known: no loss).
        group: items of each group are drawn equally often.
        contrast: the only channel shown; None: all.
        fed: the metadata value that was fed, where a table of values is made.
    """

    case: Case
    row: NDArray[np.float32] | None
    targets: tuple[int | None, ...]
    group: int = 0
    contrast: int | None = None
    fed: str = ""


@dataclass
class Design:
    """A unit's network and items.

    Attributes:
        generator_decay: weight decay of the FiLM generator.
        hidden: share of the training samples whose metadata are withheld.
        eager: through plain PyTorch instead of the fused path.
        seed: added to the split's.
    """

    train: list[Item]
    validation: list[Item]
    test: list[Item]
    channels: int
    outputs: int
    metadata: int = 0
    concatenate: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    generator_decay: float = 0.0
    hidden: float = 0.0
    eager: bool = False
    seed: int = 0


SEEDS = {
    "fused": ("all layers (base)", "another seed", "a third seed"),
    "eager": ("eager", "eager, another seed", "eager, a third seed"),
}
"""Ablations of one and the same network through the fused path and through plain PyTorch, by seed."""

LONGER = ", equal steps a label"
"""Ending of a condition: its joint network gets as many steps as the single networks of its labels together."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "all layers (base)": {},
    "FiLM in the encoder": {"film": "encoder"},
    "FiLM in the decoder": {"film": "decoder"},
    "order conv-norm-film-act": {"order": "conv-norm-film-act"},
    "order conv-norm-act-film": {"order": "conv-norm-act-film"},
    "order conv-act-norm-film": {"order": "conv-act-norm-film"},
    "generator identity": {"generator": "identity"},
    "generator paper": {"generator": "paper"},
    "generator decay 0.1": {"decay": 0.1},
    "metadata dropout 0.3": {"hidden": 0.3},
    "eager": {"eager": True},
    "another seed": {"seed": 1000},
    "a third seed": {"seed": 2000},
    "eager, another seed": {"eager": True, "seed": 1000},
    "eager, a third seed": {"eager": True, "seed": 2000},
}
"""Variants of the conditioned network on the phantom: what differs from the base. The seeds show how far two
runs of the same network lie apart."""

CONDITIONS = {
    "1": ("plain", "constant", "true", "shuffled", "concatenated"),
    "2": (
        *("missing as background", "single", "FiLM", "mask", "mask + FiLM"),
        *(f"{c}{LONGER}" for c in ("FiLM", "mask", "mask + FiLM")),
    ),
    "3": ("single", "FiLM", f"FiLM{LONGER}"),
    "ablation": tuple(ABLATIONS),
}
FURTHER = (("lgg", "grade"), ("lgg", "contrast"), ("lgg", "site"))
"""Further metadata of experiment 1, conditions "constant" and "true"."""


def units(experiment: str, splits: int, labels: dict[str, int], base: dict[str, Any]) -> list[Unit]:
    """All units of an experiment.

    Args:
        labels: number of labels of each data set.
        base: order and generator of the size's network; an ablation that would change nothing is left out.
    """
    found = []
    for s in range(splits):
        if experiment == "1":
            for data in ("phantom", "lgg"):
                found += [Unit("1", data, c, s, "tumor_type") for c in CONDITIONS["1"]]
            found += [Unit("1", d, c, s, k) for d, k in FURTHER for c in ("constant", "true")]
        elif experiment == "2":
            for data in ("acdc", "hippocampus"):
                for c in CONDITIONS["2"]:
                    targets = range(labels[data]) if c == "single" else (-1,)
                    found += [Unit("2", data, c, s, target=t) for t in targets]
        elif experiment == "3":
            for data, target in (("acdc", 1), ("hippocampus", 1)):
                found += [
                    Unit("3", data, c, s, target=target, few=n)
                    for n in FEW
                    for c in CONDITIONS["3"]
                ]
        else:
            found += [
                Unit("ablation", "phantom", c, s, "tumor_type")
                for c, change in ABLATIONS.items()
                if not change or any(base.get(k) != v for k, v in change.items())
            ]
    return found


def split(subjects: Sequence[str], number: int) -> tuple[list[str], list[str], list[str]]:
    """60/20/20 of the subjects, shuffled by the split's number."""
    order = list(subjects)
    random.Random(1000 + number).shuffle(order)
    a, b = round(0.6 * len(order)), round(0.8 * len(order))
    return order[:a], order[a:b], order[b:]


def design(unit: Unit, data: DataSet) -> Design:
    """The network and the items of a unit; the same for every run."""
    make = {"1": _metadata, "2": _one_label, "3": _few_labels, "ablation": _ablation}
    parts = split(data.subjects, unit.split)
    cases = [[c for c in data.cases if c.subject in set(part)] for part in parts]
    return make[unit.experiment](unit, data, cases)


def _one_hot(index: int, size: int) -> NDArray[np.float32]:
    row = np.zeros(size, np.float32)
    row[index] = 1
    return row


def _metadata(unit: Unit, data: DataSet, cases: list[list[Case]]) -> Design:
    """Experiment 1: one label; what is fed differs."""
    if unit.key == "contrast":
        return _contrast(unit, cases)
    known = [[c for c in part if c.values.get(unit.key)] for part in cases]
    values = sorted({c.values[unit.key] for part in known for c in part})
    everyone = [c for part in known for c in part]
    fed = [c.values[unit.key] for c in everyone]
    if unit.condition == "shuffled":
        random.Random(unit.split).shuffle(fed)
    told = dict(zip([c.id for c in everyone], fed, strict=True))

    def row(value: str) -> NDArray[np.float32] | None:
        if unit.condition == "plain":
            return None
        if unit.condition == "constant":
            return np.ones(1, np.float32)
        return _one_hot(values.index(value), len(values))

    train, validation, test = (
        [Item(c, row(told[c.id]), (0,), fed=told[c.id]) for c in part] for part in known
    )
    if unit.condition == "true":
        test += [
            Item(c, row(v), (0,), fed=v)
            for c in known[2]
            for v in values
            if v != c.values[unit.key]
        ]
    size = {"plain": 0, "constant": 1}.get(unit.condition, len(values))
    return Design(
        train,
        validation,
        test,
        everyone[0].image.shape[1],
        1,
        metadata=size,
        concatenate=unit.condition == "concatenated",
    )


def _contrast(unit: Unit, cases: list[list[Case]]) -> Design:
    """One contrast a case is shown, and the network is told which, or not."""
    count = cases[0][0].image.shape[1]
    true = unit.condition == "true"

    def items(part: list[Case]) -> Iterator[Item]:
        for c in part:
            for k in (k for k in range(count) if c.present[k]):
                row = _one_hot(k, count) if true else np.ones(1, np.float32)
                yield Item(c, row, (0,), contrast=k, fed=str(k))

    train, validation, test = (list(items(part)) for part in cases)
    return Design(train, validation, test, 1, 1, metadata=count if true else 1)


def _annotated(cases: Sequence[Case], labels: int, seed: int) -> list[int]:
    """The one label of each case that counts as annotated, evenly drawn."""
    order = [i % labels for i in range(len(cases))]
    random.Random(seed).shuffle(order)
    return order


def _one_label(unit: Unit, data: DataSet, cases: list[list[Case]]) -> Design:
    """Experiment 2: every training case has one annotated label; the test cases have all."""
    k = len(data.labels)
    alone = unit.condition.removesuffix(LONGER) in ("single", "FiLM")

    def item(c: Case, label: int) -> Item:
        """The case with one label known."""
        row = _one_hot(label, k) if "FiLM" in unit.condition else None
        if alone:
            return Item(c, row, (label,), label)
        if unit.condition == "missing as background":
            targets: list[int | None] = [label if j == label else BACKGROUND for j in range(k)]
        else:
            targets = [label if j == label else None for j in range(k)]
        return Item(c, row, tuple(targets), label)

    def annotated(part: list[Case], seed: int) -> list[Item]:
        found = [item(c, label) for c, label in zip(part, _annotated(part, k, seed), strict=True)]
        return [i for i in found if unit.target in (-1, i.group)]

    train, validation = annotated(cases[0], unit.split), annotated(cases[1], unit.split + 100)
    if unit.condition == "single":
        test = [item(c, unit.target) for c in cases[2]]
    elif "FiLM" in unit.condition:
        test = [item(c, label) for c in cases[2] for label in range(k)]
    else:
        test = [Item(c, None, tuple(range(k))) for c in cases[2]]
    outputs = 1 if alone else k
    return Design(
        train,
        validation,
        test,
        cases[0][0].image.shape[1],
        outputs,
        metadata=k if "FiLM" in unit.condition else 0,
    )


def _few_labels(unit: Unit, data: DataSet, cases: list[list[Case]]) -> Design:
    """Experiment 3: ``few`` subjects with the rare structure beside 12 with the other, drawn in turn."""
    other = len(data.labels) - 1 if unit.target != len(data.labels) - 1 else 0
    film = "FiLM" in unit.condition
    subjects = sorted({c.subject for c in cases[0]})
    random.Random(unit.split).shuffle(subjects)
    rare, common = subjects[: unit.few], subjects[12:24]

    def item(c: Case, label: int) -> Item:
        row = _one_hot(0 if label == unit.target else 1, 2) if film else None
        return Item(c, row, (label,), label)

    first = {c.subject: c for c in reversed(cases[0])}  # one volume a subject
    train = [item(first[s], unit.target) for s in rare]
    if film:
        train += [item(first[s], other) for s in common]
    validation, test = ([item(c, unit.target) for c in part] for part in cases[1:])
    return Design(train, validation, test, cases[0][0].image.shape[1], 1, metadata=2 if film else 0)


def _ablation(unit: Unit, data: DataSet, cases: list[list[Case]]) -> Design:
    """The conditioned network of experiment 1 on the phantom, with one thing changed."""
    change = ABLATIONS[unit.condition]
    base = Unit("1", unit.data, "true", unit.split, unit.key)
    found = _metadata(base, data, cases)
    found.test = [i for i in found.test if i.fed == i.case.values[unit.key]]
    found.network = {k: v for k, v in change.items() if k in ("order", "generator", "film")}
    found.generator_decay = change.get("decay", 0.0)
    found.hidden = change.get("hidden", 0.0)
    found.eager = change.get("eager", False)
    found.seed = change.get("seed", 0)
    return found
