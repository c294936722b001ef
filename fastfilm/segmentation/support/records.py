"""JSON files of earlier commands, checked as they are read: they may be damaged, edited, or of another program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .errors import UserError
from .files import read_json


class Record(BaseModel):
    """The entries of a JSON file that are read; others may be there."""

    model_config = ConfigDict(strict=True, extra="allow")


def _plain(value: Any) -> Any:
    for v in value if isinstance(value, list) else [value]:
        if isinstance(v, dict | list):
            raise ValueError(f"must be text, a number or a list of them, got {v!r:.80}")
    return value


Plain = Annotated[Any, AfterValidator(_plain)]
"""A metadata value: text, a number, or a list of them (several names at once)."""

Measured = Annotated[float, Field(ge=-1e15, le=1e15, allow_inf_nan=False)]
"""A metric, or what is computed from metrics."""

R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R], title: str) -> R:
    """A JSON file with the entries of ``kind``.

    Args:
        title: of such a file, with its article, for the message.

    Raises:
        UserError: no such file, not JSON, entries that are missing or of another type (the first few are named).
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
    """``folder / name``, for a name that stands in a file.

    Args:
        origin: file and entry in which the name stands, for the message.

    Raises:
        UserError: the name is not that of something in the folder: empty, absolute, or with ``..``.
    """
    path = Path(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or "\0" in name:
        raise UserError(f"{origin}: {name!r} is not a path in {folder}")
    return folder / path


def check_writable(folder: Path) -> None:
    """Leaves nothing behind; the folder need not be there yet.

    Raises:
        UserError: nothing can be written there.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise UserError(f"{folder}: cannot be written: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: no permission in {there}")
