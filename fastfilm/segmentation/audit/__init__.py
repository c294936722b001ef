"""The audit of a plan's metadata before any training: shortcuts, confounding, and rare values."""

from __future__ import annotations

from .run import audit

__all__ = ["audit"]
