"""What a plan's metadata give away before any training: shortcuts, confounding, rare values."""

from __future__ import annotations

from .run import audit

__all__ = ["audit"]
