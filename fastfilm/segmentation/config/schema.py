"""The configuration: its sections together, read from and written to YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..support.encoding import read_text
from ..support.errors import Problems, UserError
from ..support.files import write_text
from ..support.hints import did_you_mean
from ..support.yaml_files import load_yaml
from .sections import (
    MISSING,
    Augmentation,
    Data,
    MetadataKey,
    NetworkConfig,
    Output,
    PreprocessingConfig,
    Section,
    Splits,
    Training,
    Trial,
)


class Config(Section):
    """Everything ``fastfilm plan`` needs to know."""

    data: Data
    metadata: dict[str, MetadataKey] = Field(default_factory=dict, description="key: how to encode")
    output: Output = Field(default_factory=Output)
    preprocessing: PreprocessingConfig = Field(default_factory=PreprocessingConfig)
    network: NetworkConfig = Field(default_factory=NetworkConfig)
    augmentation: Augmentation = Field(default_factory=Augmentation)
    training: Training = Field(default_factory=Training)
    splits: Splits = Field(default_factory=Splits)
    trial: Trial = Field(default_factory=Trial)

    @field_validator("metadata", mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        """``tumor_type:`` alone, or a list of keys, are categories."""
        if isinstance(value, list):
            value = {key: {} for key in value}
        if isinstance(value, Mapping):
            return {k: {} if v is None else v for k, v in value.items()}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        for key in self.metadata.values():
            if key.missing is None:
                key.missing = list(MISSING[self.data.source])
        if self.output.mode == "task" and self.output.task_key in self.metadata:
            raise ValueError(
                f"metadata: {self.output.task_key!r} is made by output mode 'task'; rename it there"
            )
        if self.output.mode == "classes":
            own = [n for n, label in self.data.labels.items() if label.values is None]
            if own:
                raise ValueError(
                    f"output mode 'classes' needs labels that are values of one file, not {own}"
                )
            values = [v for label in self.data.labels.values() for v in label.values or []]
            twice = sorted({v for v in values if values.count(v) > 1})
            if twice:
                raise ValueError(
                    f"output mode 'classes' needs labels that exclude each other; value {twice[0]} is in several"
                    " of them (mode 'channels' has labels that overlap)"
                )
        other = "column" if self.data.source == "bids" else "suffix"
        for name, label in self.data.labels.items():
            if getattr(label, other) is not None:
                raise ValueError(
                    f"data.labels.{name}.{other} is not for data.source {self.data.source}"
                )
        contrast = self.data.label_contrast
        if contrast is not None and contrast not in self.data.contrasts:
            raise ValueError(
                f"data.label_contrast {contrast!r} is none of data.contrasts"
                + did_you_mean(contrast, self.data.contrasts)
            )
        balance = self.training.balance
        tasks = ["label"] if self.output.mode == "task" else []
        if balance is not None and balance not in [*self.metadata, *tasks]:
            raise ValueError(
                f"training.balance {balance!r} is no metadata key{did_you_mean(balance, self.metadata)}"
            )
        for name in self.splits.stratify:
            if name not in self.metadata:
                hint = did_you_mean(name, self.metadata)
                raise ValueError(f"splits.stratify: {name!r} is no metadata key{hint}")
        for setting, chosen in (("group", self.splits.group), ("leave_out", self.splits.leave_out)):
            if chosen is None:
                continue
            if chosen not in self.metadata:
                hint = did_you_mean(chosen, self.metadata) or (
                    f" (metadata.{chosen}.input: false reads it without giving it to the network)"
                )
                raise ValueError(f"splits.{setting}: {chosen!r} is no metadata key{hint}")
            kind = self.metadata[chosen].kind
            if kind not in ("category", "ordered"):
                raise ValueError(
                    f"splits.{setting}: {chosen!r} must be of kind category or ordered, got {kind}"
                )
        cluster = self.trial.cluster
        if cluster is not None and cluster not in self.metadata:
            hint = did_you_mean(cluster, self.metadata)
            raise ValueError(f"trial.cluster: {cluster!r} is no metadata key{hint}")
        groups = [("splits.stratify", name) for name in self.splits.stratify]
        for setting, by in (*groups, ("training.balance", balance), ("trial.cluster", cluster)):
            if by in self.metadata and self.metadata[by].kind == "vector":
                raise ValueError(
                    f"{setting}: {by!r} is a vector, whose values make no groups; expected a key of another kind"
                )
        return self


def problems(error: ValidationError, model: type[BaseModel] | None = None) -> list[str]:
    """One line for each thing that pydantic found wrong: the key, what was expected, what came, what may be meant.

    Args:
        model: what was read; None: ``Config``.
    """
    lines = []
    for e in error.errors():
        where = ".".join(str(p) for p in e["loc"]) or "configuration"
        if e["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key{_meant(e['loc'], model or Config)}")
        elif e["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            message = e["msg"].removeprefix("Value error, ")
            got = "" if e["type"] == "value_error" else f", got {e['input']!r}"
            hint = ""
            if e["type"] == "literal_error":
                choices = re.findall(r"'([^']*)'", str(e.get("ctx", {}).get("expected", "")))
                hint = did_you_mean(str(e["input"]), choices)
            lines.append(f"{where}: {message}{got}{hint}")
    return lines


def _meant(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """A hint for an unknown key: a like one of its section, or one of the same name elsewhere."""
    section: type[BaseModel] | None = model
    for part in loc[:-1]:
        fields = section.model_fields if section is not None else {}
        section = _section(fields[str(part)].annotation) if str(part) in fields else section
    name = str(loc[-1])
    hint = did_you_mean(name, section.model_fields if section is not None else ())
    if hint:
        return hint
    for key, field in model.model_fields.items():
        inner = _section(field.annotation)
        if inner is not None and name in inner.model_fields:
            return f"; did you mean '{key}.{name}'?"
    return ""


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds: itself, or the values of a dictionary."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def parse(value: Any, origin: str) -> Config:
    """The configuration in a nested dictionary.

    Raises:
        Problems: every key that is wrong, in one message that starts with ``origin``.
    """
    try:
        return Config.model_validate(value)
    except ValidationError as error:
        raise Problems(f"{origin}: problems in the configuration", problems(error)) from error


def read_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """A configuration from a YAML file; a relative ``data.root`` is relative to that file.

    Args:
        overrides: dotted keys and values that replace the file's, e.g. ``{"training.epochs": 20}``.

    Raises:
        UserError: no such file, not YAML. Problems: keys that are wrong.
    """
    path = Path(path)
    try:
        value = load_yaml(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a configuration is keys and values, got {type(value).__name__}")
    for key, new in (overrides or {}).items():
        override(value, key, new)
    config = parse(value, str(path))
    if not config.data.root.is_absolute():
        config.data.root = (path.parent / config.data.root).resolve()
    return config


def override(value: dict[str, Any], key: str, new: Any) -> None:
    """Sets ``key`` (dotted) of a nested dictionary; a section's settings are added to those that are there.

    Raises:
        UserError: ``key`` leads through something that has no keys.
    """
    *parents, last = key.split(".")
    for parent in parents:
        inner = value.setdefault(parent, {})
        if inner is None:
            inner = value[parent] = {}
        if isinstance(inner, list):
            # metadata: [tumor_type, site]
            inner = value[parent] = {str(name): {} for name in inner}
        if not isinstance(inner, dict):
            raise UserError(f"{key}: {parent} has no keys, it is {inner!r}")
        value = inner
    old = value.get(last)
    if isinstance(old, dict) and isinstance(new, dict):
        new = {**old, **new}
    value[last] = new


FREE = ("workers", "checkpoint_minutes", "checkpoint_steps")
"""Settings of the training that change nothing of its result: who loads, and how often is saved."""


def decisive(config: Config) -> dict[str, Any]:
    """The settings that a result depends on, as nested plain JSON: not where the data are, nor ``FREE``."""
    value = config.model_dump(mode="json")
    del value["data"]["root"]
    for name in FREE:
        del value["training"][name]
    return value


def write_config(config: Config, path: str | Path) -> None:
    """The complete configuration as YAML, atomically."""
    write_text(path, config_text(config))


def config_text(config: Config) -> str:
    """The complete configuration as YAML."""
    value = config.model_dump(mode="json")
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
