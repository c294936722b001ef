"""What is written in which order while training, and that what is written is what was trained."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.config.sections import Training
from fastfilm.segmentation.data.plan import (
    PlanFolder,
    make_plan,
    read_plan,
)
from fastfilm.segmentation.support.distributed import Processes
from fastfilm.segmentation.support.files import read_tensors
from fastfilm.segmentation.training import loop as trainer
from fastfilm.segmentation.training.checkpoint import State, seed_step
from fastfilm.segmentation.training.fold import Start, train
from fastfilm.segmentation.training.optimisation import (
    Average,
    Progress,
    make_optimizer,
)
from fastfilm.segmentation.training.validation import Validated

from ...support.phantoms import settings, write_bids

ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("bids"), count=4)


def planned(bids: Path, folder: Path, **sections: Any) -> PlanFolder:
    make_plan(parse(settings(bids, **sections), "test"), folder)
    return read_plan(folder)


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"{name}.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def improving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every validation is better than the one before."""
    dice = iter(range(1, 100))

    def validate(*_: Any, **__: Any) -> Validated:
        found = next(dice) / 100
        return Validated(found, {"lesion": found})

    monkeypatch.setattr(trainer, "validate", validate)


@pytest.mark.usefixtures("improving")
@pytest.mark.parametrize("name", ["best", "final"])
def test_the_state_says_that_weights_are_written_only_behind_them(
    bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plan = planned(bids, tmp_path / "plan", training={"epochs": 3, "steps_per_epoch": 1})
    save, calls = trainer.save_weights, []

    def killed(folder: Path, which: str, *rest: Any) -> None:
        calls.append(which)
        if which == name and calls.count("best") == {"best": 2, "final": 3}[name]:
            raise KeyboardInterrupt
        save(folder, which, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train(Start(plan, 0, tmp_path / "model"), ONE)
    header = read_tensors(tmp_path / "model" / "last.safetensors")[1]
    progress = json.loads(header["state"])["progress"]
    assert not progress["finished"]
    assert progress["best_epoch"] == {"best": 1, "final": 3}[name]
    assert train(Start(plan, 0, tmp_path / "model", resume=True), ONE).best_epoch == 3
    assert same(tensors(tmp_path / "model", "best"), tensors(tmp_path / "model", "final"))


def below(folder: Path, part: str) -> dict[str, torch.Tensor]:
    state = tensors(folder, "last")
    return {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}


@pytest.mark.usefixtures("improving")
def test_the_averaged_weights_are_what_is_saved_and_start_warm(bids: Path, tmp_path: Path) -> None:
    options = {
        "epochs": 1,
        "steps_per_epoch": 1,
        "ema": 0.99,
        "learning_rate": 0.1,
        "warmup_steps": 0,
    }
    plan = planned(bids, tmp_path / "plan", training=options)
    train(Start(plan, 0, tmp_path / "model"), ONE)
    network, average = (below(tmp_path / "model", p) for p in ("network/", "average/"))
    assert not same(network, average)
    for name in ("best", "final"):
        assert same(tensors(tmp_path / "model", name), average)
    plan.config.training.learning_rate = 1e-30
    train(Start(plan, 0, tmp_path / "start"), ONE)
    start = below(tmp_path / "start", "network/")
    for k, v in average.items():
        # a tenth of the start is left behind the first step
        torch.testing.assert_close(
            v, start[k] + 0.9 * (network[k] - start[k]), rtol=1e-4, atol=1e-5
        )


def test_steps_are_taken_at_the_scheduled_rate(
    bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of 0 leaves the weights where they were."""
    monkeypatch.setattr(trainer, "learning_rate", lambda *_: 0.0)
    found = []
    for steps in (1, 3):
        plan = planned(
            bids, tmp_path / f"plan{steps}", training={"epochs": 1, "steps_per_epoch": steps}
        )
        train(Start(plan, 0, tmp_path / f"model{steps}"), ONE)
        found.append(tensors(tmp_path / f"model{steps}", "final"))
    assert same(*found)


def test_gradients_are_clipped_at_their_own_size_in_float16(
    bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that they are multiplied by the scale of the loss, 65536."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def recorded(parameters: Any, limit: float) -> torch.Tensor:
        norms.append(clip(parameters, limit))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    options = {"epochs": 1, "steps_per_epoch": 3, "precision": "float16", "learning_rate": 1e-4}
    plan = planned(bids, tmp_path / "plan", training=options)
    train(Start(plan, 0, tmp_path / "model"), ONE)
    finite = [float(n) for n in norms if n.isfinite()]
    assert len(norms) == 3 and finite and max(finite) < 1000


@pytest.mark.parametrize("flat", [False, True])
def test_samples_are_changed_in_their_plane_where_slices_are_thick(
    bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flat: bool
) -> None:
    seen, augment = [], trainer.Augment

    def recorded(*arguments: Any, **options: Any) -> Any:
        seen.append(options["flat"])
        return augment(*arguments, **options)

    monkeypatch.setattr(trainer, "is_flat", lambda spacings: flat)
    monkeypatch.setattr(trainer, "Augment", recorded)
    plan = planned(bids, tmp_path / "plan", training={"epochs": 1, "steps_per_epoch": 1})
    train(Start(plan, 0, tmp_path / "model"), ONE)
    assert seen == [flat]


def state(seed: int) -> State:
    """After three steps; the scale of the loss has changed too."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    made = State(
        network=net,
        optimizer=make_optimizer(net, Training()),
        progress=Progress(),
        average=Average(net, 0.9),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**seed, enabled=True),
    )
    assert made.average is not None
    for step in range(3):
        made.optimizer.zero_grad()
        made.scaler.scale(net(torch.randn(2, 1, 5, 5)).square().sum()).backward()
        made.scaler.step(made.optimizer)
        made.scaler.update()
        made.average.update(net, step)
    return made


def held(made: State) -> dict[str, Any]:
    """Everything in it, as plain values."""
    assert made.average is not None
    optimizer = made.optimizer.state_dict()["state"]
    parts = {"network": made.network.state_dict(), "average": made.average.state}
    parts |= {f"optimizer {i}": dict(entries) for i, entries in optimizer.items()}
    plain = {
        f"{k} {n}": torch.as_tensor(v).tolist() for k, p in parts.items() for n, v in p.items()
    }
    return plain | {"progress": vars(made.progress), "scaler": made.scaler.state_dict()}


def test_a_saved_state_comes_back_whole(tmp_path: Path) -> None:
    saved, other = state(3), state(5)
    for i, field in enumerate(dataclasses.fields(Progress)):
        setattr(saved.progress, field.name, True if field.name == "finished" else i + 1)
    differing = [k for k, v in held(saved).items() if held(other)[k] != v]
    assert {k.split()[0] for k in differing} == {
        "network",
        "average",
        "optimizer",
        "progress",
        "scaler",
    }
    saved.save(tmp_path, {"seed": 1})
    other.load(tmp_path, {"seed": 1})
    assert held(other) == held(saved)


def test_random_numbers_differ_between_seeds_steps_and_processes() -> None:
    drawn = set()
    for seed, step, rank in itertools.product(range(3), range(5), range(4)):
        for _ in range(2):
            seed_step(seed, step, rank)
            drawn.add(float(torch.rand(())))
    assert len(drawn) == 3 * 5 * 4
