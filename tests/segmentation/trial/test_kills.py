"""``fastfilm trial`` killed at moments of chance, and run by two processes, ends with the same results."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.ops.settings import environment

from ...support.phantoms import settings, write_bids
from ..commands.test_kills import (
    kill,
    run,
    start,
)
from ..training.test_fold import saved_step

SLOW = environment.read("FASTFILM_SLOW_TESTS") == "1"
KILLS = 10 if SLOW else 3
RUNS, STEPS = 12, 6
"""Networks of the trial, and steps of each."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trial that nothing disturbed."""
    folder = tmp_path_factory.mktemp("trial")
    root = write_bids(folder / "bids", count=9)
    config = settings(
        root,
        splits={"folds": 3, "stratify": ["tumor_type"]},
        trial={"seeds": 2, "arms": ["conditioned", "unconditioned"]},
        training={"checkpoint_steps": 1},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(folder, "trial", "config.yaml", "whole") == 0
    return folder


def steps(trial: Path) -> int:
    """Training steps whose result is saved, over all runs."""
    found = STEPS * len([*trial.rglob("scores.json")])
    for path in trial.rglob("last.safetensors"):
        # removed once the scores are there
        with contextlib.suppress(FileNotFoundError):
            found += saved_step(path.parent)
    return found


def assert_same(folder: Path, name: str) -> None:
    for file in ("results.json", "design.json"):
        assert (folder / "whole" / file).read_bytes() == (folder / name / file).read_bytes(), file
    assert (folder / name / "report.html").is_file()
    assert not [p for p in (folder / name).rglob(".*") if p.name.startswith((".writing-", ".lock"))]


def test_a_trial_killed_again_and_again_ends_as_an_undisturbed_one(whole: Path) -> None:
    folder = whole
    chance = random.Random(7)
    kills = 0
    for moment in sorted(chance.sample(range(RUNS * STEPS - 2), KILLS)):
        process = start(folder, "trial", "config.yaml", "killed")
        delay = chance.uniform(0, 0.2)

        def reached(moment: int = moment, delay: float = delay) -> bool:
            if steps(folder / "killed") >= moment:
                time.sleep(delay)
                return True
            return False

        kills += kill(process, reached)
    assert kills == KILLS
    assert run(folder, "trial", "config.yaml", "killed") == 0
    assert_same(folder, "killed")


def test_two_processes_share_a_trial(whole: Path) -> None:
    folder = whole
    assert run(folder, "trial", "config.yaml", "shared", "--dry") == 0
    two = [start(folder, "trial", "config.yaml", "shared") for _ in range(2)]
    for process in two:
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode == 0
    # the last to end finds all runs, unless both were at their last one at the same time
    assert run(folder, "trial", "config.yaml", "shared") == 0
    assert_same(folder, "shared")


def test_parts_of_a_trial_give_no_verdict(whole: Path) -> None:
    folder = whole
    words = [
        "trial",
        "config.yaml",
        "parts",
        "--arm",
        "unconditioned",
        "--fold",
        "1",
        "--seed",
        "0",
    ]
    assert run(folder, *words) == 0
    assert [p.parent.name for p in (folder / "parts").rglob("scores.json")] == ["seed-0"]
    assert not (folder / "parts" / "results.json").exists()
