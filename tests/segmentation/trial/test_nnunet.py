"""Runs of nnU-Net's arms: their scores, their process, and training that is killed and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.integrations.nnunet import cases as integration
from fastfilm.segmentation.data.demo import configuration, write_data_set
from fastfilm.segmentation.data.plan import PlanFolder
from fastfilm.segmentation.support.distributed import Processes
from fastfilm.segmentation.support.errors import Problems, UserError
from fastfilm.segmentation.support.files import read_json, write_json
from fastfilm.segmentation.support.stopping import Stopped
from fastfilm.segmentation.trial import nnunet, nnunet_data
from fastfilm.segmentation.trial.design import Run, selected
from fastfilm.segmentation.trial.folder import open_trial
from fastfilm.segmentation.trial.runs import SCORES, make_runs

from ...support.nnunet_arms import (
    BOTH,
    count_as_installed,
    installed,
    planned,
)
from ...support.phantoms import write_bids

ROOT = Path(__file__).parents[3]
CPU = Processes(0, 1, torch.device("cpu"))
needs_nnunet = pytest.mark.skipif(not installed, reason="nnunetv2 is not installed")


@pytest.fixture(autouse=True)
def _there(monkeypatch: pytest.MonkeyPatch) -> None:
    count_as_installed(monkeypatch)


def test_predictions_are_scored_voxel_by_voxel_against_the_labels_of_the_plan(
    tmp_path: Path,
) -> None:
    def label(image: Any, mask: Any) -> Any:
        values = np.zeros(mask.shape, np.uint8)
        values[2:6, 2:6, 2:6] = 5
        values[8:10, 8:12, 3] = 2
        return values

    root = write_bids(tmp_path / "bids", count=4, labels=label)
    plan = planned(
        tmp_path,
        root,
        data={"labels": {"one": 5, "two": 2}},
        trial={"arms": BOTH, "cluster": "tumor_type"},
    )
    predicted = np.zeros((16, 16, 12), np.uint8)
    predicted[4:6, 2:6, 2:6] = 1  # half of 64 voxels: Dice 2·32 / (32 + 64)
    predicted[8:10, 8:12, 3] = 2
    image = nib.Nifti1Image(predicted, np.diag([-1.0, 1, 1, 1]))
    nib.save(image, tmp_path / "case_00001.nii.gz")
    found = nnunet.score_files(plan, [plan.cases[1]], tmp_path)
    (scores,) = found.values()
    assert list(found) == [plan.cases[1].id] and scores["subject"] == "sub-01"
    assert scores["cluster"] == scores["metadata"]["tumor_type"] == "ependymoma"
    assert scores["metrics"]["one"]["Dice"] == pytest.approx(2 / 3)
    assert scores["metrics"]["two"]["Dice"] == 1 and scores["metrics"]["two"]["HD95"] == 0
    grid = nib.load(plan.cases[1].images[0]).affine[:3, :3]
    ml = abs(np.linalg.det(grid)) / 1000
    assert scores["metrics"]["one"]["volume_error"] == pytest.approx(-32 * ml)
    assert scores["swaps"] == scores["reliability"] == {}
    nib.save(nib.Nifti1Image(predicted[1:], np.eye(4)), tmp_path / "case_00000.nii.gz")
    with pytest.raises(
        Problems, match=r"(?s)sub-00: .*has shape \(15, 16, 12\).*sub-02: .*no such"
    ):
        nnunet.score_files(plan, [plan.cases[0], plan.cases[2]], tmp_path)


def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """A program of a few lines takes nnU-Net's place."""
    (tmp_path / "stand_in.py").write_text(text)
    monkeypatch.setattr(nnunet, "MODULE", "stand_in")


STAND_IN = """
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    names = [n for n in os.environ if n.startswith(("nnUNet", "FASTFILM_NNUNET", "CUDA_VIS"))]
    file.write(json.dumps([words, {n: os.environ[n] for n in names}]) + "\\n")
if words[0] == "train":
    report = Path(words[words.index("--report") + 1])
    found = {"results": "results/fold", "steps": 12, "curve": [{"step": 12, "dice_mean": 0.5}]}
    report.write_text(json.dumps(found))
"""


def test_a_run_prepares_once_and_gets_its_own_seed_folders_device_and_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(tmp_path, write_bids(tmp_path / "bids", count=4))
    out = tmp_path / "out"
    nnunet_data.write_data_set(plan, out)
    script(monkeypatch, tmp_path, STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("FASTFILM_NNUNET_META", "left=over")
    labels = out / "nnunet" / "raw" / "Dataset001_fastfilm" / "labelsTr"
    device = torch.device("cuda", 1)
    for run in (Run("nnunet", 0, 3), Run("nnunet_conditioned", 1, 4)):
        folder = out / run.path
        # the truth as predictions
        shutil.copytree(labels, folder / "results" / "fold" / "validation")
        for _ in range(2):
            made = nnunet.make(folder, out, plan, run, "val", device, None, "")
            assert made["steps"] == 12 and made["curve"] == [{"step": 12, "dice_mean": 0.5}]
            held = plan.cases_of(run.fold, "val")
            assert list(made["cases"]) == [c.id for c in held] and held
            assert all(c["metrics"]["lesion"]["Dice"] == 1 for c in made["cases"].values())
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [words[0] for words, _ in calls] == ["prepare", "train", "train"]
    assert calls[0][0][1:] == ["Dataset001_fastfilm", "2d"]
    assert read_json(out / "nnunet/preprocessed/Dataset001_fastfilm/splits_final.json") == (
        nnunet_data.splits(plan, "val")
    )
    for (words, environment), arm, trainer, fold, seed in (
        (calls[1], "nnunet", "nnUNetTrainer", "0", "3"),
        (calls[2], "nnunet_conditioned", "nnUNetTrainerFastFiLM", "1", "4"),
    ):
        assert words[1:4] == ["Dataset001_fastfilm", "2d", fold]
        assert words[words.index("--trainer") + 1] == trainer
        assert words[words.index("--seed") + 1] == seed
        assert words[words.index("--device") + 1] == "cuda"
        folder = out / "runs" / arm / f"fold-{fold}" / f"seed-{seed}"
        assert environment["nnUNet_results"] == str(folder / "results")
        assert environment["nnUNet_raw"] == str(out / "nnunet" / "raw")
        assert environment["CUDA_VISIBLE_DEVICES"] == "7"
        assert (Path(environment["nnUNet_extTrainer"]) / "nnUNetTrainerFastFiLM.py").is_file()
        assert "FASTFILM_NNUNET_META" not in environment
    assert "FASTFILM_NNUNET_TABLE" not in calls[1][1]
    conditioned = calls[2][1]
    columns = conditioned["FASTFILM_NNUNET_COLUMNS"].split(",")
    assert columns == ["metadata.tumor_type"]
    cases = nnunet_data.splits(plan, "val")[1]
    table = integration.read(
        conditioned["FASTFILM_NNUNET_TABLE"], columns, [*cases["train"], *cases["val"]]
    )
    assert table["case_00001"] == {"metadata.tumor_type": "=ependymoma"}


def test_a_device_that_nnunet_has_not_is_refused(tmp_path: Path) -> None:
    plan = planned(tmp_path, write_bids(tmp_path / "bids", count=4))
    with pytest.raises(UserError, match="nnU-Net computes on cpu, cuda, mps, not on xpu"):
        nnunet.make(
            tmp_path, tmp_path, plan, Run("nnunet", 0, 0), "val", torch.device("xpu"), None, ""
        )


def test_the_end_of_the_log_is_shown_when_nnunet_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, tmp_path, "for i in range(40): print('line', i)\nraise SystemExit(3)\n")
    log = tmp_path / "nnunet.log"
    with pytest.raises(UserError) as raised:
        nnunet.call([], {**os.environ, "PYTHONPATH": str(tmp_path)}, log, None, "")
    assert "nnU-Net has failed (status 3)" in str(raised.value)
    shown = str(raised.value).splitlines()[1:]
    assert shown == [f"  line {i}" for i in range(25, 40)]
    assert log.read_text().splitlines()[0] == "line 0"


def alive(pid: int) -> bool:
    """Whether a process is there and not only waits for its parent to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_nnunet_and_what_it_has_started_end_when_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(
        monkeypatch,
        tmp_path,
        "import subprocess, time\nleft = subprocess.Popen(['sleep', '600'])\n"
        "try:\n    print(left.pid, 'ready', flush=True)\n    time.sleep(600)\n"
        "except KeyboardInterrupt:\n    print('in order')\n",
    )
    log = tmp_path / "nnunet.log"
    wait = subprocess.Popen.wait

    def after(process: Any, timeout: float | None = None) -> int:
        # the first look comes once the program is at work
        while "ready" not in log.read_text():
            time.sleep(0.01)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", after)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with pytest.raises(Stopped, match="interrupted; all is kept") as raised:
        nnunet.call([], environment, log, time.monotonic(), "all is kept")
    assert raised.value.number == signal.SIGALRM
    first, second = log.read_text().splitlines()
    assert second == "in order"
    last = time.monotonic() + 60
    while alive(int(first.split()[0])):
        assert time.monotonic() < last, "a process that nnU-Net has started is left"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A configuration and the folder of its trial, with a tiny nnU-Net training set in the environment."""
    folder = tmp_path_factory.mktemp("trial")
    write_data_set(folder / "data", cases=9, shape=(32, 32, 8))
    value = configuration(quick=True)
    value["data"]["root"] = str(folder / "data")
    value["trial"] = {"arms": BOTH, "seeds": 2}
    write_json(folder / "config.yaml", value)
    site = folder / "site"
    site.mkdir()
    # torchvision without its operators does not import, and nnU-Net imports it
    (site / "sitecustomize.py").write_text(
        "try:\n    import torchvision\nexcept Exception:\n    import torch\n"
        "    kept = torch.library.Library('torchvision', 'DEF')\n"
        "    kept.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "    kept.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n",
        encoding="utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{site}{os.pathsep}{ROOT}")
        patch.setenv("FASTFILM_NNUNET_EPOCHS", "3")
        patch.setenv("FASTFILM_NNUNET_ITERATIONS", "1")
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setenv("nnUNet_def_n_proc", "1")
        yield folder / "config.yaml", folder / "out"


def opened(config: Path, out: Path) -> tuple[PlanFolder, dict[str, Any]]:
    from fastfilm.segmentation.config.schema import read_config

    plan, made, _ = open_trial(read_config(config), out)
    return plan, made


@needs_nnunet
def test_both_arms_are_trained_and_scored_on_the_folds_of_the_others(
    trial: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = trial
    plan, made = opened(config, out)
    runs = selected(made, nnunet_data.ARMS, [1], [0])
    left = make_runs(out, plan, made, runs, CPU)
    assert not left.busy and not left.late
    held = plan.cases_of(1, "val")
    scores = {run.arm: read_json(out / run.path / SCORES) for run in runs}
    assert list(scores) == list(nnunet_data.ARMS)
    for arm, found in scores.items():
        assert (found["arm"], found["fold"], found["seed"]) == (arm, 1, 0)
        assert found["design"] == made["sha256"] and found["steps"] == 3
        assert list(found["cases"]) == [c.id for c in held] and len(held) == 3
        assert {line["step"] for line in found["curve"]} <= {1, 2, 3}
        results = out / "runs" / arm / "fold-1" / "seed-0" / "results" / "Dataset001_fastfilm"
        (model,) = results.iterdir()
        summary = read_json_with_nan(model / "fold_1" / "validation" / "summary.json")
        theirs = {
            Path(c["prediction_file"]).name.partition(".")[0]: c["metrics"]["1"]["Dice"]
            for c in summary["metric_per_case"]
        }
        name = nnunet_data.names(plan)
        assert sorted(theirs) == sorted(name[c.id] for c in held)
        for case in held:
            ours = found["cases"][case.id]["metrics"]["target"]["Dice"]
            assert ours is not None and ours == pytest.approx(theirs[name[case.id]])
    conditioned = read_json(
        next((out / runs[1].path / "results").glob("*/nnUNetTrainerFastFiLM__nnUNetPlans__2d"))
        / "plans.json"
    )
    assert [c["column"] for c in conditioned["fastfilm"]["columns"]] == ["metadata.tumor_type"]
    plain = next((out / runs[0].path / "results").glob("*/nnUNetTrainer__nnUNetPlans__2d"))
    weights = [
        torch.load(f / "fold_1" / "checkpoint_final.pth", weights_only=False)["network_weights"]
        for f in (plain, next((out / runs[1].path / "results").glob("*/*FastFiLM*")))
    ]
    assert not any("film" in k for k in weights[0]) and len(weights[1]) > len(weights[0])
    # nothing is left to do
    assert not make_runs(out, plan, made, runs, CPU).late


def read_json_with_nan(path: Path) -> Any:
    return json.loads(path.read_text())


RUN = """
import sys
from pathlib import Path
import torch
from fastfilm.segmentation.config import read_config
from fastfilm.segmentation.distributed import Processes
from fastfilm.segmentation.trial.design import selected
from fastfilm.segmentation.trial.folder import open_trial
from fastfilm.segmentation.trial.runs import make_runs
from fastfilm.segmentation.stopping import Stopped

out = Path(sys.argv[2])
plan, design, _ = open_trial(read_config(sys.argv[1]), out)
runs = selected(design, ["nnunet"], [0], [0])
try:
    make_runs(out, plan, design, runs, Processes(0, 1, torch.device("cpu")))
except Stopped as stopped:
    sys.exit(stopped.status)
"""


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RUN, str(config), str(out)])


def wait_for(there: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not there():
        assert process.poll() is None, "it ended before"
        time.sleep(0.01)


def nnunet_processes(out: Path) -> list[int]:
    """Processes whose environment has a results folder inside ``out``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"nnUNet_results={out.resolve()}".encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@needs_nnunet
def test_a_training_that_was_killed_or_interrupted_goes_on_after_its_last_epoch(
    trial: tuple[Path, Path],
) -> None:
    config, out = trial
    folder = out / "runs" / "nnunet" / "fold-0" / "seed-0"
    results = folder / "results" / "Dataset001_fastfilm" / "nnUNetTrainer__nnUNetPlans__2d"
    latest = results / "fold_0" / "checkpoint_latest.pth"
    # killed: nnU-Net's process must not outlive the one that started it
    process = start(config, out)
    wait_for(latest.exists, process)
    process.kill()
    process.wait()
    # far more than the end of a pipe takes
    last = time.monotonic() + 120
    while nnunet_processes(out):
        assert time.monotonic() < last, "nnU-Net has outlived the process that started it"
        time.sleep(0.05)
    assert latest.exists() and not (folder / SCORES).exists()
    begun = torch.load(latest, weights_only=False)
    epoch = begun["current_epoch"]
    assert 1 <= epoch < 3
    # interrupted: as a cluster does
    process = start(config, out)
    wait_for(lambda: len(nnunet_processes(out)) > 0, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert not nnunet_processes(out) and not (folder / SCORES).exists()
    # gone on with
    process = start(config, out)
    assert process.wait() == 0
    assert read_json(folder / SCORES)["steps"] == 3
    final = torch.load(results / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert final["current_epoch"] == 3
    kept = begun["logging"]["epoch_start_timestamps"]
    assert final["logging"]["epoch_start_timestamps"][: len(kept)] == kept
    assert len(final["logging"]["epoch_start_timestamps"]) == 3
