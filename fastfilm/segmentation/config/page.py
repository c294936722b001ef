"""The configuration as a table: ``python -m fastfilm.segmentation.config.page docs/segmentation.md``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .schema import Config
from .sections import Label, MetadataKey

BEGIN, END = "<!-- configuration: begin -->\n", "<!-- configuration: end -->\n"


def markdown() -> str:
    """A table for each section: key, what it takes, default, meaning."""
    text = []
    for name, field in Config.model_fields.items():
        section, prefix = field.annotation, name
        if name == "metadata":
            section, prefix = MetadataKey, "metadata.KEY"
        assert isinstance(section, type) and issubclass(section, BaseModel)
        text.append(f"### `{name}`\n\n{_first_paragraph(section)}\n\n{_table(section, prefix)}")
        if name == "data":
            text.append(f"{_first_paragraph(Label)}\n\n{_table(Label, 'data.labels.NAME')}")
    return "\n".join(text)


def rewritten(page: str) -> str:
    """``page`` with the reference between the two marks made anew."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


def _first_paragraph(section: type[BaseModel]) -> str:
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def _table(section: type[BaseModel], prefix: str) -> str:
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        meaning = (field.description or "").replace("|", "\\|")
        rows.append(
            f"| `{prefix}.{key}` | {_kind(field.annotation)} | {_default(field)} | {meaning} |"
        )
    return "\n".join(rows) + "\n"


def _kind(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is Literal:
        return ", ".join(f"`{v}`" for v in inner)
    if origin in (Union, UnionType):
        return " or ".join(_kind(a) for a in inner if a is not NoneType)
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if origin is dict:
        return "names and values"
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path"}
    return names.get(kind, "settings")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    value = field.default
    if value is PydanticUndefined:
        value = field.default_factory() if field.default_factory is not None else None  # type: ignore[call-arg]
    if value is None or value == [] or value == {}:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")
