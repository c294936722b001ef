"""The true × fed table: how well each group is segmented under every value of a metadata key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, model_validator

from ..metadata.groups import (
    MISSING,
    UNKNOWN,
    grouping,
)
from ..prediction.swap import SWAP
from ..support.errors import UserError
from ..support.records import (
    Measured,
    Plain,
    Record,
    inside,
    read_record,
)
from .folder import Evaluated, load_mask
from .statistics import compare, mean_of

TABLE = "swap_table.json"


class _Fed(Record):
    value: str
    folder: str


class Swap(Record):
    """What swap.json holds: the key, each case's own value of it, and the folder of each value that was fed."""

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
    """What swap_table.json holds."""

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
    """swap.json of a folder of fastfilm predict --swap.

    Raises:
        UserError: it is damaged, or names folders that are not directly in ``folder``.
    """
    path = folder / SWAP
    swap = read_record(path, Swap, "made by fastfilm predict --swap")
    for fed in swap.fed:
        if (
            len(inside(folder, fed.folder, f"{path}: fed {fed.value!r}").relative_to(folder).parts)
            != 1
        ):
            raise UserError(
                f"{path}: fed {fed.value!r}: {fed.folder!r} is not a folder in {folder}"
            )
    return swap


def own_folder(to: Path, name: str) -> Path:
    """The folder that results of one fed value are written to.

    Raises:
        UserError: there is a link of that name that leads out of ``to``.
    """
    folder = to / name
    if not folder.resolve().is_relative_to(to.resolve()):
        raise UserError(
            f"{folder}: is a link that leads out of {to}; give another folder with --out"
        )
    return folder


def read_table(folder: Path) -> dict[str, Any]:
    """swap_table.json of an evaluated folder of predict --swap.

    Raises:
        UserError: it is not there, or damaged.
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
        runs: fed value -> the metrics of its predictions, on the same cases.
        true: case -> its own value; a continuous one is put into a range (``groups.grouping``).
        seed: of the bootstrap.
        kind: of the key.

    Returns:
        ``rows``: true value -> fed value -> mean with interval (over cases and labels); ``differences``: true
        value -> fed value -> paired comparison of the run fed the true value with it (positive: the truth is
        better).
    """
    cases = dict.fromkeys(e.pair.case for run in runs.values() for e in run)
    values = {c: true.get(c) for c in cases}
    # predict calls a missing value so where there is one named "unknown"
    taken = [UNKNOWN] if MISSING in runs else []
    groups = grouping(values, kind, most=math.inf, taken=taken)
    # too few numbers for ranges
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
        rows[group] = {
            fed: mean_of(*_columns(d.values()), seed).to_json() for fed, d in dice.items()
        }
        differences[group] = {}
        for fed, d in dice.items():
            both = [k for k in d if group in dice and k in dice[group]]
            if fed == group or not both:
                continue
            subjects = [d[k][1] for k in both]
            found = compare(
                [dice[group][k][0] for k in both], [d[k][0] for k in both], subjects, seed
            )
            differences[group][fed] = None if found is None else found.to_json()
    return {"rows": rows, "differences": differences}


def _columns(pairs: Any) -> tuple[list[float | None], list[str]]:
    listed = list(pairs)
    return [v for v, _ in listed], [s for _, s in listed]


def sensitivity(runs: Mapping[str, Sequence[Evaluated]]) -> dict[str, float]:
    """Case/label -> 1 - mean Dice between its predictions under two different values.

    0: the metadata change nothing; 1: predictions under different values do not overlap. Two empty masks agree.

    Args:
        runs: fed value -> its predictions; only what is in all of them counts.
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
