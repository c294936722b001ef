"""Errors whose message is for the user: the command line prints it without a traceback and exits with 1."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend: a file, a row, a key, a setting. The message names it."""


class MetadataError(UserError):
    """A value or key that the encoder cannot take; names the key, what was expected and what came."""


class Problems(UserError):
    """Several of them, found in one pass.

    Attributes:
        problems: one line each.
    """

    def __init__(self, title: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  - {p}" for p in self.problems)
        super().__init__(f"{title} ({len(self.problems)}):\n{lines}")
