"""Skips every module of the segmentation system's tests if the extra [segmentation] is not installed."""

from __future__ import annotations

import importlib.util
import sys

import pytest

EXTRA = ("matplotlib", "monai", "pydantic", "rich", "safetensors", "scipy", "typer", "yaml")
MISSING = [n for n in EXTRA if n not in sys.modules and importlib.util.find_spec(n) is None]


@pytest.hookimpl(tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> pytest.CollectReport | None:
    if not MISSING or not isinstance(collector, pytest.Module):
        return None
    reason = f"Skipped: needs the extra [segmentation], without which {MISSING[0]} is missing"
    return pytest.CollectReport(
        collector.nodeid, "skipped", (str(collector.path), 1, reason), result=[]
    )
