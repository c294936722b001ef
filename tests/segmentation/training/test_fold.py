"""Training: killed and resumed, in several processes, fine-tuned, stopped by what is not finite."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")


from fastfilm.ops.settings import environment
from fastfilm.segmentation.config.schema import parse
from fastfilm.segmentation.data.cache import cached
from fastfilm.segmentation.data.plan import (
    PlanFolder,
    make_plan,
    read_plan,
)
from fastfilm.segmentation.images.nifti import read_volume
from fastfilm.segmentation.models.folder import (
    load_model,
    read_info,
    save_weights,
)
from fastfilm.segmentation.models.network import build_network
from fastfilm.segmentation.prediction.one_case import predict
from fastfilm.segmentation.support.distributed import Processes
from fastfilm.segmentation.support.errors import Problems, UserError
from fastfilm.segmentation.support.files import read_tensors
from fastfilm.segmentation.training.fold import Start, train
from fastfilm.segmentation.training.record import read_log

from ...nn.test_distributed import on_two
from ...support.phantoms import (
    TYPES,
    settings,
    write_bids,
)

SLOW = environment.read("FASTFILM_SLOW_TESTS") == "1"
ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("bids"))


def planned(bids: Path, folder: Path, **sections: Any) -> PlanFolder:
    make_plan(parse(settings(bids, **sections), "test"), folder)
    return read_plan(folder)


def weights(folder: Path, name: str = "final") -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"{name}.safetensors")[0]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# everything that has state: dropout, an average, a schedule that depends on the Dice, gradient parts, balancing
STATEFUL: dict[str, Any] = {
    "network": {"dropout": 0.3, "norm": "batch"},
    "training": {
        "epochs": 3,
        "steps_per_epoch": 6,
        "ema": 0.9,
        "schedule": "plateau",
        "plateau_patience": 1,
        "balance": "tumor_type",
        "accumulate": 2,
        "checkpoint_steps": 2,
    },
}


def saved_step(folder: Path) -> int:
    """Of the state that a resumed training would start from."""
    last = folder / "last.safetensors"
    if not last.exists():
        return 0
    # the header through one open file: safe_open opens the path twice, and it may be replaced in between
    with last.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return int(json.loads(header["__metadata__"]["state"])["progress"]["step"])


def kill_and_resume(bids: Path, tmp_path: Path, kills: int, sections: dict[str, Any]) -> None:
    """Trains once undisturbed, and once with kill -9 at ``kills`` moments of chance."""
    plan = planned(bids, tmp_path / "plan", **sections)
    train(Start(plan, 0, tmp_path / "whole"), ONE)
    steps = saved_step(tmp_path / "whole")
    context = multiprocessing.get_context("fork")
    chance = random.Random(1)
    # in order; behind each there is something left to train
    moments = sorted(chance.sample(range(1, steps - 5), kills))
    for moment in moments:
        start = Start(plan, 0, tmp_path / "killed", resume=(tmp_path / "killed").exists())
        process = context.Process(target=train, args=(start, ONE))
        process.start()
        while saved_step(tmp_path / "killed") < moment and process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"training ended before step {moment}"
    train(Start(plan, 0, tmp_path / "killed", resume=True), ONE)
    for name in ("final", "best"):
        assert_equal(weights(tmp_path / "whole", name), weights(tmp_path / "killed", name))
    a, b = (read_log(tmp_path / name) for name in ("whole", "killed"))
    for line in (*a, *b):
        for key in ("seconds", "loader_wait", "validation_seconds"):
            line.pop(key)
    assert a == b and [line["epoch"] for line in a] == list(range(1, len(a) + 1))


def test_training_killed_twice_ends_with_the_weights_of_an_undisturbed_one(
    bids: Path, tmp_path: Path
) -> None:
    kill_and_resume(bids, tmp_path, 2, STATEFUL)


@pytest.mark.skipif(not SLOW, reason="half a minute; set FASTFILM_SLOW_TESTS=1 to run it")
@pytest.mark.parametrize("workers", [0, 2])
def test_training_killed_ten_times_ends_with_the_weights_of_an_undisturbed_one(
    bids: Path, tmp_path: Path, workers: int
) -> None:
    sections = {
        **STATEFUL,
        "training": {
            **STATEFUL["training"],
            "epochs": 12,
            "steps_per_epoch": 12,
            "workers": workers,
        },
    }
    kill_and_resume(bids, tmp_path, 10, sections)


def test_a_run_killed_while_it_writes_its_end_writes_it_when_resumed(
    bids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(bids, tmp_path / "plan", training={"early_stopping": 1, "min_delta": 0.9})
    train(Start(plan, 0, tmp_path / "whole"), ONE)
    steps = saved_step(tmp_path / "whole")

    def killed(folder: Path, name: str, state: Any, info: Any) -> None:
        if name == "final":
            (folder / ".writing-x").write_text("half")
            raise KeyboardInterrupt
        save_weights(folder, name, state, info)

    with monkeypatch.context() as patch:
        patch.setattr("fastfilm.segmentation.training.fold.loop.save_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train(Start(plan, 0, tmp_path / "model"), ONE)
    assert saved_step(tmp_path / "model") == steps
    assert not (tmp_path / "model" / "final.safetensors").exists()
    done = train(Start(plan, 0, tmp_path / "model", resume=True), ONE)
    assert done.finished and done.step == steps
    assert_equal(weights(tmp_path / "model"), weights(tmp_path / "whole"))
    assert not list((tmp_path / "model").glob(".writing-*"))


def test_workers_change_nothing(bids: Path, tmp_path: Path) -> None:
    plan = planned(bids, tmp_path / "plan")
    train(Start(plan, 0, tmp_path / "none"), ONE)
    plan.config.training.workers = 2
    train(Start(plan, 0, tmp_path / "two"), ONE)
    assert_equal(weights(tmp_path / "none"), weights(tmp_path / "two"))


def test_another_seed_changes_the_weights(bids: Path, tmp_path: Path) -> None:
    plan = planned(bids, tmp_path / "plan")
    train(Start(plan, 0, tmp_path / "a"), ONE)
    plan.config.training.seed = 1
    train(Start(plan, 0, tmp_path / "b"), ONE)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert any(not torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_two_processes_train_as_one_on_the_same_global_batch(
    bids: Path, tmp_path: Path, norm: str
) -> None:
    # some labels unknown, so that the processes' shares differ in how much is known
    plan = planned(bids, tmp_path / "plan", network={"norm": norm}, augmentation={"affine": 0.0})
    plan.cases[0].labels.clear()
    plan.config.training.learning_rate = 1e-4
    train(Start(plan, 0, tmp_path / "one"), ONE)

    def work(rank: int) -> float | None:
        # a Dice and a loss that every process agrees on
        return train(Start(plan, 0, tmp_path / "two"), Processes(rank, 2, torch.device("cpu"))).best

    best = on_two(work)
    assert best[0] == best[1]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        # Adam divides by the gradient's size: where that is rounding, so is the direction of a step
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5, msg=name)
    a, b = (read_log(tmp_path / name) for name in ("one", "two"))
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)


def test_a_training_is_not_overwritten_and_another_one_not_gone_on_with(
    bids: Path, tmp_path: Path
) -> None:
    plan = planned(bids, tmp_path / "plan", training={"epochs": 1, "steps_per_epoch": 1})
    train(Start(plan, 0, tmp_path / "model"), ONE)
    with pytest.raises(UserError, match="holds a training already"):
        train(Start(plan, 0, tmp_path / "model"), ONE)
    with pytest.raises(UserError, match="fold was 0, is 1"):
        train(Start(plan, 1, tmp_path / "model", resume=True), ONE)


def test_early_stopping_waits_from_the_last_better_epoch(bids: Path, tmp_path: Path) -> None:
    options = {"epochs": 9, "steps_per_epoch": 1, "early_stopping": 2, "min_delta": 0.9}
    plan = planned(bids, tmp_path / "plan", training=options)
    # the first validation sets the mark, none is better by 0.9, two epochs later it ends
    assert train(Start(plan, 0, tmp_path / "model"), ONE).epoch == 3


def test_a_loss_that_is_not_finite_stops_with_the_files_of_the_batch(
    bids: Path, tmp_path: Path
) -> None:
    plan = planned(bids, tmp_path / "plan", training={"batch_size": 2})
    cases = plan.cases_of(0, "train")
    bad = cached(cases, plan.config.data, plan.plan.preprocessing, plan.path / "cache")[0]
    image = np.load(bad.folder / "image.npy")
    np.save(bad.folder / "image.npy", np.full_like(image, np.nan))
    with pytest.raises(UserError) as error:
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert str(bad.case.images[0]) in str(error.value)
    assert all(str(c.images[0]) not in str(error.value) for c in cases if c != bad.case)
    assert "step" in str(error.value) and "nan" in str(error.value)


def test_fine_tuning_on_a_new_task_trains_the_generator_only(bids: Path, tmp_path: Path) -> None:
    task = {"output": {"mode": "task"}, "network": {"norm": "batch"}}
    old = planned(bids, tmp_path / "old", **task)
    train(Start(old, 0, tmp_path / "first"), ONE)
    new = planned(
        bids,
        tmp_path / "new",
        **task,
        data={"root": str(bids), "contrasts": ["FLAIR"], "labels": {"tumour": 1}},
        training={"freeze": "all_but_generator", "learning_rate": 0.01},
    )
    train(Start(new, 0, tmp_path / "second", init=tmp_path / "first"), ONE)
    info = read_info(tmp_path / "second")
    assert info.metadata.values("task") == ["lesion", "tumour"]
    assert [(x.name, x.value) for x in info.labels] == [("lesion", 1), ("tumour", 2)]
    a, b = weights(tmp_path / "first"), weights(tmp_path / "second")
    changed = {k for k in a if a[k].shape != b[k].shape or not torch.equal(a[k], b[k])}
    assert changed and all(k.startswith("film.") for k in changed)
    model = load_model(tmp_path / "second")
    assert model.tasks() == ["lesion", "tumour"]
    rows = np.concatenate([model.encode({"tumor_type": "x"}, t) for t in model.tasks()])
    assert model.probabilities(torch.zeros(2, 1, 16, 16), rows).shape == (2, 1, 16, 16)


FOREIGN = {
    "monai.networks.nets.BasicUNet": {
        "spatial_dims": "{dims}",
        "in_channels": "{in}",
        "out_channels": "{out}",
        "features": [4, 4, 4, 4, 4, 4],
    },
    "dynamic_network_architectures.architectures.unet.PlainConvUNet": {
        "input_channels": "{in}",
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.Conv2d",
        "kernel_sizes": 3,
        "strides": [1, 2],
        "n_conv_per_stage": 1,
        "num_classes": "{out}",
        "n_conv_per_stage_decoder": 1,
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm2d",
        "nonlin": "torch.nn.LeakyReLU",
        "deep_supervision": True,
    },
}


@pytest.mark.parametrize("target", FOREIGN)
def test_networks_of_other_libraries_train_and_load(
    bids: Path, tmp_path: Path, target: str
) -> None:
    pytest.importorskip(target.partition(".")[0], reason="another library")
    network = {"name": "condition", "target": target, "arguments": FOREIGN[target], "depth": None}
    plan = planned(
        bids,
        tmp_path / "plan",
        network=network,
        preprocessing={"patch_size": [32, 64]},
        training={"epochs": 1, "steps_per_epoch": 2},
    )
    train(Start(plan, 0, tmp_path / "model"), ONE)
    model = load_model(tmp_path / "model")
    image = torch.randn(1, 1, 32, 64)
    found = [model.probabilities(image, model.encode({"tumor_type": t})) for t in TYPES]
    # the generator has moved from γ = 1, β = 0: it was trained and saved
    assert not torch.equal(found[0], found[1])


def two_labels(_: Any, mask: Any) -> Any:
    """The target, and beside it a block of another label."""
    mask = mask.copy()
    mask[2:6, 2:6, 2:6] = 2
    return mask


FORMS: dict[str, dict[str, Any]] = {
    "classes": {"output": {"mode": "classes"}, "training": {"loss": ["dice", "focal"]}},
    "tasks of a case together": {
        "output": {"mode": "task", "tasks_per_case": "all"},
        "training": {"loss": ["tversky"], "balance": "label"},
    },
    "deep supervision in bfloat16": {
        "network": {"deep_supervision": True, "depth": 2},
        "training": {"precision": "bfloat16", "optimizer": "sgd", "schedule": "poly"},
    },
    "float16": {"training": {"precision": "float16", "learning_rate": 1e-4}},
    "volumes": {"preprocessing": {"dimensions": "3d", "patch_size": [8, 16, 16]}},
    "the 3D network": {
        "network": {"name": "Modified3DUNet"},
        "preprocessing": {"dimensions": "3d", "patch_size": [16, 16, 32]},
    },
    "without metadata": {"metadata": []},
    "sagittal slices of 1.5 mm, in parts": {
        "preprocessing": {
            "slice_axis": "sagittal",
            "spacing": [None, 1.5, 1.5],
            "patch_size": [8, 8],
        },
        "training": {"accumulate": 2, "channels_last": False, "clip_gradient": None},
    },
    "every augmentation": {
        "augmentation": {"elastic": 1.0, "low_resolution": 1.0, "flip": ["sagittal", "axial"]}
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_and_loads(tmp_path: Path, form: str) -> None:
    root = write_bids(tmp_path / "bids", count=4, labels=two_labels)
    sections = {
        "data": {"root": str(root), "labels": {"lesion": 1, "block": 2}},
        "training": {"epochs": 1, "steps_per_epoch": 2},
    }
    for name, section in FORMS[form].items():
        mapping = isinstance(section, dict)
        sections[name] = {**sections.get(name, {}), **section} if mapping else section
    plan = planned(root, tmp_path / "plan", **sections)
    done = train(Start(plan, 0, tmp_path / "model"), ONE)
    assert done.finished and done.best is not None and np.isfinite(done.best)
    model = load_model(tmp_path / "model")
    case = plan.cases_of(0, "val")[0]
    volume = read_volume(next(p for p in case.images if p is not None))
    prepared = model.preprocess([volume.array], volume.affine)
    values = {k: case.metadata[k] for k in model.metadata_keys()}
    found = predict(model, prepared, values, probabilities=True)
    assert found.probabilities is not None
    assert found.probabilities.shape == (2, *volume.array.shape)
    assert float(found.probabilities.min()) >= 0 and float(found.probabilities.max()) <= 1


def test_a_label_that_was_not_annotated_is_not_trained_as_background(tmp_path: Path) -> None:
    """Two tables that differ in whether a label is known where its file has none."""
    root = write_bids(tmp_path / "bids", count=4, labels=two_labels)
    table = root / "participants.tsv"
    rows = table.read_text().splitlines()
    biases = {}
    for name, annotated in (("all", "lesion;block"), ("some", "lesion")):
        lines = [rows[0] + "\tannotated"]
        lines += [f"{r}\t{annotated if i < 3 else 'lesion;block'}" for i, r in enumerate(rows[1:])]
        table.write_text("\n".join(lines) + "\n")
        plan = planned(
            root,
            tmp_path / f"plan-{name}",
            data={
                "labels": {"lesion": 1, "block": 2},
                "annotated_column": "annotated",
                "missing_labels": "mask",
            },
            splits={"folds": 4},
            training={"ema": None, "warmup_steps": 0},
        )
        fold = next(i for i, f in enumerate(plan.folds) if f["val"] == ["sub-03"])
        train(Start(plan, fold, tmp_path / name), ONE)
        biases[name] = weights(tmp_path / name)["last.bias"]
    fresh = load_model(tmp_path / "some").info
    torch.manual_seed(0)
    start = fresh.build().state_dict()["last.bias"]
    # nothing pulled the channel of a label that no training case has
    assert biases["some"][1] == start[1] and biases["some"][0] != start[0]
    assert biases["all"][1] != start[1]


def test_memory_stays_flat_over_epochs(bids: Path, tmp_path: Path) -> None:
    plan = planned(
        bids, tmp_path / "plan", training={"epochs": 30, "steps_per_epoch": 2, "workers": 1}
    )
    sizes: list[int] = []
    page = os.sysconf("SC_PAGE_SIZE")

    def resident(*_: Any) -> bool:
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
        return False

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastfilm.segmentation.training.fold.loop.say", resident)
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert len(sizes) == 30
    assert sizes[-1] - sizes[10] < 4 * 2**20, [s >> 20 for s in sizes]


def test_a_model_folder_cannot_name_any_function_there_is(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(UserError, match="not a fastfilm model"):
        load_model(tmp_path)
    config = parse(settings(tmp_path, network={"name": "condition", "target": "os.system"}), "test")
    with pytest.raises(UserError, match="target must begin with one of"):
        build_network(
            config.network, spatial_dims=2, in_channels=1, out_channels=1, metadata_size=1
        )


def test_metadata_that_do_not_encode_are_listed_before_training(bids: Path, tmp_path: Path) -> None:
    plan = planned(bids, tmp_path / "plan", metadata={"age": {"kind": "continuous"}})
    for case in plan.cases_of(0, "val"):
        case.metadata["age"] = "old"
    with pytest.raises(Problems) as error:
        train(Start(plan, 0, tmp_path / "model"), ONE)
    assert len(error.value.problems) == len(plan.cases_of(0, "val"))
    assert "'old'" in str(error.value) and not (tmp_path / "model").exists()
