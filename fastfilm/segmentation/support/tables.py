"""CSV and TSV tables and JSON objects of users, checked while they are read."""

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
        path: file of the table.
        columns: names, in the order of the file.
        rows: a dictionary for each row: column -> text without surrounding blanks.
        lines: line number of each row in the file.
    """

    path: Path
    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]


def read_table(path: Path) -> Table:
    """The table in a .tsv (tabs) or .csv (commas) file; empty lines are skipped.

    Raises:
        UserError: the file is missing or empty, has another separator, the same column twice, a row with more or
            fewer cells than the header, or a quotation mark that is not closed; the message names file and line.
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
        raise UserError(f"{path}: column {twice[0]!r} occurs {cells.count(twice[0])} times")
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
        UserError: the file cannot be read, is not a JSON object, or has the same key twice.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [k for k, _ in found]
        twice = [k for k in names if names.count(k) > 1]
        if twice:
            raise UserError(f"{path}: the key {twice[0]!r} occurs twice")
        return dict(found)

    text = read_text(path)
    try:
        # some programs write NaN for a missing value
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
