"""File names from text that a user gave: case ids, label names, metadata keys and values."""

from __future__ import annotations

import hashlib
import re

LONGEST = 120
"""Bytes of a file name at most (file systems take 255; endings and folders' prefixes come on top)."""


def file_name(text: str) -> str:
    """``text`` as one plain name in a folder; two texts never get the same name.

    Letters, digits and ``_ . = + - ( )`` stay; every other character (a slash, a space, a control character) and a
    dot at the start or the end become ``%XX``, its UTF-8 bytes, so that the name leads into no other folder and is
    not hidden. A name that would be too long ends in a digest of the whole text.
    """
    name = re.sub(r"[^\w.=+()-]", _escaped, text)
    name = re.sub(r"^\.|\.$", _escaped, name) or "%"
    encoded = name.encode("utf-8", "backslashreplace")
    if len(encoded) <= LONGEST:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    kept = encoded[: LONGEST - len(digest) - 1].decode("utf-8", "ignore")
    return f"{kept}%{digest}"


def _escaped(match: re.Match[str]) -> str:
    return "".join(f"%{b:02X}" for b in match[0].encode("utf-8", "surrogatepass"))
