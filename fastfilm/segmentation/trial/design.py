"""The design of a trial: all that decides its result, written and hashed before the first training step.

OUT/plan/          the plan that every arm is trained on
OUT/design.json    arms, folds, seeds, endpoint, test, margin, configuration, splits, and the hash of all of it
OUT/runs/ARM/fold-K/seed-S/    one trained network: model/, and scores.json of its held-out cases
OUT/audit.json, results.json, report.html    made when every network is there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.schema import Config, decisive
from ..config.sections import Arm
from ..data.plan import PlanFolder
from ..support.errors import Problems, UserError
from ..support.files import read_json, write_json
from ..support.hints import did_you_mean
from . import nnunet_data
from .scoring import cluster_of
from .statistics import MINIMUM

NAME = "design.json"

FORMAT = 1

ALPHA = 0.05
"""Level of the tests, two-sided; intervals have 1 - ALPHA."""

ENDPOINT = (
    "mean over the held-out cases of each case's Dice, which is the mean over its labels; a label that is empty in"
    " truth and prediction has none"
)

TEST = (
    "paired difference conditioned - unconditioned, two-sided: the largest p of Student's t with a standard error"
    " clustered by subject (or cluster) and training run, and of two sign-flip permutation tests, over training"
    " runs (fold and seed) and over subjects (or clusters)"
)


@dataclass(frozen=True)
class Run:
    """One network of a trial."""

    arm: Arm
    fold: int
    seed: int

    @property
    def path(self) -> Path:
        """Its folder, below the trial's."""
        return Path("runs", self.arm, f"fold-{self.fold}", f"seed-{self.seed}")

    def __str__(self) -> str:
        return f"{self.arm}, fold {self.fold}, seed {self.seed}"


def check_config(config: Config) -> None:
    """Refuses a configuration that no trial can be made of.

    Raises:
        Problems: everything that is wrong with it.
    """
    wrong = []
    if not any(key.input for key in config.metadata.values()):
        wrong.append(
            "metadata: the network gets none (no key, or all with input: false), so there is nothing to compare"
        )
    if config.training.freeze != "none":
        wrong.append(
            "training.freeze: the networks of a trial start anew, so nothing can stay as it is"
        )
    if "encoder" in config.trial.arms and config.network.conditioning == "channels":
        wrong.append(
            "trial.arms: 'encoder' puts FiLM into the encoder, and network.conditioning is channels"
        )
    if "channels" in config.trial.arms and config.network.conditioning == "channels":
        wrong.append("trial.arms: 'channels' is what network.conditioning is already")
    wrong += nnunet_data.config_problems(config)
    if wrong:
        raise Problems("the configuration does not make a trial", wrong)


def check_plan(plan: PlanFolder) -> None:
    """Refuses splits under which held-out cases would choose the weights, and too few folds, seeds or subjects.

    Raises:
        Problems: everything that is wrong.
    """
    training, wrong = plan.config.training, []
    part = plan.held_out
    if part == "val":
        hint = "the held-out cases would choose the weights; splits.nested keeps subjects for that"
        if training.early_stopping is not None:
            wrong.append(f"training.early_stopping: {hint}")
        if training.schedule == "plateau":
            wrong.append(f"training.schedule plateau: {hint}")
    for k, fold in enumerate(plan.folds):
        for name in ("train", part):
            if not plan.cases_of(k, name):
                wrong.append(f"fold {k}: no case is in its part {name!r} ({fold.get(name, [])})")
    wrong += nnunet_data.plan_problems(plan)
    wrong += _unanswerable(plan, part)
    if wrong:
        raise Problems("the plan does not make a trial", wrong)


def _unanswerable(plan: PlanFolder, part: str) -> list[str]:
    """Why no result of the trial could say "use it"; found before hours are spent on it."""
    seeds, folds, wrong = plan.config.trial.seeds, len(plan.folds), []
    if seeds == 1:
        wrong.append(
            "trial.seeds: with one seed the noise of training is not known, and no result is an answer; 3 is usual"
        )
    elif folds * seeds < MINIMUM:
        wrong.append(
            f"trial.seeds: {folds} {'fold' if folds == 1 else 'folds'} and {seeds} seeds make {folds * seeds}"
            f" pairs of networks, too few for p below {ALPHA}; {MINIMUM} are the least:"
            f" {-(-MINIMUM // folds)} seeds"
        )
    cases = {c.id: c for k in range(folds) for c in plan.cases_of(k, part)}.values()
    subjects = len({c.subject for c in cases})
    if subjects < MINIMUM:
        wrong.append(
            f"{subjects} subjects are held out, too few for an answer; {MINIMUM} are the least"
        )
    name = plan.config.trial.cluster
    if name is not None:
        values = {cluster_of(plan, c) for c in cases}
        if len(values) < MINIMUM:
            wrong.append(
                f"trial.cluster: {name} has {len(values)} values among the held-out subjects, too few for p below"
                f" {ALPHA}; {MINIMUM} are the least (splits.leave_out: {name} asks about {name} in another way)"
            )
    return wrong


def design(plan: PlanFolder) -> dict[str, Any]:
    """What design.json holds."""
    config = plan.config
    part = plan.held_out
    first, count = config.training.seed, config.trial.seeds
    value = {
        "format": FORMAT,
        "arms": list(config.trial.arms),
        "folds": len(plan.folds),
        "seeds": list(range(first, first + count)),
        "margin": config.trial.margin,
        "alpha": ALPHA,
        "cluster": config.trial.cluster,
        "labels": list(config.data.labels),
        "keys": {n: k.kind for n, k in config.metadata.items() if k.input},
        "kinds": {n: k.kind for n, k in config.metadata.items()},
        "endpoint": ENDPOINT,
        "test": TEST,
        "held_out": part,
        "weights": "best" if part == "test" else "final",
        "cases": len(plan.cases),
        "subjects": len({c.subject for c in plan.cases}),
        "network": plan.plan.network.model_dump(mode="json"),
        "patch_size": plan.plan.patch_size,
        "batch_size": plan.plan.batch_size,
        "config": decisive(config),
        "splits": plan.folds,
        "data": plan.plan.files["fingerprint.json"],
    }
    if nnunet_data.asked(config):
        value["nnunet"] = nnunet_data.settings(plan)
    return {**value, "sha256": digest(value)}


def digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the hash itself."""
    kept = {k: v for k, v in value.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_design(out: Path) -> dict[str, Any]:
    """design.json of a trial.

    Raises:
        UserError: there is none, or it was changed by hand.
    """
    path = out / NAME
    if not path.is_file():
        raise UserError(f"{out}: not a trial: it has no {NAME} (made by fastfilm trial)")
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not the design of a trial of this version of fastfilm")
    if value.get("sha256") != digest(value):
        raise UserError(
            f"{path}: was changed after it was written; a changed design is a new trial"
        )
    return value


def fix_design(out: Path, plan: PlanFolder) -> dict[str, Any]:
    """The trial's design: written if there is none yet, else compared with the one that is there.

    Raises:
        UserError: the one that is there is another one; what differs is named.
    """
    now = design(plan)
    if not (out / NAME).is_file():
        write_json(out / NAME, now)
        return now
    there = read_design(out)
    if there["sha256"] != now["sha256"]:
        raise UserError(
            f"{out / NAME}: a changed design is a new trial, in a folder of its own; what differs: "
            + "; ".join(differences(there, now)[:5])
        )
    return there


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """The entries that differ, nested ones with dots between their names."""
    found: list[str] = []
    for key in [*before, *(k for k in now if k not in before)]:
        a, b = before.get(key), now.get(key)
        if a == b or key == "sha256":
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{at}{key}.")
        elif key in ("data", "splits"):
            found.append(f"{key}: not the same")
        else:
            found.append(f"{at}{key} was {a!r}, is {b!r}")
    return found


def runs(design: Mapping[str, Any]) -> Iterator[Run]:
    """Every network of a trial: all arms of a fold and seed one after the other, so that pairs come early."""
    for seed in design["seeds"]:
        for fold in range(design["folds"]):
            for arm in design["arms"]:
                yield Run(arm, fold, seed)


def selected(
    design: Mapping[str, Any],
    arms: Sequence[str] = (),
    folds: Sequence[int] = (),
    seeds: Sequence[int] = (),
) -> list[Run]:
    """The runs of the arms, folds and seeds that are asked for; an empty selection takes all.

    Raises:
        UserError: an arm, fold or seed that the design has not.
    """
    there: dict[str, list[Any]] = {
        "--arm": design["arms"],
        "--fold": list(range(design["folds"])),
        "--seed": design["seeds"],
    }
    asked: dict[str, Sequence[Any]] = {"--arm": arms, "--fold": folds, "--seed": seeds}
    for option, known in there.items():
        for value in asked[option]:
            if value not in known:
                hint = did_you_mean(value, known) if isinstance(value, str) else ""
                raise UserError(
                    f"{option} {value}: the design has {', '.join(map(str, known))}{hint}"
                )
    return [
        r
        for r in runs(design)
        if (not arms or r.arm in arms)
        and (not folds or r.fold in folds)
        and (not seeds or r.seed in seeds)
    ]
