"""A trial with nnU-Net's arms, for tests that do without nnU-Net itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.data.plan import PlanFolder, make_plan
from fastfilm.segmentation.trial import nnunet_data

from .phantoms import settings

BOTH = ["conditioned", "unconditioned", "nnunet", "nnunet_conditioned"]
installed = importlib.util.find_spec("nnunetv2") is not None


def count_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net counts as installed."""
    if not installed:
        monkeypatch.setattr(nnunet_data, "installed", lambda: True)
        monkeypatch.setattr(nnunet_data, "version", lambda name: "2.0")


def planned(tmp_path: Path, root: Path, **sections: Any) -> PlanFolder:
    """The plan of a trial with both arms, in a folder of ``tmp_path``."""
    value = settings(root, **{"trial": {"arms": BOTH}, **sections})
    return make_plan(parse(value, "test"), tmp_path / "plan")[0]
