"""Many cases through a model, each written as it is done; one that fails does not stop the others.

OUT/CASE.nii.gz                  label values (labels with masks of their own: CASE_LABEL.nii.gz each, 0 and 1)
OUT/CASE_LABEL_probability.nii.gz, CASE_entropy.nii.gz, CASE_information.nii.gz    if asked for
OUT/predictions.json             model, labels, and per case: images, metadata, outputs, known truth
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import UserError
from .files import read_json, write_json
from .images import label_dtype, write_like
from .inference import Options, Predicted, predict
from .inputs import InputCase
from .model_folder import LoadedModel
from .postprocessing import fill_holes, keep_largest
from .volumes import NiftiVolume, read_volume, same_grid
from .windows import Timing

MANIFEST = "predictions.json"


@dataclass(frozen=True)
class Writing:
    """What is done with a prediction.

    Attributes:
        keep_largest, fill_holes: of each label.
        probabilities: written as float32, one file a label.
    """

    keep_largest: bool = False
    fill_holes: bool = False
    probabilities: bool = False


@dataclass
class Outcome:
    """What became of a folder.

    Attributes:
        done, kept: cases predicted now, and left as an earlier run wrote them.
        failed: case -> why.
        timing: of all windows.
    """

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)


def predict_cases(
    model: LoadedModel,
    cases: Sequence[InputCase],
    out: Path,
    options: Options,
    writing: Writing,
    *,
    go_on: bool = False,
    extra: Mapping[str, Any] | None = None,
    listed: bool = True,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> Outcome:
    """Predicts and writes every case.

    Args:
        go_on: leave alone what an earlier run with the same model, settings and metadata has written.
        extra: further entries of predictions.json.
        listed: write predictions.json.
        progress: gets the number of cases; what it returns is called after each.

    Raises:
        UserError: the output folder cannot be written, or holds the images.
    """
    for case in cases:
        for path in case.images:
            if listed and path is not None and path.parent.resolve() == out.resolve():
                raise UserError(f"{out}: holds the image {path.name}: write to another folder")
    head = {
        "model": str(model.folder.resolve()),
        "labels": [label.model_dump() for label in model.info.labels],
        "separate": separate(model),
        "options": {**vars(options), "flips": list(options.flips), **vars(writing)},
        **(extra or {}),
    }
    settings = _settings(model, head)
    old = _manifest(out, settings) if go_on else {}
    outcome = Outcome()
    entries: dict[str, Any] = dict(old)
    done = progress(len(cases))

    def note() -> None:
        if listed:
            write_json(out / MANIFEST, {**head, "settings": settings, "cases": entries})

    # shows at once whether the folder can be written
    note()
    for case in cases:
        if case.id in old and _same(old[case.id], case) and _there(out, old[case.id]):
            outcome.kept.append(case.id)
        else:
            entries.pop(case.id, None)
            try:
                entries[case.id] = _one(model, case, out, options, writing, outcome.timing)
                outcome.done.append(case.id)
            except UserError as error:
                outcome.failed[case.id] = str(error)
            except (MemoryError, torch.OutOfMemoryError):
                outcome.failed[case.id] = f"{case.first}: not enough memory for it"
            # what is done stays known if the next case is interrupted
            note()
        done()
    return outcome


def separate(model: LoadedModel) -> bool:
    """Whether each label gets a file of its own: those that come from masks of their own may overlap."""
    info = model.info
    return info.output != "classes" and any(not label.values for label in info.labels)


def load_case(case: InputCase) -> list[NiftiVolume | None]:
    """The case's channels, all on the grid of the first.

    Raises:
        UserError: a file that cannot be read, is on another grid, or holds NaN or infinity; the file is named.
    """
    if case.problem is not None:
        raise UserError(case.problem)
    volumes: list[NiftiVolume | None] = []
    first: tuple[Path, NiftiVolume] | None = None
    for path in case.images:
        if path is None:
            volumes.append(None)
            continue
        volume = read_volume(path)
        if volume.array.dtype.kind not in "biuf":
            raise UserError(f"{path}: voxels must be numbers, got {volume.array.dtype}")
        if volume.array.size == 0:
            raise UserError(f"{path}: has no voxels, its shape is {volume.array.shape}")
        if volume.array.dtype.kind == "f" and not np.isfinite(volume.array).all():
            n = int((~np.isfinite(volume.array)).sum())
            raise UserError(f"{path}: {n} voxels are NaN or infinite")
        first = first or (path, volume)
        if (difference := same_grid(first[1], volume)) is not None:
            raise UserError(f"{path}: not on the grid of {first[0]}: {difference}")
        volumes.append(volume)
    return volumes


def _one(
    model: LoadedModel,
    case: InputCase,
    out: Path,
    options: Options,
    writing: Writing,
    timing: Timing,
) -> dict[str, Any]:
    volumes = load_case(case)
    affine = next(v for v in volumes if v is not None).affine
    names = set(model.metadata_keys())
    values = {k: v for k, v in case.metadata.items() if k in names}
    try:
        model.encode(values, model.tasks()[0] if model.tasks() else None)
        ready = model.preprocess([None if v is None else v.array for v in volumes], affine)
    except UserError as error:
        raise UserError(f"{case.first}: {error}") from error
    del volumes
    found = predict(model, ready, values, options, probabilities=writing.probabilities)
    timing.network += found.timing.network
    timing.around += found.timing.around
    _clean(found, writing)
    return {
        "subject": case.subject,
        "images": [None if p is None else str(p.resolve()) for p in case.images],
        "metadata": values,
        "truth": {k: str(p.resolve()) for k, p in case.labels.items()},
        "outputs": _write(model, case, out, found),
    }


def _clean(found: Predicted, writing: Writing) -> None:
    """Post-processing, in place."""
    if not (writing.keep_largest or writing.fill_holes):
        return
    for k, mask in enumerate(found.masks):
        new = mask
        if writing.keep_largest:
            new = keep_largest(new)
        if writing.fill_holes:
            new = fill_holes(new)
            found.strongest[new & (found.strongest == 0)] = k + 1
        # voxels that a label lost go to the next one that is on
        lost = (found.strongest == k + 1) & ~new
        found.masks[k] = new
        if lost.any():
            others = found.masks[:, lost]
            found.strongest[lost] = np.where(others.any(0), others.argmax(0) + 1, 0)


def _write(model: LoadedModel, case: InputCase, out: Path, found: Predicted) -> dict[str, str]:
    """Writes the files of a case, masks last; what each one is -> its name."""
    labels = model.info.labels
    written: list[Path] = []
    outputs: dict[str, str] = {}

    def write(what: str, end: str, array: Any, about: str) -> None:
        path = out / f"{case.id}{end}.nii.gz"
        write_like(path, array, case.first, f"fastfilm: {about}")
        written.append(path)
        outputs[what] = path.name

    try:
        if found.probabilities is not None:
            for label, p in zip(labels, found.probabilities, strict=True):
                name = f"{label.name}_probability"
                write(name, f"_{name}", p, f"probability of {label.name}")
        if found.entropy is not None and found.information is not None:
            write("entropy", "_entropy", found.entropy, "entropy of the mean prediction, bits")
            write("information", "_information", found.information, "mutual information, bits")
        if separate(model):
            for label, mask in zip(labels, found.masks, strict=True):
                write(label.name, f"_{label.name}", mask.astype(np.uint8), label.name)
        else:
            values = np.array([0, *(label.value for label in labels)])
            array = values.astype(label_dtype(int(values.max())))[found.strongest]
            about = ", ".join(f"{label.value} {label.name}" for label in labels)
            write("labels", "", array, about)
    except BaseException:
        # a case is there whole or not at all
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return outputs


def _settings(model: LoadedModel, head: Mapping[str, Any]) -> str:
    """Of everything but the case that decides a prediction."""
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for name in ("model.json", "best.safetensors", "final.safetensors"):
        path = model.folder / name
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _manifest(out: Path, settings: str) -> dict[str, Any]:
    """The cases of an earlier run with these settings; none if there is none.

    Raises:
        UserError: there is a run with other ones.
    """
    path = out / MANIFEST
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict) or not isinstance(value.get("cases"), dict):
        raise UserError(f"{path}: not a list of predictions")
    if value.get("settings") != settings:
        raise UserError(
            f"{out}: holds predictions of another model or with other settings;"
            " without --continue they are replaced"
        )
    return dict(value["cases"])


def _same(entry: Mapping[str, Any], case: InputCase) -> bool:
    images = [None if p is None else str(p.resolve()) for p in case.images]
    given = {k: v for k, v in case.metadata.items() if k in entry["metadata"]}
    return bool(entry["images"] == images and entry["metadata"] == given)


def _there(out: Path, entry: Mapping[str, Any]) -> bool:
    return all((out / name).is_file() for name in entry["outputs"].values())
