"""Commands killed with SIGKILL at moments of chance and run again end with what an undisturbed run writes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.ops.settings import environment
from fastfilm.segmentation.models.folder import load_model
from fastfilm.segmentation.support.files import read_json
from fastfilm.segmentation.support.lock import NAME
from fastfilm.segmentation.training.record import read_log

from ...support.phantoms import settings, write_bids
from ..training.test_fold import saved_step

SLOW = environment.read("FASTFILM_SLOW_TESTS") == "1"
ROOT = Path(__file__).parents[3]
STEPS = 24
TRAINING = {
    "epochs": 3,
    "steps_per_epoch": STEPS // 3,
    "checkpoint_steps": 1,
    "ema": 0.9,
    "schedule": "plateau",
}


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a configuration and a plan."""
    folder = tmp_path_factory.mktemp("kills")
    root = write_bids(folder / "bids", count=4)
    config = settings(root, network={"dropout": 0.2}, training=TRAINING)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(folder, "plan", "config.yaml", "plan") == 0
    return folder


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fastfilm", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(folder: Path, *words: str) -> int:
    process = start(folder, *words)
    assert "Traceback" not in process.communicate()[1]
    return process.returncode


def kill(process: subprocess.Popen[str], when: Callable[[], bool]) -> bool:
    """SIGKILL once ``when`` says so; False if the process ended before."""
    while not when() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def trained(folder: Path, model: str, kills: int, chance: random.Random) -> None:
    """Trains with that many kills, each at a later step."""
    model_folder = folder / model
    for moment in sorted(chance.sample(range(STEPS - 4), kills)):
        # a training that was killed before it wrote anything has nothing to resume
        resume = ["--resume"] if (model_folder / "model.json").exists() else []
        delay = chance.uniform(0, 0.05)
        process = start(folder, "train", "plan", model, *resume)

        def reached(moment: int = moment, delay: float = delay) -> bool:
            there = (model_folder / "last.safetensors").exists()
            if there and saved_step(model_folder) >= moment:
                time.sleep(delay)
                return True
            return False

        if not kill(process, reached):
            break
    assert run(folder, "train", "plan", model, "--resume") == 0


def assert_same_training(a: Path, b: Path) -> None:
    for name in ("last", "best", "final"):
        file = f"{name}.safetensors"
        assert (a / file).read_bytes() == (b / file).read_bytes(), name
    logs = [read_log(folder) for folder in (a, b)]
    for line in (*logs[0], *logs[1]):
        for key in ("seconds", "loader_wait", "validation_seconds"):
            line.pop(key)
    assert logs[0] == logs[1]
    assert (a / "model.json").read_text() == (b / "model.json").read_text()
    assert not [p for p in b.rglob(".*") if p.name.startswith((".writing-", NAME))]


def test_a_killed_training_goes_on_to_the_same_bytes(side: Path) -> None:
    assert run(side, "train", "plan", "whole") == 0
    trained(side, "killed", 1, random.Random(3))
    assert_same_training(side / "whole", side / "killed")


@pytest.mark.skipif(not SLOW, reason="minutes; set FASTFILM_SLOW_TESTS=1 to run it")
def test_every_command_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    chance = random.Random(5)
    folders = [tmp_path / name for name in ("whole", "killed")]
    data = write_bids(tmp_path / "bids", count=6)
    for folder in folders:
        # with the times of the files
        root = shutil.copytree(data, folder / "bids")
        config = settings(root, network={"dropout": 0.2}, training=TRAINING)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    commands: list[tuple[Sequence[str], Sequence[str]]] = [
        (["plan", "config.yaml", "plan"], []),
        (["train", "plan", "model"], []),
        (["predict", "model", "plan", "out", "--fold", "0"], ["--continue"]),
        (["evaluate", "out"], []),
    ]
    whole, killed = folders
    for words, again in commands:
        begun = time.monotonic()
        assert run(whole, *words) == 0
        seconds = time.monotonic() - begun
        if words[0] == "train":
            trained(killed, "model", 8, chance)
            continue
        for _ in range(4):
            end = time.monotonic() + chance.uniform(0.3, 1.0) * seconds
            kill(start(killed, *words, *again), lambda end=end: time.monotonic() > end)
        assert run(killed, *words, *again) == 0
    assert_same_training(whole / "model", killed / "model")
    for pattern in ("plan/*.json", "out/*.json", "out/*.csv"):
        files = sorted(p.relative_to(whole) for p in whole.glob(pattern))
        assert files == sorted(p.relative_to(killed) for p in killed.glob(pattern)) and files
        for file in files:
            a, b = (content(folder, file) for folder in folders)
            assert a == b, file
    for image in whole.glob("out/*.nii.gz"):
        other = killed / image.relative_to(whole)
        assert np.array_equal(*(np.asarray(nib.load(p).dataobj) for p in (image, other)))


def content(folder: Path, file: Path) -> Any:
    """A text without what the folder and the moment of writing make different."""
    text = (folder / file).read_text().replace(str(folder), "FOLDER")
    value = json.loads(text) if file.suffix == ".json" else text
    if isinstance(value, dict):
        # digests over paths and times of files
        for key in ("settings", "digest", "files"):
            value.pop(key, None)
    return value


def test_of_two_trainings_into_one_folder_one_is_refused_and_the_other_whole(side: Path) -> None:
    both = [start(side, "train", "plan", "shared", "--fold", fold) for fold in ("0", "1")]
    texts = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1], texts
    refused = next(t for t, p in zip(texts, both, strict=True) if p.returncode)
    # the second if the machine let it start only after the first was done
    assert "is writing to it" in refused or "holds a training already" in refused
    assert "Traceback" not in refused
    fold = load_model(side / "shared").info.training["fold"]
    assert both[fold].returncode == 0
    folds = read_json(side / "plan" / "splits.json")
    assert read_json(side / "shared" / "splits.json") == folds[fold]
    assert [line["epoch"] for line in read_log(side / "shared")] == [1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_training_saves_its_state(
    side: Path, number: signal.Signals
) -> None:
    model = side / number.name
    options = ["--set", "training.workers=2", "--set", "training.epochs=1000"]
    process = start(side, "train", "plan", model.name, *options)
    while not (model / "best.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    text = process.communicate()[1]
    assert process.returncode == 128 + number, text
    assert "the state is saved; go on with:" in text and "Traceback" not in text
    assert saved_step(model) >= STEPS // 3
