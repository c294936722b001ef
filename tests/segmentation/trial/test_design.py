"""The design of a trial: what it refuses, what it fixes, and what each arm trains."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("monai", reason="needs the extra [segmentation]")
pytest.importorskip("pydantic", reason="needs the extra [segmentation]")
pytest.importorskip("safetensors", reason="needs the extra [segmentation]")

from fastfilm.segmentation.config.schema import (
    Config,
    parse,
    read_config,
)
from fastfilm.segmentation.data.plan import PlanFolder
from fastfilm.segmentation.models.network import MetadataChannels, build_network
from fastfilm.segmentation.support.errors import Problems, UserError
from fastfilm.segmentation.trial.arms import arm_plan, fed_metadata
from fastfilm.segmentation.trial.design import Run, read_design, runs, selected
from fastfilm.segmentation.trial.folder import open_trial

from ...support.phantoms import settings, write_bids

ARMS = ["conditioned", "unconditioned", "shuffled", "channels", "encoder"]


@pytest.fixture(scope="module")
def bids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bids(tmp_path_factory.mktemp("bids"), count=6)


def config(bids: Path, **sections: Any) -> Config:
    return parse(settings(bids, **sections), "test")


@pytest.fixture(scope="module")
def opened(bids: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PlanFolder, Any]:
    out = tmp_path_factory.mktemp("trial") / "out"
    plan, design, _ = open_trial(config(bids, trial={"arms": ARMS}), out)
    return out, plan, design


def test_the_design_is_hashed_and_written_before_anything_is_trained(opened: Any) -> None:
    out, plan, design = opened
    assert read_design(out) == design
    assert not (out / "runs").exists()
    assert design["keys"] == {"tumor_type": "category"}
    assert design["seeds"] == [0, 1, 2] and design["folds"] == len(plan.folds)
    assert design["held_out"] == "val" and design["weights"] == "final"


def test_a_design_that_was_changed_by_hand_is_refused(opened: Any, tmp_path: Path) -> None:
    value = json.loads((opened[0] / "design.json").read_text())
    value["margin"] = 0.5
    (tmp_path / "design.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="changed after it was written"):
        read_design(tmp_path)


def test_every_arm_of_a_fold_and_seed_comes_before_the_next(opened: Any) -> None:
    listed = list(runs(opened[2]))
    assert [r.arm for r in listed[:5]] == ARMS
    assert {(r.fold, r.seed) for r in listed[:5]} == {(0, 0)}
    assert len(set(listed)) == len(ARMS) * opened[2]["folds"] * 3


def test_runs_are_selected_by_arm_fold_and_seed(opened: Any) -> None:
    found = selected(opened[2], ["shuffled"], [1], [2])
    assert found == [Run("shuffled", 1, 2)]
    for arguments, text in (
        ((["condition"],), "--arm condition: the design has .*did you mean"),
        (((), [9]), "--fold 9"),
        (((), (), [7]), "--seed 7: the design has 0, 1, 2"),
    ):
        with pytest.raises(UserError, match=text):
            selected(opened[2], *arguments)


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ({"training": {"learning_rate": 0.5}}, "config.training.learning_rate|learning_rate was"),
        ({"trial": {"arms": ARMS, "margin": 0.02}}, "trial.margin was 0.01, is 0.02"),
        ({"metadata": {"tumor_type": {"dropout": 0.3}}}, "metadata.tumor_type.dropout"),
    ],
)
def test_another_design_in_the_same_folder_is_refused_by_what_differs(
    bids: Path, opened: Any, section: Any, text: str
) -> None:
    with pytest.raises(UserError, match=f"a changed design is a new trial.*({text})"):
        open_trial(config(bids, **{"trial": {"arms": ARMS}, **section}), opened[0])


def test_settings_that_change_no_result_may_change(bids: Path, opened: Any) -> None:
    other = config(bids, trial={"arms": ARMS}, training={"workers": 1, "checkpoint_minutes": 1.0})
    plan, design, _ = open_trial(other, opened[0])
    assert plan.config.training.workers == 1
    assert design == opened[2]


def test_files_that_changed_since_the_design_are_named(bids: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bids"
    shutil.copytree(bids, copy)
    out = tmp_path / "out"
    open_trial(config(copy), out)
    images = sorted(copy.glob("sub-*/anat/*.nii.gz"))
    os.utime(images[0], (1, 1))
    open_trial(config(copy), out)
    shutil.copyfile(images[1], images[0])
    with pytest.raises(Problems, match=r"sub-00.*another image or label"):
        open_trial(config(copy), out)


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"metadata": []}, "nothing to compare"),
        ({"metadata": {"tumor_type": {"input": False}}}, "all with input: false"),
        ({"training": {"freeze": "all_but_generator"}}, "training.freeze"),
        ({"training": {"early_stopping": 3}}, "early_stopping: the held-out cases would choose"),
        ({"training": {"schedule": "plateau"}}, "plateau: the held-out cases would choose"),
        (
            {"network": {"conditioning": "channels"}, "trial": {"arms": [*ARMS[:2], "channels"]}},
            "is what network.conditioning is already",
        ),
        (
            {"network": {"conditioning": "channels"}, "trial": {"arms": [*ARMS[:2], "encoder"]}},
            "puts FiLM into the encoder",
        ),
    ],
)
def test_what_makes_no_trial_is_refused(
    bids: Path, tmp_path: Path, sections: Any, text: str
) -> None:
    with pytest.raises(Problems, match=text):
        open_trial(config(bids, **sections), tmp_path / "out")


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"trial": {"seeds": 1}}, "with one seed .* no result is an answer"),
        ({"trial": {"seeds": 2}}, "2 folds and 2 seeds make 4 pairs of networks, .*: 3 seeds"),
        (
            {"splits": {"column": "part", "folds": None}},
            "1 fold and 3 seeds make 3 pairs of networks, too few for p below 0.05; .*: 6 seeds",
        ),
        ({"splits": {"column": "part", "folds": None}}, "2 subjects are held out, too few"),
        (
            {
                "metadata": {"tumor_type": {"unseen": "unknown"}, "site": {"input": False}},
                "trial": {"cluster": "site"},
            },
            "site has 2 values among the held-out subjects, too few",
        ),
    ],
)
def test_a_trial_that_cannot_answer_is_refused(
    bids: Path, tmp_path: Path, sections: Any, text: str
) -> None:
    copy = tmp_path / "bids"
    shutil.copytree(bids, copy)
    table = copy / "participants.tsv"
    head, *rows = table.read_text().splitlines()
    more = [f"{row}\t{'val' if i < 2 else 'train'}\t{i % 2}" for i, row in enumerate(rows)]
    table.write_text("\n".join([f"{head}\tpart\tsite", *more]) + "\n")
    with pytest.raises(Problems, match=text):
        open_trial(config(copy, **sections), tmp_path / "out")


@pytest.mark.parametrize(
    "arms", [["conditioned"], ["conditioned", "shuffled"], [*ARMS, "shuffled"]]
)
def test_a_trial_needs_both_of_its_main_arms_once(bids: Path, arms: list[str]) -> None:
    with pytest.raises(Problems, match=r"trial\.arms"):
        config(bids, trial={"arms": arms})


def test_the_cluster_is_a_metadata_key(bids: Path) -> None:
    with pytest.raises(
        Problems, match=r"trial\.cluster: 'tumour_type' is no metadata key.*tumor_type"
    ):
        config(bids, trial={"cluster": "tumour_type"})


def test_arms_differ_in_the_metadata_alone(opened: Any) -> None:
    _, plan, _ = opened
    made = {arm: arm_plan(plan, Run(arm, 1, 2)) for arm in ARMS}  # type: ignore[arg-type]
    base = made["conditioned"]
    assert base.config.training.seed == 2 and plan.config.training.seed == 0
    for arm, own in made.items():
        assert own.folds == plan.folds and own.cases == plan.cases
        assert own.config.training == base.config.training
        assert own.config.data == base.config.data
        assert own.plan.preprocessing == base.plan.preprocessing
        assert own.plan.patch_size == base.plan.patch_size
        assert own.plan.batch_size == base.plan.batch_size
        assert bool(own.keys()) == (arm != "unconditioned")
    assert made["shuffled"].plan == base.plan
    assert made["channels"].plan.network.conditioning == "channels"
    depth = base.plan.network.depth
    assert made["encoder"].plan.network.film_layers == [1] * (depth + 1) + [0] * (depth + 1)
    for arm, own in made.items():
        size = 0 if arm == "unconditioned" else 4
        network = build_network(
            own.plan.network, spatial_dims=2, in_channels=1, out_channels=1, metadata_size=size
        )
        assert isinstance(network, MetadataChannels) == (arm == "channels")


def test_shuffled_metadata_are_a_permutation_of_rows_over_training_cases(opened: Any) -> None:
    _, plan, _ = opened
    rows = {}
    for seed in range(20):
        run = Run("shuffled", 0, seed)
        fed = fed_metadata(plan, run)
        assert fed is not None and fed == fed_metadata(plan, run)
        train = plan.cases_of(0, "train")
        assert list(fed) == [c.id for c in train]
        own = [str(c.metadata["tumor_type"]) for c in train]
        assert sorted(str(v["tumor_type"]) for v in fed.values()) == sorted(own)
        rows[seed] = [str(v["tumor_type"]) for v in fed.values()]
    assert len({tuple(r) for r in rows.values()}) >= 3
    assert fed_metadata(plan, Run("conditioned", 0, 0)) is None


def test_a_trial_is_not_made_in_a_plan(bids: Path, opened: Any) -> None:
    with pytest.raises(UserError, match=r"holds plan\.json"):
        open_trial(config(bids), opened[0] / "plan")


def test_a_configuration_file_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastfilm.__main__ import main

    assert main(["trial", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "expected a .yaml configuration" in capsys.readouterr().err


def test_the_budget_is_a_number_of_hours(
    bids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastfilm.__main__ import main

    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings(bids)))
    assert main(["trial", str(path), str(tmp_path / "out"), "--budget", "0"]) == 1
    assert "--budget must be a number of hours above 0" in capsys.readouterr().err


def test_the_example_of_the_guide_makes_a_trial(tmp_path: Path, monkeypatch: Any) -> None:
    from fastfilm.__main__ import main

    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "trial.md").read_text(encoding="utf-8")
    example = page.split("<!-- example: begin -->")[1].split("<!-- example: end -->")[0]
    text = example.split("```yaml\n")[1].split("```")[0]
    Path("trial.yaml").write_text(text, encoding="utf-8")
    assert main(["demo", "phantoms", "--only-data", "--quick"]) == 0
    plan, design, _ = open_trial(read_config("trial.yaml"), tmp_path / "out")
    assert len(plan.cases) == 9 and design["folds"] == 3 and design["seeds"] == [0, 1, 2]
