"""Trainings in tests: the plan of a small data set, a single process, and events at a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.data.plan import PlanFolder, make_plan, read_plan
from fastfilm.segmentation.support.distributed import Processes
from fastfilm.segmentation.support.files import read_tensors
from fastfilm.segmentation.training import loop

from .phantoms import settings

ONE = Processes(0, 1, torch.device("cpu"))


def planned(root: Path, folder: Path, **sections: Any) -> PlanFolder:
    """The plan of a data set of ``write_bids``, as it is read from ``folder``."""
    make_plan(parse(settings(root, **sections), "test"), folder)
    return read_plan(folder)


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    """The tensors of NAME.safetensors in a model folder."""
    return read_tensors(folder / f"{name}.safetensors")[0]


def assert_same_files(a: Path, b: Path) -> None:
    """Two model folders have the same state and weights, byte for byte."""
    for name in ("last", "best", "final"):
        first, second = (f / f"{name}.safetensors" for f in (a, b))
        assert first.read_bytes() == second.read_bytes(), name


def saved_step(folder: Path) -> int:
    """The step from which a resumed training would continue."""
    last = folder / "last.safetensors"
    if not last.exists():
        return 0
    # the header through one open file: safe_open opens the path twice, and it may be replaced in between
    with last.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(json.loads(header["__metadata__"]["state"])["progress"]["step"])


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Calls ``act`` inside the training's step number ``step`` (from 0)."""
    seed_step = loop.seed_step

    def seeded(seed: int, now: int, rank: int) -> None:
        if now == step:
            act()
        seed_step(seed, now, rank)

    monkeypatch.setattr(loop, "seed_step", seeded)
