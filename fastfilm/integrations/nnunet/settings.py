"""The environment variables that the nnU-Net trainer reads, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Values of the ``FASTFILM_NNUNET_*`` variables; see ``docs/environment.md``."""

    table: str
    columns: list[str]
    where: str
    meta: dict[str, str]
    epochs: int | None
    iterations: int | None


def settings() -> Settings:
    """Reads them.

    Raises:
        ValueError: a value that makes no sense, naming the variable.
    """
    table = os.environ.get("FASTFILM_NNUNET_TABLE", "")
    columns = [
        c.strip() for c in os.environ.get("FASTFILM_NNUNET_COLUMNS", "").split(",") if c.strip()
    ]
    if bool(table) != bool(columns):
        raise ValueError(
            "FASTFILM_NNUNET_TABLE and FASTFILM_NNUNET_COLUMNS must be set together,"
            f" got {table!r} and {','.join(columns)!r}"
        )
    where = os.environ.get("FASTFILM_NNUNET_WHERE") or "decoder"
    if where not in ("decoder", "encoder", "all"):
        raise ValueError(
            f"FASTFILM_NNUNET_WHERE must be one of decoder, encoder, all, got {where!r}"
        )
    meta = {}
    for part in filter(None, os.environ.get("FASTFILM_NNUNET_META", "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"FASTFILM_NNUNET_META must be like column=value, got {part!r}")
        meta[name.strip()] = value.strip()
    return Settings(table, columns, where, meta, _count("EPOCHS"), _count("ITERATIONS"))


def _count(name: str) -> int | None:
    text = os.environ.get(f"FASTFILM_NNUNET_{name}", "")
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"FASTFILM_NNUNET_{name} must be a positive integer, got {text!r}")
    return int(text)
