"""Training that is interrupted, resumed, refused: what is kept and what is said."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastfilm.__main__ import main
from fastfilm.segmentation.data.plan import PlanFolder, read_plan
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.lock import locked
from fastfilm.segmentation.support.stopping import Stopped
from fastfilm.segmentation.training import loop as trainer
from fastfilm.segmentation.training import validation
from fastfilm.segmentation.training.dataset import Samples
from fastfilm.segmentation.training.fold import Start, train
from fastfilm.segmentation.training.loop import Trainer
from fastfilm.segmentation.training.record import read_log

from ...support.phantoms import write_bids
from ...support.trainings import ONE, assert_same_files, at_step, planned, saved_step


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("bids"), count=4)


@pytest.fixture
def plan(bids: Path, tmp_path: Path) -> PlanFolder:
    return planned(bids, tmp_path / "plan")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_after_the_step_under_way_with_the_state_saved(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    train(Start(plan, 0, tmp_path / "whole"), ONE)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        at_step(patch, 4, lambda: signal.raise_signal(number))
        train(Start(plan, 0, tmp_path / "model", options=["--set", "a b=1"]), ONE)
    assert stopped.value.status == 128 + number
    where = f"{plan.path} {tmp_path / 'model'}"
    assert f"fastfilm train {where} --fold 0 --set 'a b=1' --resume" in stopped.value.text
    assert saved_step(tmp_path / "model") == 5
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train(Start(plan, 0, tmp_path / "model", resume=True), ONE)
    assert_same_files(tmp_path / "whole", tmp_path / "model")


def test_a_signal_while_validating_keeps_the_epochs_steps(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(Start(plan, 0, tmp_path / "whole"), ONE)
    case_dice = validation.case_dice

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return case_dice(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(validation, "case_dice", interrupted)
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert saved_step(tmp_path / "model") == 3
    assert not (tmp_path / "model" / "best.safetensors").exists()
    train(Start(plan, 0, tmp_path / "model", resume=True), ONE)
    assert_same_files(tmp_path / "whole", tmp_path / "model")


@pytest.mark.parametrize("error", [RuntimeError, ConnectionResetError, FileNotFoundError, EOFError])
def test_loading_processes_that_a_signal_ended_do_not_hide_it(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    class Ended:
        """A loader whose processes the signal ends, too."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __iter__(self) -> Any:
            signal.raise_signal(signal.SIGTERM)
            raise error("ended")
            yield

    monkeypatch.setattr(trainer, "DataLoader", Ended)
    with pytest.raises(Stopped) as stopped:
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert stopped.value.status == 143 and saved_step(tmp_path / "model") == 0


def test_a_second_signal_ends_training_at_once(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    at_step(monkeypatch, 1, twice)
    with pytest.raises(Stopped) as stopped:
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert stopped.value.status == 130 and "--resume" in stopped.value.text
    # the state with which it started
    assert saved_step(tmp_path / "model") == 0
    assert not list((tmp_path / "model").glob(".*"))


def test_resume_with_nothing_to_resume_is_an_error_that_says_what_is_missing(
    bids: Path, plan: PlanFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    with pytest.raises(UserError, match=r"nothing to resume: it has no last\.safetensors; without"):
        train(Start(plan, 0, model, resume=True), ONE)
    assert not model.exists()
    train(Start(plan, 0, model), ONE)
    before = files(model)
    (model / "last.safetensors").unlink()
    for resume in (True, False):
        with pytest.raises(UserError, match=r"best\.safetensors; choose another folder"):
            train(Start(plan, 0, model, resume=resume), ONE)
    # killed before the first save
    for name in ("best", "final"):
        (model / f"{name}.safetensors").unlink()
    with pytest.raises(UserError, match=r"its model\.json is of another plan, fold or"):
        train(Start(plan, 1, model, resume=True), ONE)
    train(Start(plan, 0, tmp_path / "begun"), ONE)
    for path in (tmp_path / "begun").glob("*.safetensors"):
        path.unlink()
    # as it is before training has ended
    info = plan_info(plan, tmp_path)
    (tmp_path / "begun" / "model.json").write_bytes(info)
    capsys.readouterr()
    train(Start(plan, 0, tmp_path / "begun", resume=True), ONE)
    assert "starts at step 0" in capsys.readouterr().out
    after = files(tmp_path / "begun")
    assert after["final.safetensors"] == before["final.safetensors"]


def plan_info(plan: PlanFolder, tmp_path: Path) -> bytes:
    """model.json as a training writes it before its first step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Trainer, "run", lambda self: 1 / 0)
        train(Start(plan, 0, tmp_path / "described"), ONE)
    return (tmp_path / "described" / "model.json").read_bytes()


def test_resume_names_what_differs_and_changes_nothing(
    bids: Path, plan: PlanFolder, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    train(Start(plan, 0, model), ONE)
    before = files(model)
    other = planned(bids, tmp_path / "other", network={"base_filters": 3})
    faster = read_plan(tmp_path / "plan")
    faster.config.training.learning_rate = 0.5
    larger = read_plan(tmp_path / "plan")
    larger.plan.batch_size = 2
    for start, said in (
        (Start(plan, 1, model, resume=True), "fold was 0, is 1"),
        (Start(other, 0, model, resume=True), "network.base_filters was 2, is 3"),
        (Start(faster, 0, model, resume=True), "training.learning_rate was 0.001, is 0.5"),
        (Start(larger, 0, model, resume=True), "batch was 4, is 2"),
    ):
        with pytest.raises(UserError) as error:
            train(start, ONE)
        assert said in str(error.value)
    plan.config.training.workers = 1
    plan.config.training.checkpoint_steps = 1
    train(Start(plan, 0, model, resume=True), ONE)
    assert files(model) == before


def test_resume_says_what_makes_other_roundings(
    plan: PlanFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 0, lambda: signal.raise_signal(signal.SIGINT))
        train(Start(plan, 0, tmp_path / "model"), ONE)
    capsys.readouterr()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        train(Start(plan, 0, tmp_path / "model", resume=True), ONE)
    finally:
        torch.set_num_threads(threads)
    line = next(x for x in capsys.readouterr().out.splitlines() if "threads" in x)
    assert line == (
        f"number of threads was {threads}, is {threads + 1}; the result will differ in rounding from an"
        " uninterrupted run"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."), "was killed"),
        (UserError("a file is gone"), "a file is gone"),
    ],
)
def test_a_stop_by_an_error_says_why_and_how_to_go_on(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail() -> None:
        raise error

    at_step(monkeypatch, 1, fail)
    with pytest.raises(UserError, match=said) as found:
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert str(found.value).endswith("--fold 0 --resume")


def test_an_error_of_a_loading_process_comes_without_its_traceback(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise UserError("image.npy: cannot be read")

    monkeypatch.setattr(Samples, "__getitem__", fail)
    plan.config.training.workers = 1
    with pytest.raises(UserError) as error:
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert str(error.value).startswith("image.npy: cannot be read; continue with:")


def test_a_training_into_a_locked_folder_is_refused_before_anything_is_looked_at(
    plan: PlanFolder, tmp_path: Path
) -> None:
    with (
        locked(tmp_path / "model", "fastfilm evaluate"),
        pytest.raises(UserError, match=r"fastfilm evaluate \(process \d+ on .* is writing to it"),
    ):
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert not (tmp_path / "model").exists()


def test_the_state_is_saved_before_the_first_step_and_before_an_epoch_is_said(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    at_step(monkeypatch, 0, lambda: steps.append(saved_step(tmp_path / "model")))
    monkeypatch.setattr(trainer, "say", lambda _: steps.append(saved_step(tmp_path / "model")))
    train(Start(plan, 0, tmp_path / "model"), ONE)
    assert steps == [0, 3, 6]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--set training.epochs=abc", "training.epochs: Input should be a valid integer"),
        ("--set trainig.epochs=3", "did you mean 'training'?"),
        ("--set training.epoch=3", "did you mean 'epochs'?"),
        ("--set training.loss=[dice", "--set training.loss: '[dice' is not YAML"),
        ("--set training.epochs", "--set takes training.KEY=VALUE"),
        ("--set network.depth=1", "the rest is part of the plan"),
        ("--set training.validation_overlap=1", "training.validation_overlap"),
        ("--device gpu", "did you mean cuda?"),
        ("--threads 0", "--threads must be 1 to"),
        ("--threads 99999999999999999999", "--threads must be 1 to"),
        ("--set training.seed=99999999999999999999", "training.seed: Input should be less than"),
        ("--resume", "nothing to resume"),
        ("--fold 7", "fold must be 0 to 1, got 7"),
    ],
)
def test_a_wrong_command_line_is_one_clear_message(
    plan: PlanFolder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    said: str,
) -> None:
    assert main(["train", str(plan.path), str(tmp_path / "model"), *words.split()]) == 1
    text = capsys.readouterr().err
    assert said in text and "Traceback" not in text
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("damage", [b'{"st', b"3\n", b"\xff\xfe\n", b"{}\n"])
def test_a_damaged_log_does_not_keep_a_training_from_going_on(
    plan: PlanFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        at_step(patch, 3, lambda: signal.raise_signal(signal.SIGINT))
        train(Start(plan, 0, tmp_path / "model"), ONE)
    with (tmp_path / "model" / "log.jsonl").open("ab") as file:
        file.write(damage)
    train(Start(plan, 0, tmp_path / "model", resume=True), ONE)
    assert [line["epoch"] for line in read_log(tmp_path / "model")] == [1, 2]
