"""The plan's cases, folds and metadata as nnU-Net reads them, and what nnU-Net cannot take.

OUT/nnunet/raw/Dataset001_fastfilm/    imagesTr, labelsTr, dataset.json
OUT/nnunet/cases.json                  nnU-Net's name of a case -> the plan's; written last
"""

from __future__ import annotations

import csv
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fastfilm.ops.settings import environment

from ..config.schema import Config
from ..data.plan import PlanFolder
from ..data.sources import Case
from ..images.nifti import (
    ORTHOGONAL,
    NiftiVolume,
    read_volume,
    shear,
)
from ..metadata.encoder import (
    KeyEncoder,
    MetadataEncoder,
    as_category,
    is_missing,
)
from ..support.errors import Problems, UserError
from ..support.files import atomic, write_json
from ..support.lock import locked
from ..support.names import file_name
from .scoring import truths

ARMS = ("nnunet", "nnunet_conditioned")

FOLDER = "nnunet"
"""Of the trial: what the runs of both arms share."""

DATASET = "Dataset001_fastfilm"

ENDING = ".nii.gz"

CASES = "cases.json"

KINDS = ("category", "continuous")
"""Of metadata, those that the conditioned trainer takes."""


def installed() -> bool:
    """Whether nnU-Net is."""
    return importlib.util.find_spec("nnunetv2") is not None


def asked(config: Config) -> list[str]:
    """The arms of nnU-Net that the trial has."""
    return [arm for arm in config.trial.arms if arm in ARMS]


def config_problems(config: Config) -> list[str]:
    """One line for everything in the configuration that keeps nnU-Net from being an arm."""
    arms = asked(config)
    if not arms:
        return []
    wrong = []
    if not installed():
        wrong.append(
            f"trial.arms: {arms[0]!r} needs nnU-Net, which is not installed: pip install nnunetv2"
        )
    if "nnunet" not in arms:
        wrong.append(
            "trial.arms: 'nnunet_conditioned' needs 'nnunet', the network that it is compared with"
        )
    if config.output.mode == "task":
        wrong.append(
            "output.mode task: nnU-Net segments all labels at once (mode channels or classes)"
        )
    if config.data.combine == "samples" and len(config.data.contrasts) > 1:
        wrong.append(
            "data.combine samples: the contrasts are channels in nnU-Net, not cases of their own"
        )
    if "nnunet_conditioned" in arms:
        for name, key in config.metadata.items():
            if key.input and key.kind not in KINDS:
                wrong.append(
                    f"metadata.{name}.kind {key.kind}: 'nnunet_conditioned' takes {' and '.join(KINDS)}"
                )
            elif key.input and key.kind == "continuous" and key.scaling == "bins":
                wrong.append(
                    f"metadata.{name}.scaling bins: 'nnunet_conditioned' takes standardise and log"
                )
    return wrong


def plan_problems(plan: PlanFolder) -> list[str]:
    """One line for each case that nnU-Net cannot take, by what the plan says of it."""
    if not asked(plan.config):
        return []
    wrong = []
    for case in plan.cases:
        without = [
            c for c, p in zip(plan.config.data.contrasts, case.images, strict=False) if p is None
        ]
        if without:
            wrong.append(
                f"{case.id}: without the contrast {', '.join(without)}; nnU-Net needs every channel"
                " (data.missing_contrast: skip leaves such cases out)"
            )
        absent = [name for name in plan.config.data.labels if name not in case.labels]
        if absent:
            wrong.append(
                f"{case.id}: {', '.join(absent)} not annotated; nnU-Net takes that for background"
                " (data.missing_labels: skip leaves such cases out)"
            )
    return wrong


def settings(plan: PlanFolder) -> dict[str, Any]:
    """What the design says of nnU-Net: its version, and all that the environment changes of a training."""
    return {
        "version": version("nnunetv2"),
        "configuration": configuration(plan),
        "epochs": _count("FASTFILM_NNUNET_EPOCHS"),
        "iterations": _count("FASTFILM_NNUNET_ITERATIONS"),
        "where": environment.read("FASTFILM_NNUNET_WHERE") or "decoder",
    }


def _count(name: str) -> int | None:
    text = environment.read(name)
    return None if text is None else int(text)


def configuration(plan: PlanFolder) -> str:
    """nnU-Net's configuration for slices or volumes."""
    return "2d" if plan.plan.spatial_dims == 2 else "3d_fullres"


def names(plan: PlanFolder) -> dict[str, str]:
    """Case -> its name in nnU-Net, a number by its place in the plan.

    The case's own name will not do: nnU-Net gives ends of names a meaning (``_seg``, ``_0000``).
    """
    return {case.id: f"case_{i:05d}" for i, case in enumerate(plan.cases)}


def write_data_set(
    plan: PlanFolder,
    out: Path,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> None:
    """The plan's cases as a data set of nnU-Net in OUT/nnunet/raw, unless it is there.

    Images are links where nnU-Net reads them as the plan does, else copies. Labels are merged: 1 is the first of
    the configuration.

    Raises:
        Problems: labels that overlap, axes that are not at right angles; no data set is left behind then.
        Busy: another process writes it.
    """
    folder = out / FOLDER
    if (folder / CASES).is_file():
        return
    with locked(folder, "fastfilm trial"):
        if (folder / CASES).is_file():
            return
        data = folder / "raw" / DATASET
        shutil.rmtree(folder / "raw", ignore_errors=True)
        for name in ("imagesTr", "labelsTr"):
            (data / name).mkdir(parents=True)
        wrong, done = [], progress(len(plan.cases))
        for case, name in zip(plan.cases, names(plan).values(), strict=True):
            try:
                _write_case(plan, case, data, name)
            except UserError as error:
                wrong.append(f"{case.id}: {error}")
            done()
        if wrong:
            shutil.rmtree(folder / "raw")
            raise Problems("cases that nnU-Net cannot take", wrong)
        write_json(data / "dataset.json", _description(plan))
        write_json(folder / CASES, {name: case for case, name in names(plan).items()})


def _description(plan: PlanFolder) -> dict[str, Any]:
    """nnU-Net's dataset.json; names that mean something to it (CT, ignore) are never there by chance."""
    channels = zip(plan.config.data.contrasts, plan.plan.preprocessing.channels, strict=False)
    return {
        "channel_names": {
            str(i): "CT" if channel.kind == "ct" else f"contrast {name}"
            for i, (name, channel) in enumerate(channels)
        },
        "labels": {
            "background": 0,
            **{f"{i} {name}": i for i, name in enumerate(plan.config.data.labels, start=1)},
        },
        "numTraining": len(plan.cases),
        "file_ending": ENDING,
    }


def _write_case(plan: PlanFolder, case: Case, data: Path, name: str) -> None:
    paths = [p for p in case.images if p is not None]
    volumes = [read_volume(p) for p in paths]
    first = volumes[0]
    if (cosine := shear(first.affine)) > ORTHOGONAL:
        raise UserError(
            f"{paths[0]}: the axes are not at right angles (cosine {cosine:.2g}); nnU-Net cannot read that"
        )
    merged = _merged(plan, case)
    for i, (path, volume) in enumerate(zip(paths, volumes, strict=True)):
        target = data / "imagesTr" / f"{name}_{i:04d}{ENDING}"
        if _plain(path, volume, first):
            target.symlink_to(path.resolve())
        else:
            wide = volume.array.dtype.kind == "f" or volume.array.dtype.itemsize == 8
            _write(volume.array.astype(np.float32) if wide else volume.array, first.affine, target)
    _write(merged, first.affine, data / "labelsTr" / f"{name}{ENDING}")


def _plain(path: Path, volume: NiftiVolume, first: NiftiVolume) -> bool:
    """Whether nnU-Net's readers see the file as the plan does, and on the grid of the case's first one.

    Units other than mm, an orientation of the qform's own, voxel sizes that the affine has not, a fourth dimension
    or channels a little apart are read in several ways, or not at all.
    """
    image: Any = nib.load(path)
    return bool(
        path.name.endswith(ENDING)
        and volume.remarks.keys() <= {"unit"}
        and image.ndim == 3
        and np.array_equal(image.affine, first.affine)
        and np.allclose(image.header.get_zooms(), volume.spacing, rtol=1e-6)
    )


def _merged(plan: PlanFolder, case: Case) -> NDArray[Any]:
    """The labels of a case as 1, 2, …, in the configuration's order."""
    masks = truths(plan, case)[0]
    labels = list(plan.config.data.labels)
    merged = np.zeros(
        next(iter(masks.values())).shape, np.uint8 if len(labels) < 255 else np.uint16
    )
    for i, label in enumerate(labels, start=1):
        both = masks[label] & (merged > 0)
        if both.any():
            other = labels[int(merged[both][0]) - 1]
            raise UserError(
                f"{label} and {other} overlap in {int(both.sum())} voxels; labels of nnU-Net exclude each other"
            )
        merged[masks[label]] = i
    return merged


def _write(array: NDArray[Any], affine: NDArray[Any], path: Path) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    with atomic(path) as temporary:
        nib.save(image, temporary)


def splits(plan: PlanFolder, part: str) -> list[dict[str, list[str]]]:
    """The folds as nnU-Net's splits_final.json has them; its validation cases are the held-out ones.

    Args:
        part: the held-out one, see ``design.held_out``.
    """
    name = names(plan)
    return [
        {
            "train": [name[c.id] for c in plan.cases_of(k, "train")],
            "val": [name[c.id] for c in plan.cases_of(k, part)],
        }
        for k in range(len(plan.folds))
    ]


def write_table(plan: PlanFolder, fold: int, part: str, path: Path) -> list[str]:
    """The metadata of a fold's cases as the conditioned trainer reads them.

    A category is text that no number and no spelling of a missing value can be; a number stands as the other arms
    encode it (its logarithm with scaling log) but is standardised by the trainer; what training has not seen is
    missing where ``unseen`` says so.

    Args:
        part: the held-out one.

    Returns:
        the table's columns of metadata.
    """
    keys = {name: key for name, key in plan.config.metadata.items() if key.input}
    train = plan.cases_of(fold, "train")
    encoder = MetadataEncoder.fit({c.id: c.metadata for c in train}, keys)
    columns = [f"metadata.{file_name(name)}" for name in keys]
    name = names(plan)
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["case", *columns])
        for case in _unique([*train, *plan.cases_of(fold, part)]):
            cells = [_cell(encoder[key], case.metadata.get(key)) for key in keys]
            writer.writerow([name[case.id], *cells])
    return columns


def _unique(cases: Sequence[Case]) -> list[Case]:
    return list({case.id: case for case in cases}.values())


def _cell(key: KeyEncoder, value: Any) -> str:
    if is_missing(value, key) or key.unseen_value(value):
        return ""
    if key.kind == "continuous":
        return repr(key.number(value))
    return f"={file_name(as_category(value))}"
