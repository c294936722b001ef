"""``fastfilm plan`` and ``fastfilm train`` as a user meets them: messages, exit states, nothing half-written."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("typer", reason="needs the extra [segmentation]")

import yaml

from fastfilm.__main__ import main
from fastfilm.segmentation.commands import cli
from fastfilm.segmentation.config.page import rewritten
from fastfilm.segmentation.config.schema import parse, write_config
from fastfilm.segmentation.models.folder import load_model
from fastfilm.segmentation.training.record import read_log

from ...support.phantoms import settings, write_bids


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("bids"))


@pytest.fixture
def plan(bids: Path, tmp_path: Path) -> Path:
    write_config(parse(settings(bids), "test"), tmp_path / "config.yaml")
    assert main(["plan", str(tmp_path / "config.yaml"), str(tmp_path / "plan")]) == 0
    return tmp_path / "plan"


def child(work: Callable[[], int], signals: tuple[int, ...] = (), after: float = 0.0) -> int:
    """``work`` in a process of its own, which gets ``signals``; its exit state."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(work()))
    process.start()
    for s in signals:
        time.sleep(after)
        assert process.pid is not None
        os.kill(process.pid, s)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith(".writing-")]


def test_plan_and_train_from_a_folder_without_a_configuration(
    bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["preprocessing.patch_size=[16,16]", "preprocessing.dimensions=2d"]
    sizes += ["network.base_filters=2", "network.depth=1", "splits.folds=2"]
    arguments = ["--contrast", "FLAIR", "--label", "lesion=1", "--metadata", "age=continuous"]
    options = [part for s in sizes for part in ("--set", s)]
    assert main(["plan", str(bids), str(tmp_path / "plan"), *arguments, *options]) == 0
    fast = ["training.epochs=2", "training.steps_per_epoch=2", "training.workers=0"]
    options = [part for s in fast for part in ("--set", s)]
    model = tmp_path / "model"
    assert main(["train", str(tmp_path / "plan"), str(model), "--fold", "1", *options]) == 0
    text = capsys.readouterr().out
    assert "6 cases of 6 subjects, 2 fold(s); 2D, patch 16x16" in text
    assert "epoch 2/2" in text and "waiting for data" in text and "\x1b" not in text
    assert load_model(model).metadata_keys() == ["age"]
    assert [line["epoch"] for line in read_log(model)] == [1, 2]
    assert main(["train", str(tmp_path / "plan"), str(model), "--fold", "1", *options]) == 1
    assert "--resume" in capsys.readouterr().err


def test_a_bad_data_set_ends_with_every_problem_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_bids(tmp_path / "bids", count=4)
    for i in range(2):
        (root / f"sub-0{i}" / "anat" / f"sub-0{i}_FLAIR.nii.gz").write_bytes(b"")
    plan = ["plan", str(root), str(tmp_path / "plan"), "--contrast", "FLAIR", "--label", "a=1"]
    assert main(plan) == 1
    text = capsys.readouterr().err
    assert "sub-00_FLAIR.nii.gz" in text and "sub-01_FLAIR.nii.gz" in text
    assert "Traceback" not in text and not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["plan"], 2, "Missing argument"),
        (["train", "--colour"], 2, "No such option"),
        (["plan", "nowhere.yaml", "out"], 1, "nowhere.yaml: cannot be read"),
        (["plan", "nowhere.txt", "out"], 1, "nowhere.txt: expected"),
        (["train", "nowhere", "out"], 1, "nowhere: not a plan"),
    ],
)
def test_wrong_command_lines_are_one_message(
    argv: list[str],
    status: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == status
    text = capsys.readouterr().err
    assert message in text and "Traceback" not in text and not list(tmp_path.iterdir())


def test_a_fold_that_is_not_there_and_settings_that_are_the_plans(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path / "model")
    assert main(["train", str(plan), model, "--fold", "7"]) == 1
    assert "fold must be 0 to 1, got 7" in capsys.readouterr().err
    assert main(["train", str(plan), model, "--set", "network.depth=3"]) == 1
    assert "part of the plan" in capsys.readouterr().err
    assert main(["train", str(plan), model, "--set", "training.epoch=3"]) == 1
    assert "training.epoch: unknown key" in capsys.readouterr().err
    assert main(["train", str(plan), model, "--set", "training.batch_size=3", "--set",
                 "training.accumulate=2"]) == 1  # fmt: skip
    assert "batch of 3 cannot be shared" in capsys.readouterr().err
    assert not Path(model).exists()


def test_a_full_disk_ends_with_the_file_and_leaves_what_was_there(
    plan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    resource = pytest.importorskip("resource")
    model = tmp_path / "model"
    options = ["--set", "training.epochs=1"]
    assert main(["train", str(plan), str(model), *options]) == 0
    before = (model / "last.safetensors").read_bytes()

    def full() -> int:
        # writing beyond this is refused as it is on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
        return main(["train", str(plan), str(tmp_path / "other"), *options])

    assert child(full) == 1
    text = capfd.readouterr().err
    assert "safetensors: cannot be written" in text and "Traceback" not in text
    assert not leftovers(tmp_path) and not list((tmp_path / "other").glob("*.safetensors"))
    assert (model / "last.safetensors").read_bytes() == before


def test_an_output_that_cannot_be_written_is_named(
    plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", str(plan), str(tmp_path / "file" / "model")]) == 1
    text = capsys.readouterr().err
    assert str(tmp_path / "file") in text and "cannot be written" in text
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_with_130_and_training_can_go_on(
    plan: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    options = ["--set", "training.epochs=400", "--set", f"training.workers={workers}"]
    arguments = ["train", str(plan), str(tmp_path / "model"), *options]

    def work() -> int:
        # a test run in the background inherits that the signal is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        return main(arguments)

    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(work()))
    process.start()
    while not (tmp_path / "model" / "best.safetensors").exists():
        time.sleep(0.01)
        assert process.is_alive()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    text = capfd.readouterr().err
    assert "interrupted" in text and "Traceback" not in text
    assert "fastfilm train" in text and text.rstrip().endswith("--resume")
    assert not leftovers(tmp_path)
    assert (tmp_path / "model" / "last.safetensors").exists()
    load_model(tmp_path / "model")


def test_commands_say_what_to_install_where_the_extra_is_missing() -> None:
    """In a process in which typer cannot be imported."""
    program = (
        "import sys; sys.modules['typer'] = None\n"
        "from fastfilm.__main__ import main\n"
        "sys.exit(main(['info']) or main(['plan', 'a', 'b']) - 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 'fastfilm plan needs typer: pip install "fastfilm[segmentation]"' in done.stderr


def test_help_does_not_import_the_segmentation_system() -> None:
    program = (
        "import sys\nfrom fastfilm.__main__ import main\nmain(['--help'])\n"
        "sys.exit(any(m in sys.modules for m in ('monai', 'typer', 'pydantic', 'scipy')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.SUMMARIES)


DOCS = Path(__file__).resolve().parents[3] / "docs"
GUIDE, RESULTS = (DOCS / "segmentation.md").read_text("utf-8"), DOCS / "results"


def test_the_guides_reference_is_that_of_the_configuration() -> None:
    assert rewritten(GUIDE) == GUIDE, (
        "python -m fastfilm.segmentation.config.page docs/segmentation.md"
    )
    assert "| `training.seed` | whole number | `0` |" in GUIDE


def test_the_guides_configurations_are_valid() -> None:
    blocks = [b.split("```")[0] for b in GUIDE.split("```yaml\n")[1:]]
    assert len(blocks) >= 2
    for block in blocks:
        parse(yaml.safe_load(block), "docs/segmentation.md")


def test_the_guides_figures_are_those_of_the_committed_runs() -> None:
    for name in ("glioma", "hippocampus"):
        run = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
        last = run["log"][-1]
        assert f"{last['step']} steps in {run['train_cpu_seconds'] / 60:.1f} CPU minutes" in GUIDE
        assert f"alidation Dice {last['dice_mean']:.3f}" in GUIDE
        for fed in run.get("dice_true_by_fed", {}).values():
            assert " | ".join(f"{v['mean']:.3f}" for v in fed.values()) in GUIDE
        for label in run.get("evaluation", {}).get("mean", {}).values():
            assert f"| {label['Dice']:.3f} | {label['HD95']:.2f} |" in GUIDE
