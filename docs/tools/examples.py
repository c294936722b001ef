"""The API reference shows an ``Example:`` of a docstring as code, and each error of ``Raises:`` in its own row."""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEAD = re.compile(r"^Example:$", re.MULTILINE)
_ERRORS = re.compile(r"^( +)(\w+Error(?:, \w+Error)*: .*?)\. (?=\w+Error: )", re.MULTILINE)


class Examples(griffe.Extension):
    """Writes both sections as the Google style of docstrings has them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object with a docstring."""
        if obj.docstring:
            text = _HEAD.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _ERRORS.sub(r"\1\2.\n\1", text)
