"""The true × fed table: the Dice of each group of cases with every value of a metadata key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from ..metadata.groups import MISSING, UNKNOWN, grouping
from ..prediction.swap import SWAP
from ..support.errors import UserError
from ..support.records import Measured, Plain, Record, inside, read_record
from .folder import Evaluated, load_mask
from .statistics import compare, mean_of

TABLE = "swap_table.json"


class _Fed(Record):
    value: str
    folder: str


class Swap(Record):
    """The entries of swap.json: the key, each case's own value of it, and the folder of each fed value."""

    key: str
    true: dict[str, Plain]
    fed: list[_Fed] = Field(min_length=1)

    @model_validator(mode="after")
    def _differ(self) -> Swap:
        for what in ("value", "folder"):
            every = [getattr(f, what) for f in self.fed]
            if len(set(every)) < len(every):
                raise ValueError(f"fed: two have the same {what}")
        return self


class _Cell(Record):
    mean: Measured | None
    low: Measured | None
    high: Measured | None
    n: int


class Table(Record):
    """The entries of swap_table.json that are read."""

    key: str
    rows: dict[str, dict[str, _Cell]] = Field(min_length=1)
    differences: dict[str, dict[str, Any]]
    sensitivity: dict[str, Measured]

    @model_validator(mode="after")
    def _full(self) -> Table:
        if len({tuple(row) for row in self.rows.values()}) > 1 or not all(self.rows.values()):
            raise ValueError("rows: each must have the same fed values")
        return self


def read_swap(folder: Path) -> Swap:
    """The swap.json of a folder of ``fastfilm predict --swap``.

    Raises:
        UserError: the file is damaged, or names folders that are not directly in ``folder``.
    """
    path = folder / SWAP
    swap = read_record(path, Swap, "made by fastfilm predict --swap")
    for fed in swap.fed:
        if inside(folder, fed.folder, f"{path}: fed {fed.value!r}").parent != folder:
            raise UserError(
                f"{path}: fed {fed.value!r}: {fed.folder!r} is not a folder in {folder}"
            )
    return swap


def own_folder(to: Path, name: str) -> Path:
    """The folder for the results of one fed value.

    Raises:
        UserError: a link of that name leads out of ``to``.
    """
    folder = to / name
    if not folder.resolve().is_relative_to(to.resolve()):
        raise UserError(
            f"{folder}: is a link that leads out of {to}; give another folder with --out"
        )
    return folder


def read_table(folder: Path) -> dict[str, Any]:
    """The swap_table.json of an evaluated folder of ``fastfilm predict --swap``.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = folder / TABLE
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; fastfilm evaluate makes it of a folder of fastfilm predict --swap"
        )
    return read_record(path, Table, "a table of swapped metadata of fastfilm evaluate").model_dump()


def swap_table(
    runs: Mapping[str, Sequence[Evaluated]],
    true: Mapping[str, Any],
    seed: int = 0,
    kind: str | None = None,
) -> dict[str, Any]:
    """Dice by true and by fed value.

    Args:
        runs: fed value -> metrics of its predictions, on the same cases.
        true: case -> its own value; continuous values are grouped into ranges (``groups.grouping``).
        seed: seed of the bootstrap.
        kind: kind of the key, if known.

    Returns:
        ``rows``: true value -> fed value -> mean with interval (over cases and labels); ``differences``: true
        value -> fed value -> paired comparison of the run fed the true value with this run (positive: the true
        value is better).
    """
    cases = dict.fromkeys(e.pair.case for run in runs.values() for e in run)
    values = {c: true.get(c) for c in cases}
    # the name of a missing value for fastfilm predict, if the key has a value "unknown"
    taken = [UNKNOWN] if MISSING in runs else []
    groups = grouping(values, kind, most=math.inf, taken=taken)
    # one group of all cases if there are too few numbers for ranges
    members = {"all": list(cases)} if groups is None else groups.members
    rows: dict[str, dict[str, Any]] = {}
    differences: dict[str, dict[str, Any]] = {}
    for group, names in members.items():
        dice = {}
        for fed, run in runs.items():
            dice[fed] = {
                (e.pair.case, e.pair.label.name): (e.values["Dice"], e.pair.subject)
                for e in run
                if e.pair.case in names
            }
        rows[group] = {fed: asdict(mean_of(*_columns(d.values()), seed)) for fed, d in dice.items()}
        differences[group] = {}
        for fed, d in dice.items():
            both = [k for k in d if group in dice and k in dice[group]]
            if fed == group or not both:
                continue
            subjects = [d[k][1] for k in both]
            found = compare(
                [dice[group][k][0] for k in both], [d[k][0] for k in both], subjects, seed
            )
            differences[group][fed] = None if found is None else asdict(found)
    return {"rows": rows, "differences": differences}


def _columns(pairs: Any) -> tuple[list[float | None], list[str]]:
    listed = list(pairs)
    return [v for v, _ in listed], [s for _, s in listed]


def sensitivity(runs: Mapping[str, Sequence[Evaluated]]) -> dict[str, float]:
    """Case/label -> 1 minus the mean Dice between its predictions with two different values.

    0: the metadata change nothing; 1: predictions with different values do not overlap. Two empty masks agree.

    Args:
        runs: fed value -> its predictions; only cases and labels in all runs are used.
    """
    files = [
        {(e.pair.case, e.pair.label.name): (e.pair.prediction, e.pair.written) for e in run}
        for run in runs.values()
    ]
    result = {}
    for key in sorted(set.intersection(*(set(f) for f in files))):
        masks = [load_mask(*by_key[key])[1] for by_key in files]
        changes = []
        for a, b in itertools.combinations(masks, 2):
            total = int(a.sum()) + int(b.sum())
            changes.append(1 - (2 * int((a & b).sum()) / total if total else 1.0))
        if changes:
            result["/".join(key)] = float(np.mean(changes))
    return result
