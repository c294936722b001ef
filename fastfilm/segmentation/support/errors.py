"""Errors for the user: the command line prints their message without a traceback and exits with 1."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """A fault that the user can mend in a file, a row, a key or a setting, which the message names."""


class MetadataError(UserError):
    """A metadata key or value that the encoder cannot take; the message names the key and the expected values."""


class Problems(UserError):
    """Several faults, found in one pass.

    Attributes:
        problems: a line for each fault.
    """

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"{title} ({len(self.problems)}):\n{lines}")
