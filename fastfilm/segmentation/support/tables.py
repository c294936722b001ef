"""Tables and JSON objects of users, checked while they are read."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encoding import read_text
from .errors import UserError

SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}


@dataclass(frozen=True)
class Table:
    """A table with a header.

    Attributes:
        path: its file.
        columns: names, in the order of the file.
        rows: column -> text without blanks around it, one dictionary a row.
        lines: the line in the file of each row.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]


def read_table(path: Path) -> Table:
    """A .tsv (tabs) or .csv (commas) table.

    Raises:
        UserError: no such file, empty, another separator, a column that is there twice, a row with more or fewer
            cells than the header, a quotation mark that is not closed; file and line are named.
    """
    text = read_text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    columns: list[str] = []
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    try:
        for cells in reader:
            cells = [c.strip() for c in cells]
            if not any(cells):
                continue
            if not columns:
                columns = _header(path, cells, delimiter)
                continue
            if len(cells) != len(columns):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells, the header has {len(columns)} columns"
                )
            if any("\n" in c or "\r" in c for c in cells):
                raise UserError(
                    f"{path}: line {reader.line_num}: a cell goes over several lines: a quotation mark that is not"
                    " closed?"
                )
            rows.append({k: v for k, v in zip(columns, cells, strict=True) if k})
            lines.append(reader.line_num)
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: not a table: {error}") from error
    if not columns:
        raise UserError(f"{path}: the table is empty")
    return Table(path, [c for c in columns if c], rows, lines)


def _header(path: Path, cells: list[str], delimiter: str) -> list[str]:
    twice = sorted({c for c in cells if c and cells.count(c) > 1})
    if twice:
        raise UserError(f"{path}: column {twice[0]!r} is there {cells.count(twice[0])} times")
    if len(cells) == 1:
        for other, name in SEPARATORS.items():
            if other != delimiter and other in cells[0]:
                raise UserError(
                    f"{path}: one column, {cells[0]!r}: its cells are separated by {name}; a {path.suffix} table"
                    f" is separated by {SEPARATORS[delimiter]}"
                )
    return cells


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: cannot be read, not JSON, not an object, or a key that is there twice.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [k for k, _ in found]
        twice = [k for k in names if names.count(k) > 1]
        if twice:
            raise UserError(f"{path}: the key {twice[0]!r} is there twice")
        return dict(found)

    text = read_text(path)
    try:
        # NaN, which some programs write, is a missing value
        value = json.loads(
            text, object_pairs_hook=pairs, parse_constant=lambda c: None if c == "NaN" else c
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object of keys and values, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), f"{value!r}")
