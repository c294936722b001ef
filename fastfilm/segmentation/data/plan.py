"""Plan: a checked data set, and every decision that training needs.

PLAN/config.yaml        the configuration, complete
PLAN/plan.json          ``Plan``: preprocessing, dimensions, patch size, batch size, network
PLAN/cases.json         files and metadata of every case
PLAN/splits.json        folds of subjects
PLAN/fingerprint.json   what was measured
PLAN/cache/             preprocessed arrays, made by training
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from ..config.schema import (
    Config,
    config_text,
    problems,
    read_config,
)
from ..config.sections import MetadataKey
from ..metadata.encoder import MetadataEncoder
from ..models.network import build_network
from ..support.errors import Problems, UserError
from ..support.files import (
    atomic,
    json_text,
    read_json,
)
from ..support.lock import locked
from ..support.offline import refuse_fetching
from .checks import CaseFacts, check_cases
from .datasets import find_cases
from .decisions import (
    Plan,
    decide,
    demands,
)
from .metadata_checks import coverage, metadata_problems
from .sources import Case
from .splits import (
    Fold,
    make_splits,
    split_notes,
)


@dataclass
class PlanFolder:
    """A plan read from its folder."""

    path: Path
    config: Config
    plan: Plan
    cases: list[Case]
    folds: list[Fold]

    def cases_of(self, fold: int, part: str) -> list[Case]:
        """Cases of the subjects in ``part`` ("train", "val", "test") of a fold.

        Raises:
            UserError: no such fold.
        """
        if not 0 <= fold < len(self.folds):
            raise UserError(f"fold must be 0 to {len(self.folds) - 1}, got {fold}")
        subjects = set(self.folds[fold].get(part, []))
        return [c for c in self.cases if c.subject in subjects]

    @property
    def held_out(self) -> str:
        """The part of a fold that no training has seen: "test" where the splits have one, else "val"."""
        return "test" if all(fold.get("test") for fold in self.folds) else "val"

    def keys(self) -> dict[str, MetadataKey]:
        """The metadata keys, with that of the task where the task is metadata."""
        return metadata_keys(self.config)


def metadata_keys(config: Config) -> dict[str, MetadataKey]:
    """The keys that the network gets; in output mode "task" also the task's, which is never hidden or unknown."""
    keys = {name: key for name, key in config.metadata.items() if key.input}
    if config.output.mode == "task":
        keys[config.output.task_key] = MetadataKey(values=list(config.data.labels), dropout=0.0)
    return keys


def make_plan(
    config: Config,
    folder: Path,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> tuple[PlanFolder, list[str]]:
    """Checks the data set, decides, and writes the folder.

    Args:
        progress: gets the number of cases; what it returns is called after each.

    Returns:
        the plan, and notes (one line each) on things that are not wrong but worth knowing.

    Raises:
        Problems: everything that is wrong with the data set, in one message; nothing is written then.
        UserError: another process writes to the folder, or it cannot be written.
    """
    if os.path.exists(folder / "model.json"):
        raise UserError(f"{folder}: holds a model: write the plan to another folder")
    with locked(folder, "fastfilm plan"):
        return _make_plan(config, folder, progress)


def _make_plan(
    config: Config, folder: Path, progress: Callable[[int], Callable[[], None]]
) -> tuple[PlanFolder, list[str]]:
    found = find_cases(config)
    found.notes += _shared_labels(found.cases)
    facts, wrong, notes = check_cases(found.cases, config.data, progress(len(found.cases)))
    wrong = found.problems + wrong
    keys = metadata_keys(config)
    same, more = _identical(facts)
    notes = found.notes + notes + more
    folds, more = make_splits(found.cases, config.splits, config.metadata, same)
    wrong += more
    if found.cases:
        more, said = metadata_problems(found, folds, config)
        wrong += more
        notes += said
    if wrong:
        raise Problems(f"{config.data.root}: problems in the data set", wrong)
    if not facts:
        raise UserError(f"{config.data.root}: no case can be used")
    notes += split_notes(found.cases, folds, config.splits)
    for name in config.data.labels:
        empty = sum(f.voxels.get(name) == 0 for f in facts)
        absent = sum(name not in f.voxels for f in facts)
        if empty or absent:
            notes.append(f"label {name!r}: empty in {empty} cases, not annotated in {absent}")
    found.cases = [c.stamped() for c in found.cases]
    plan = decide(config, facts)
    wrong, more = demands(config, plan, facts)
    if wrong:
        raise Problems(f"{config.data.root}: problems in the data set", wrong)
    _build(config, plan, found.cases)
    notes += more
    notes += coverage(found, config)
    texts = {
        "config.yaml": config_text(config),
        "cases.json": json_text([c.to_json() for c in found.cases]),
        "splits.json": json_text(folds),
        "fingerprint.json": json_text(fingerprint(facts, keys)),
    }
    plan.files = {name: hashlib.sha256(t.encode()).hexdigest() for name, t in texts.items()}
    texts["plan.json"] = json_text(plan.model_dump(mode="json"))
    _write_together(folder, texts)
    return PlanFolder(folder, config, plan, found.cases, folds), notes


def _build(config: Config, plan: Plan, cases: Sequence[Case]) -> None:
    """The network once, so that settings that it cannot take are found now; UserError says which."""
    refuse_fetching(plan.network.arguments)
    labels, mode = len(config.data.labels), config.output.mode
    keys = {name: key for name, key in config.metadata.items() if key.input}
    encoder = MetadataEncoder.fit({c.id: c.metadata for c in cases}, keys)
    task = labels if mode == "task" else 0
    build_network(
        plan.network,
        spatial_dims=plan.spatial_dims,
        in_channels=len(plan.preprocessing.channels),
        out_channels=1 if task else labels + (mode == "classes"),
        metadata_size=encoder.size + task,
    )


def _write_together(folder: Path, texts: dict[str, str]) -> None:
    """All files, or, where one of them cannot be written, none; the last of ``texts`` is put in place last."""
    with contextlib.ExitStack() as stack:
        # an exit stack leaves in the opposite order
        for name in reversed(texts):
            stack.enter_context(atomic(folder / name)).write_text(texts[name], encoding="utf-8")


def read_plan(folder: Path) -> PlanFolder:
    """The plan in ``folder``.

    Raises:
        UserError: no plan, a damaged one, or files that were not written together (a re-plan that was interrupted,
            a file changed by hand).
    """
    if not (folder / "plan.json").is_file():
        raise UserError(f"{folder}: not a plan: it has no plan.json (made by fastfilm plan)")
    try:
        plan = Plan.model_validate(read_json(folder / "plan.json"))
    except ValidationError as error:
        raise Problems(
            f"{folder / 'plan.json'}: not a valid plan", problems(error, Plan)
        ) from error
    for name, digest in plan.files.items():
        try:
            there = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(
                f"{folder / name}: cannot be read: {error.strerror or error}"
            ) from error
        if there != digest:
            raise UserError(
                f"{folder / name}: is not the file that plan.json was written with (an interrupted fastfilm"
                " plan, or a change by hand): run fastfilm plan again; training.* and augmentation.* are changed"
                " with fastfilm train --set"
            )
    try:
        cases = [Case.from_json(c) for c in read_json(folder / "cases.json")]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'cases.json'}: not a list of cases: {error!r}") from error
    folds = read_json(folder / "splits.json")
    if not isinstance(folds, list) or not all(isinstance(f, dict) for f in folds):
        raise UserError(f"{folder / 'splits.json'}: not a list of folds")
    return PlanFolder(folder, read_config(folder / "config.yaml"), plan, cases, folds)


def fingerprint(facts: Sequence[CaseFacts], keys: dict[str, MetadataKey]) -> dict[str, Any]:
    """The data set in numbers: of each case, and medians."""
    return {
        "cases": [f.to_json() for f in facts],
        "median_shape": np.median([f.shape for f in facts], 0).tolist(),
        "median_spacing": np.median([f.spacing for f in facts], 0).tolist(),
        "orientations": sorted({f.orientation for f in facts}),
        "voxels": {
            name: int(sum(f.voxels.get(name, 0) for f in facts))
            for name in sorted({n for f in facts for n in f.voxels})
        },
        "metadata_keys": list(keys),
    }


def _shared_labels(cases: Sequence[Case]) -> list[str]:
    """A note on each label file that several subjects have."""
    users: dict[Path, dict[str, None]] = {}
    for case in cases:
        for path in case.labels.values():
            users.setdefault(path, {})[case.subject] = None
    return [
        f"{path} is the label of several subjects: {', '.join(subjects)}"
        for path, subjects in users.items()
        if len(subjects) > 1
    ]


def _identical(facts: Sequence[CaseFacts]) -> tuple[list[set[str]], list[str]]:
    """Subjects with the same voxels, and a note on each."""
    by_digest: dict[str, list[CaseFacts]] = {}
    for f in facts:
        by_digest.setdefault(f.digest, []).append(f)
    same, notes = [], []
    for group in by_digest.values():
        if len({f.subject for f in group}) > 1:
            same.append({f.subject for f in group})
            notes.append(
                f"{', '.join(f.id for f in group)}: identical images; kept in one part of every split"
            )
    return same, notes
