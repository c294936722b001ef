"""JSON files of earlier commands, checked while they are read: they may be damaged, edited or foreign."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError
from .files import read_json

LONGEST_SHOWN = 60
"""Characters up to which a value is shown in a list of differences."""


class Record(BaseModel):
    """Entries of a JSON file; further entries are allowed and kept."""

    model_config = ConfigDict(strict=True, extra="allow")


def _plain(value: Any) -> Any:
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, dict | list):
            raise ValueError(f"must be text, a number or a list of them, got {v!r:.80}")
    return value


Plain = Annotated[Any, AfterValidator(_plain)]
"""A metadata value: text, a number, or a list of these."""

Measured = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""A metric, or a number computed from metrics."""

R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R], title: str) -> R:
    """A JSON file with the entries of ``kind``.

    Args:
        title: name of such files with an article, such as "a plan", for the message.

    Raises:
        UserError: the file is missing or not JSON, or entries are missing or of another type (the first three are
            named).
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not {title}: no entries")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        lines = []
        for e in error.errors(include_url=False, include_input=False):
            where = ".".join(str(part) for part in e["loc"])
            lines.append((f"{where}: " if where else "") + e["msg"].removeprefix("Value error, "))
        more = f"; {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"{path}: not {title}: {'; '.join(lines[:3])}{more}") from error


def inside(folder: Path, name: str, origin: str) -> Path:
    """``folder / name`` for a name that was read from a file.

    Args:
        origin: the file and entry with the name, for the message.

    Raises:
        UserError: the name does not lead into the folder: it is empty, absolute, or has ``..`` or a null byte.
    """
    path = Path(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise UserError(f"{origin}: {name!r} is not a path in {folder}")
    return folder / path


def check_writable(folder: Path) -> None:
    """Checks that a folder, which need not exist yet, can be written; writes nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder}: cannot be written: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: no permission in {there}")


def flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested entries as one level of dotted names, as in ``training.epochs``."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= flat(inner, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = inner
    return found


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], without: Collection[str] = ()
) -> list[str]:
    """The differences between two records, a sentence each, without values of over ``LONGEST_SHOWN`` characters.

    Args:
        without: dotted names of entries that may differ.
    """
    old, new = flat(before), flat(now)
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = (x.get(key, "not there") for x in (old, new))
        if a != b and key not in without:
            long = max(len(str(a)), len(str(b))) > LONGEST_SHOWN
            found.append(f"{key}: not the same" if long else f"{key} was {a}, is {b}")
    return found
