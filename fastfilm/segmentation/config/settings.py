"""The option ``--set KEY=VALUE`` of the commands that read a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from ..support.errors import UserError
from ..support.yaml_files import load_yaml


def settings(texts: Sequence[str]) -> dict[str, Any]:
    """Dotted keys -> values, as ``read_config`` takes them.

    Raises:
        UserError: a text is not KEY=VALUE, its value is not YAML, or a key is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        key, value = setting(text, "--set")
        if key in found:
            raise UserError(f"--set: {key} is given twice")
        found[key] = value
    return found


def setting(text: str, option: str) -> tuple[str, Any]:
    """Key and value of ``KEY=VALUE``; the value is parsed as YAML.

    Raises:
        UserError: the text has no ``=``, or its value is not YAML; the message names ``option``.
    """
    key, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"{option} takes KEY=VALUE, got {text!r}")
    try:
        return key, load_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"{option} {text!r}: the value is not YAML") from error
