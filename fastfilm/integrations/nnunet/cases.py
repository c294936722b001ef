"""Metadata of nnU-Net's cases: from a table or JSON files to one row of numbers a case."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MISSING = ("", "n/a", "na", "nan", "none", "null")
CASE_COLUMNS = ("case", "case_identifier", "identifier", "id", "participant_id", "name")


def read(source: str, columns: list[str], cases: Iterable[str]) -> dict[str, dict[str, str]]:
    """Values of ``columns`` as text, by case.

    Args:
        source: a CSV or TSV table whose column "case" (or first column) names the cases, or a folder with
            one ``CASE.json`` each.

    Raises:
        FileNotFoundError: no such table, folder or file.
        ValueError: a column or a case that is not there, naming it.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"FASTFILM_NNUNET_TABLE={source}: no such file or folder")
    found = _folder(path, list(cases)) if path.is_dir() else _table(path)
    rows = {}
    for case in cases:
        if case not in found:
            raise ValueError(f"{source} has no row for case {case!r}")
        for column in columns:
            if column not in found[case]:
                raise ValueError(
                    f"{source} has no column {column!r} for case {case!r}, only {sorted(found[case])}"
                )
        rows[case] = {c: str(found[case][c]).strip() for c in columns}
    return rows


def _table(path: Path) -> dict[str, dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    tab = path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter="\t" if tab else ",")
    names = list(reader.fieldnames or [])
    if not names:
        raise ValueError(f"{path} is empty")
    key = next((n for n in CASE_COLUMNS if n in names), names[0])
    return {row[key]: row for row in reader}


def _folder(path: Path, cases: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for case in cases:
        file = path / f"{case}.json"
        if not file.exists():
            raise FileNotFoundError(f"{file}: case {case!r} has no JSON file")
        found[case] = json.loads(file.read_text(encoding="utf-8"))
    return found


def describe(rows: Mapping[str, Mapping[str, str]], columns: list[str]) -> list[dict[str, Any]]:
    """What each column holds: numbers, or categories with their values. Plain data, for ``plans.json``."""
    made = []
    for column in columns:
        values = sorted({r[column] for r in rows.values() if r[column].lower() not in MISSING})
        if not values:
            raise ValueError(f"column {column!r} has no values")
        numbers = all(_is_number(v) for v in values)
        kind: dict[str, Any] = {"column": column, "numbers": numbers}
        made.append(kind if numbers else kind | {"values": values})
    return made


def row(values: Mapping[str, str], description: list[dict[str, Any]], case: str) -> list[float]:
    """One number a column: the number itself or the category's index; NaN where it is missing.

    Raises:
        ValueError: a category that training did not know, or text in a column of numbers.
    """
    found = []
    for column in description:
        name = column["column"]
        if name not in values:
            raise ValueError(f"case {case!r} has no value for {name!r}")
        value = str(values[name]).strip()
        if value.lower() in MISSING:
            found.append(math.nan)
        elif column["numbers"]:
            if not _is_number(value):
                raise ValueError(f"case {case!r}: {name} must be a number, got {value!r}")
            found.append(float(value))
        elif value in column["values"]:
            found.append(float(column["values"].index(value)))
        else:
            raise ValueError(
                f"case {case!r}: {name} must be one of {column['values']}, got {value!r}"
            )
    return found


class Columns(nn.Module):
    """Rows of numbers [N, K], one a column -> features [N, M]: one-hot categories, standardised numbers.

    A missing value (NaN) is a category of its own, and for numbers the mean with a mark beside it. Mean and
    standard deviation are buffers, so that every fold keeps those of its own training cases.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, description: list[dict[str, Any]]) -> None:
        super().__init__()
        self.sizes = [2 if c["numbers"] else len(c["values"]) + 1 for c in description]
        self.numbers = [bool(c["numbers"]) for c in description]
        self.register_buffer("mean", torch.zeros(len(description)))
        self.register_buffer("std", torch.ones(len(description)))

    @property
    def size(self) -> int:
        """M."""
        return sum(self.sizes)

    def fit(self, rows: Tensor) -> None:
        """Takes mean and standard deviation of the columns of numbers from training rows [N, K]."""
        for k, numbers in enumerate(self.numbers):
            known = rows[:, k][rows[:, k].isfinite()].double()
            if numbers and len(known):
                self.mean[k] = known.mean()
                std = known.std(correction=0)
                self.std[k] = std if std > 0 else 1.0

    def forward(self, rows: Tensor) -> Tensor:
        """[N, K] -> [N, M]."""
        rows = torch.atleast_2d(rows).to(self.mean)
        parts = []
        for k, (size, numbers) in enumerate(zip(self.sizes, self.numbers, strict=True)):
            value, missing = rows[:, k], rows[:, k].isnan()
            if numbers:
                known = torch.where(missing, self.mean[k], value)
                parts.append(
                    torch.stack([(known - self.mean[k]) / self.std[k], missing.to(known)], 1)
                )
            else:
                index = torch.where(missing, size - 1, value).long()
                parts.append(torch.nn.functional.one_hot(index, size).to(self.mean))
        return torch.cat(parts, 1)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
