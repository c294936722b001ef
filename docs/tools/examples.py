"""The API reference shows an ``Example:`` of a docstring as code, not as quoted text."""

from __future__ import annotations

import re
from typing import Any

import griffe

_HEAD = re.compile(r"^Example:$", re.MULTILINE)


class Examples(griffe.Extension):
    """Names the section as the Google style of docstrings does, in the plural."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _HEAD.sub("Examples:", obj.docstring.value)
