"""Counterfactuals: every case predicted under every value of one metadata key, and what that changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..models.folder import LoadedModel
from ..support.errors import UserError
from ..support.files import write_json
from .inputs import InputCase

SWAP = "swap.json"

UNKNOWN = "unknown"
"""What a missing value is called, unless the model knows a value of that name."""


def swap_values(text: str, model: LoadedModel) -> tuple[str, list[str | None]]:
    """``KEY`` or ``KEY=VALUE,VALUE`` -> the key and its values; None stands for "unknown", if the model knows it.

    Raises:
        UserError: a key the model does not have, a continuous one without values, a value it cannot take.
    """
    key, sign, given = text.partition("=")
    if key == model.info.task_key:
        raise UserError(f"--swap {key}: every {key} is predicted anyway")
    encoder = model.encoder[key]
    if encoder.kind == "vector":
        raise UserError(
            f"--swap {key}: is a vector of {encoder.fitted_vector.length} numbers and has no list of values; to"
            f" compare vectors, predict with each of them (--meta {key}=FILE.npy) into a folder of its own"
        )
    if not sign:
        if encoder.kind == "continuous":
            raise UserError(f"--swap {key} is continuous: give values, as in {key}=20,40,60")
        return key, [*encoder.values, *([None] if encoder.unknown else [])]
    values: list[str | None] = [v.strip() or None for v in given.split(",")]
    values = [None if v == UNKNOWN and v not in encoder.values else v for v in values]
    rows: dict[bytes, str] = {}
    for v in values:
        row, name = encoder.encode(v).tobytes(), v or UNKNOWN
        if v is not None and encoder.unseen_value(v):
            raise UserError(
                f"--swap {text}: {v!r} was not in training; expected {', '.join(encoder.values)}"
            )
        if row in rows:
            raise UserError(f"--swap {text}: {name!r} is there twice (as {rows[row]!r})")
        rows[row] = name
    return key, values


def shown(value: str | None, known: Sequence[str]) -> str:
    """A fed value as text; a missing one is ``unknown``, or ``(missing)`` beside a value of that name."""
    if value is not None:
        return value
    return "(missing)" if UNKNOWN in known else UNKNOWN


def case_under(case: InputCase, key: str, value: str | None) -> InputCase:
    """The case with another value of ``key``."""
    return replace(case, metadata={**case.metadata, key: value})


def write_swap(out: Path, swap: Mapping[str, Any], folders: Sequence[Mapping[str, str]]) -> None:
    """OUT/swap.json: the key, the true value of each case, and the folder of each value that was fed."""
    write_json(out / SWAP, {**swap, "fed": list(folders)})
