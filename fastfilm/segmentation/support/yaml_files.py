"""YAML text as plain values; a repeated key is an error (PyYAML silently keeps the last one)."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key.value!r} occurs twice: in line {seen[key.value]} and line {line}",
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping has the same key twice (both lines are named).
    """
    return yaml.load(text, _Loader)  # a SafeLoader: plain values only
