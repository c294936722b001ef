"""Pictures of a campaign."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws what there are rows for; path below the report -> caption. Nothing without matplotlib."""
    return {}
