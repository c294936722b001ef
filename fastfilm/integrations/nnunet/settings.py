"""The environment variables that the nnU-Net trainer reads, checked."""

from __future__ import annotations

from dataclasses import dataclass

from fastfilm.ops.settings import environment


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
    table = environment.read("FASTFILM_NNUNET_TABLE") or ""
    names = environment.read("FASTFILM_NNUNET_COLUMNS") or ""
    columns = [c.strip() for c in names.split(",") if c.strip()]
    if bool(table) != bool(columns):
        raise ValueError(
            "FASTFILM_NNUNET_TABLE and FASTFILM_NNUNET_COLUMNS must be set together,"
            f" got {table!r} and {','.join(columns)!r}"
        )
    meta = {}
    for part in filter(None, (environment.read("FASTFILM_NNUNET_META") or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"FASTFILM_NNUNET_META must be like column=value, got {part!r}")
        meta[name.strip()] = value.strip()
    where = environment.read("FASTFILM_NNUNET_WHERE") or "decoder"
    return Settings(table, columns, where, meta, _count("EPOCHS"), _count("ITERATIONS"))


def _count(name: str) -> int | None:
    text = environment.read(f"FASTFILM_NNUNET_{name}")
    return None if text is None else int(text)
