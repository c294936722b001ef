"""``--set KEY=VALUE`` of the commands that read a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ..support.errors import UserError
from ..support.yaml_files import load_yaml


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Dotted keys -> values, as ``read_config`` takes them.

    Raises:
        UserError: no KEY=VALUE, a value that is no YAML, a key that is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, value = setting(text, "--set")
        if key in found:
            raise UserError(f"--set: {key} is given twice")
        found[key] = value
    return found


def setting(text: str, option: str) -> tuple[str, Any]:
    """``KEY=VALUE`` -> the key and the value that the YAML stands for."""
    key, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"{option} takes KEY=VALUE, got {text!r}")
    try:
        return key, load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"{option} {text!r}: the value is not YAML") from error
