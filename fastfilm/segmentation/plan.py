"""Plan: a checked data set, and every decision that training needs.

PLAN/config.yaml        the configuration, complete
PLAN/plan.json          ``Plan``: preprocessing, dimensions, patch size, batch size, network
PLAN/cases.json         files and metadata of every case
PLAN/splits.json        folds of subjects
PLAN/fingerprint.json   what was measured
PLAN/cache/             preprocessed arrays, made by training
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ValidationError

import fastfilm

from .checks import CaseFacts, check_cases
from .config import Config, MetadataKey, NetworkConfig, Section, problems, read_config, write_config
from .errors import Problems, UserError
from .files import read_json, write_json
from .metadata import MetadataEncoder, MetadataError
from .preprocessing import AXES, Normalisation, Preprocessing
from .sources import Case, find_cases
from .splits import Fold, make_splits

LARGEST_2D, LARGEST_3D = 512 * 512, 128**3
CPU_2D, CPU_3D = 256 * 256, 64**3
"""Voxels of a patch at most, on a GPU and without one."""

ASSUMED = 8 * 2**30
"""Bytes of memory where the system does not say."""

KEPT_MAPS = 24
"""Bytes a training step needs, in float32 maps of the first level (measured: 8 to 18)."""


class Plan(Section):
    """What ``plan`` decided."""

    fastfilm: str = fastfilm.__version__
    spatial_dims: Literal[2, 3]
    patch_size: list[int]
    batch_size: int
    network: NetworkConfig
    preprocessing: Preprocessing


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

    def keys(self) -> dict[str, MetadataKey]:
        """The metadata keys, with that of the task where the task is metadata."""
        return metadata_keys(self.config)


def metadata_keys(config: Config) -> dict[str, MetadataKey]:
    """The configured keys; in output mode "task" also the task's, which is never hidden or unknown."""
    keys = dict(config.metadata)
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
    """
    found = find_cases(config)
    facts, wrong = check_cases(found.cases, config.data, progress(len(found.cases)))
    wrong = found.problems + wrong
    keys = metadata_keys(config)
    same, notes = _identical(facts)
    folds, more = make_splits(found.cases, config.splits, config.metadata, same)
    wrong += more
    if found.cases:
        wrong += _metadata_problems(found.cases, folds, config)
    if wrong:
        raise Problems(f"{config.data.root}: problems in the data set", wrong)
    if not facts:
        raise UserError(f"{config.data.root}: no case can be used")
    for name in config.data.labels:
        empty = sum(f.voxels.get(name) == 0 for f in facts)
        absent = sum(name not in f.voxels for f in facts)
        if empty or absent:
            notes.append(f"label {name!r}: empty in {empty} cases, not annotated in {absent}")
    plan = decide(config, facts)
    write_config(config, folder / "config.yaml")
    write_json(folder / "cases.json", [c.to_json() for c in found.cases])
    write_json(folder / "splits.json", folds)
    write_json(folder / "fingerprint.json", fingerprint(facts, keys))
    write_json(folder / "plan.json", plan.model_dump(mode="json"))
    return PlanFolder(folder, config, plan, found.cases, folds), notes


def read_plan(folder: Path) -> PlanFolder:
    """The plan in ``folder``; UserError if it is not one."""
    if not (folder / "plan.json").is_file():
        raise UserError(f"{folder}: not a plan: it has no plan.json (made by fastfilm plan)")
    try:
        plan = Plan.model_validate(read_json(folder / "plan.json"))
    except ValidationError as error:
        raise Problems(f"{folder / 'plan.json'}: not a valid plan", problems(error)) from error
    try:
        cases = [Case.from_json(c) for c in read_json(folder / "cases.json")]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'cases.json'}: not a list of cases: {error!r}") from error
    return PlanFolder(
        folder, read_config(folder / "config.yaml"), plan, cases, read_json(folder / "splits.json")
    )


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


def decide(config: Config, facts: Sequence[CaseFacts]) -> Plan:
    """Dimensions, spacing, normalisation, patch, depth and batch size from the fingerprint."""
    p = config.preprocessing
    spacings = np.array([f.spacing for f in facts])
    median = np.median(spacings, 0)
    if p.spacing in ("auto", "keep", "median"):
        spread = spacings.max(0) - spacings.min(0)
        varies = [p.spacing == "median" or (p.spacing == "auto" and s > 0.1 * m)
                  for s, m in zip(spread, median, strict=True)]  # fmt: skip
        target: list[float | None] = [
            float(m) if v else None for m, v in zip(median, varies, strict=True)
        ]
    else:
        target = [s for s in p.spacing if not isinstance(s, str)]
    now = [t or float(m) for t, m in zip(target, median, strict=True)]
    shapes = (
        np.array([f.shape for f in facts])
        * spacings
        / np.where([t is None for t in target], spacings, now)
    )
    shape = np.median(shapes, 0)
    thick = int(np.argmax(now))
    axis = thick if now[thick] > 1.5 * np.median(now) else 2
    if p.slice_axis != "auto":
        axis = AXES.index(p.slice_axis)
    if p.dimensions == "auto":
        dims = 3 if shape.min() >= 24 and max(now) <= 3 * min(now) else 2
    else:
        dims = 3 if p.dimensions == "3d" else 2
    if dims == 2:
        # slices are what they are
        target[axis] = None
    order = [axis, *(a for a in range(3) if a != axis)]
    size = [float(shape[a]) for a in order][3 - dims :]
    network, patch = _network_and_patch(config, size, dims)
    channels = 1 if config.data.combine == "samples" else len(config.data.contrasts)
    preprocessing = Preprocessing(
        slice_axis=axis,
        spacing=(target[0], target[1], target[2]),
        channels=[_normalisation(config, facts, c) for c in range(channels)],
        crop=p.crop == "nonzero",
    )
    batch = config.training.batch_size or _batch_size(network, patch, dims)
    return Plan(
        spatial_dims=dims,
        patch_size=patch,
        batch_size=batch,
        network=network,
        preprocessing=preprocessing,
    )


def _network_and_patch(
    config: Config, size: list[float], dims: int
) -> tuple[NetworkConfig, list[int]]:
    """The network with its depth, and a patch size that it takes."""
    network, wanted = config.network, config.preprocessing.patch_size
    if wanted is not None and len(wanted) != dims:
        raise UserError(f"preprocessing.patch_size needs {dims} numbers, got {wanted}")
    smallest = min(wanted or size)
    if network.name == "FiLMedUNet" and network.depth is None:
        # at least 4 voxels at the bottom, at most 4 poolings (2D: 5)
        depth = int(np.clip(np.log2(max(smallest, 1) / 4), 1, 6 - dims + 1))
        network = network.model_copy(update={"depth": depth})
    step = {"Modified3DUNet": 16, "condition": 32}.get(network.name, 2 ** (network.depth or 1))
    if wanted is not None:
        if network.name == "Modified3DUNet" and any(n % step for n in wanted):
            raise UserError(f"Modified3DUNet needs patch sizes divisible by 16, got {wanted}")
        if min(wanted) < step:
            raise UserError(f"preprocessing.patch_size must be at least {step}, got {wanted}")
        if max(wanted) == step:
            raise UserError(
                f"preprocessing.patch_size: at {wanted} one voxel is left at the bottom of the network;"
                f" one side must be larger than {step}"
            )
        return network, list(wanted)
    patch = [max(step, int(np.ceil(n / step)) * step) for n in size]
    gpu = torch.cuda.is_available()
    most = {2: LARGEST_2D if gpu else CPU_2D, 3: LARGEST_3D if gpu else CPU_3D}[dims]
    while np.prod(patch) > most and max(patch) > step:
        patch[int(np.argmax(patch))] -= step
    if max(patch) == step:
        # a norm over one voxel is none
        patch[-1] *= 2
    return network, patch


def _batch_size(network: NetworkConfig, patch: list[int], dims: int) -> int:
    """As many as half of the memory at hand holds; at most 16 slices or 4 volumes."""
    if torch.cuda.is_available():
        memory = torch.cuda.mem_get_info()[0]
    else:
        try:
            memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):  # not Linux
            memory = ASSUMED
    sample = KEPT_MAPS * 4 * network.base_filters * int(np.prod(patch))
    return int(np.clip(memory // 2 // sample, 1, 16 if dims == 2 else 4))


def _normalisation(config: Config, facts: Sequence[CaseFacts], channel: int) -> Normalisation:
    p = config.preprocessing
    there = [i for f in facts if (i := f.intensities[channel]) is not None]
    kind = p.normalisation
    if kind == "auto":
        # Hounsfield units: integers with air at -1000
        lowest = float(np.median([i["lowest"] for i in there])) if there else 0.0
        kind = "ct" if lowest <= -500 and all(f.integers for f in facts) else "zscore"
    if kind != "ct":
        return Normalisation(kind=kind, nonzero=p.nonzero)
    inside = np.concatenate([f.inside[channel] for f in facts]).astype(np.float64)
    if inside.size == 0:
        raise UserError("normalisation 'ct' needs labelled voxels to take its constants from")
    low, high = np.percentile(inside, (0.5, 99.5))
    clipped = np.clip(inside, low, high)
    return Normalisation(
        kind="ct",
        low=float(low),
        high=float(high),
        mean=float(clipped.mean()),
        std=float(clipped.std()) or 1.0,
    )


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


def _metadata_problems(cases: Sequence[Case], folds: Sequence[Fold], config: Config) -> list[str]:
    """What the encoder of any fold would refuse."""
    rows = {c.id: c.metadata for c in cases}
    try:
        MetadataEncoder.fit(rows, config.metadata)
    except Problems as error:
        return error.problems
    wrong: dict[str, None] = {}
    for k, fold in enumerate(folds):
        train = {c.id: c.metadata for c in cases if c.subject in set(fold["train"])}
        others = [c for c in cases if c.id not in train]
        try:
            encoder = MetadataEncoder.fit(train, config.metadata)
        except Problems as error:
            wrong |= dict.fromkeys(f"fold {k}: {p}" for p in error.problems)
            continue
        for case in others:
            try:
                encoder.encode(case.metadata)
            except MetadataError as error:
                hint = (
                    "; splits.stratify spreads values over the folds, unseen: unknown accepts them"
                )
                wrong[f"fold {k}: {case.id}: {error}{hint}"] = None
    return list(wrong)
