"""Many cases through a model, each written as it is done; one that fails does not stop the others.

OUT/CASE.nii.gz                  label values (labels with masks of their own: CASE_LABEL.nii.gz each, 0 and 1)
OUT/CASE_LABEL_probability.nii.gz, CASE_entropy.nii.gz, CASE_information.nii.gz    if asked for
OUT/CASE_metadata_entropy.nii.gz of a case with missing metadata over whose values the mean was taken
OUT/predictions.json             model, labels, and per case: images, metadata, outputs, known truth
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from ..images.nifti import (
    NiftiVolume,
    Remarks,
    read_volume,
    same_grid,
    voxel_problems,
)
from ..images.written import label_dtype, write_like
from ..metadata.encoder import is_missing
from ..models.folder import LoadedModel
from ..support.errors import UserError
from ..support.files import read_json, write_json
from ..support.names import file_name
from .inputs import InputCase
from .one_case import (
    Options,
    Predicted,
    averaged_keys,
    check_options,
    completed,
    predict,
)
from .postprocessing import fill_holes, keep_largest
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
        remarks: on the images.
    """

    done: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    timing: Timing = field(default_factory=Timing)
    remarks: Remarks = field(default_factory=Remarks)


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
    remarks: Remarks | None = None,
    progress: Callable[[int], Callable[[], None]] = lambda n: lambda: None,
) -> Outcome:
    """Predicts and writes every case.

    Args:
        go_on: leave alone what an earlier run with the same model, settings and metadata has written.
        extra: further entries of predictions.json.
        listed: write predictions.json.
        remarks: collects what is remarkable about the images; it is the outcome's then.
        progress: gets the number of cases; what it returns is called after each.

    Raises:
        UserError: the output folder cannot be written, or holds the images.
    """
    check_options(model, options)
    _check_names(model, cases, options, writing)
    for name in ("plan.json", "model.json"):
        if listed and os.path.exists(out / name):
            raise UserError(f"{out}: holds {name}: write to another folder")
    for case in cases:
        for path in case.images:
            if listed and path is not None and path.parent.resolve() == out.resolve():
                raise UserError(f"{out}: holds the image {path.name}: write to another folder")
    _check_targets(model, cases, out, options, writing, listed)
    head = {
        "model": str(model.folder.resolve()),
        "weights": model.weights,
        "labels": [label.model_dump() for label in model.info.labels],
        "separate": model.info.separate,
        "kinds": {key.name: key.kind for key in model.encoder.keys},
        "options": {**vars(options), "flips": list(options.flips), **vars(writing)},
        "asked": [case.id for case in cases],
        **(extra or {}),
    }
    settings = _settings(model, head)
    old = _manifest(out, settings) if go_on else {}
    outcome = Outcome(remarks=remarks or Remarks())
    entries: dict[str, Any] = dict(old)
    done = progress(len(cases))

    def note() -> None:
        if listed:
            write_json(out / MANIFEST, {**head, "settings": settings, "cases": entries})

    # shows at once whether the folder can be written
    note()
    if listed and not go_on:
        drop_results(out)
    for case in cases:
        if case.id in old and _same(model, old[case.id], case) and _there(out, old[case.id]):
            outcome.kept.append(case.id)
        else:
            entries.pop(case.id, None)
            if listed:
                drop_results(out)
                _drop_outputs(model, case, out, options, writing)
            try:
                entries[case.id] = _one(model, case, out, options, writing, outcome)
                outcome.done.append(case.id)
            except UserError as error:
                outcome.failed[case.id] = str(error)
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError | torch.OutOfMemoryError) and (
                    "DefaultCPUAllocator" not in str(error)
                ):
                    raise
                outcome.failed[case.id] = f"{case.first}: not enough memory for it"
            # what is done stays known if the next case is interrupted
            note()
        done()
    return outcome


RESULTS = ("summary.json", "cases.csv", "comparison.json", "swap.json", "swap_table.json")
"""What belongs to the predictions that were in a folder before."""

MARK = b"fastfilm: "
"""How the description in the header of every output begins."""


def resolved(model: LoadedModel, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the model's keys; several at once (multilabel) as a list of names."""
    values = {}
    for name in model.metadata_keys():
        if name in metadata:
            key, value = model.encoder[name], metadata[name]
            several = key.kind == "multilabel" and not is_missing(value, key)
            values[name] = key.several(value) if several else value
    return values


def _check_targets(
    model: LoadedModel,
    cases: Sequence[InputCase],
    out: Path,
    options: Options,
    writing: Writing,
    listed: bool,
) -> None:
    """Refuses to write over images and labels of the cases, and over files of other programs in a folder."""
    inputs = {p for c in cases for p in (*c.images, *c.labels.values()) if p is not None}
    theirs = {(s.st_dev, s.st_ino): p for p in inputs if p.exists() and (s := p.stat())}
    for case in cases:
        for _, name in output_paths(model, case, options, writing):
            path = out / name
            if not path.exists():
                continue
            status = path.stat()
            if (status.st_dev, status.st_ino) in theirs:
                raise UserError(
                    f"{path}: is an image or a label of the cases: write to another folder, or give another name"
                )
            if listed and not _ours(path):
                raise UserError(
                    f"{path}: is there and was not written by fastfilm predict: write to another folder"
                )


def _ours(path: Path) -> bool:
    try:
        image: Any = nib.load(path)
        return bytes(image.header["descrip"]).startswith(MARK)
    except Exception:  # whatever it is, it is not ours
        return False


def drop_results(out: Path) -> None:
    """Removes what was said of the predictions that were in the folder before."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def _drop_outputs(
    model: LoadedModel, case: InputCase, out: Path, options: Options, writing: Writing
) -> None:
    """Removes what an earlier run wrote of a case, further maps included."""
    every = output_paths(
        model,
        # without metadata it has the map of missing ones
        replace(case, metadata={}),
        replace(options, samples=1, missing="average"),
        replace(writing, probabilities=True),
    )
    for _, name in every:
        if (out / name).exists() and _ours(out / name):
            (out / name).unlink()


def load_case(case: InputCase, remarks: Remarks | None = None) -> list[NiftiVolume | None]:
    """The case's channels, all on the grid of the first; what is remarkable about them goes to ``remarks``.

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
        if (wrong := voxel_problems(path, volume.array)) is not None:
            raise UserError(wrong)
        if remarks is not None:
            remarks.add(path, volume)
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
    outcome: Outcome,
) -> dict[str, Any]:
    stamps = _stamps(case)
    volumes = load_case(case, outcome.remarks)
    affine = next(v for v in volumes if v is not None).affine
    values = resolved(model, case.metadata)
    try:
        for _, whole in completed(model, values, options):
            model.encode(whole, model.tasks()[0] if model.tasks() else None)
        ready = model.preprocess([None if v is None else v.array for v in volumes], affine)
    except UserError as error:
        raise UserError(f"{case.first}: {error}") from error
    del volumes
    found = predict(model, ready, values, options, probabilities=writing.probabilities)
    outcome.timing.network += found.timing.network
    outcome.timing.around += found.timing.around
    _clean(found, writing)
    averaged = averaged_keys(model, values, options)
    return {
        "subject": case.subject,
        "images": [None if p is None else str(p.resolve()) for p in case.images],
        "stamps": stamps,
        "metadata": values,
        **({"averaged": averaged, "metadata_entropy": _in_foreground(found)} if averaged else {}),
        "truth": {k: str(p.resolve()) for k, p in case.labels.items()},
        "outputs": _write(model, case, out, options, writing, found),
    }


def _in_foreground(found: Predicted) -> float | None:
    """Mean metadata entropy, in bits, of the voxels that any label was predicted for; None without such voxels."""
    on = found.masks.any(0)
    if found.metadata_entropy is None or not on.any():
        return None
    return float(found.metadata_entropy[on].mean(dtype=np.float64))


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


def _write(
    model: LoadedModel,
    case: InputCase,
    out: Path,
    options: Options,
    writing: Writing,
    found: Predicted,
) -> dict[str, str]:
    """Writes the files of a case, masks last; what each one is -> its path in ``out``."""
    labels = model.info.labels
    paths = dict(output_paths(model, case, options, writing))
    written: list[Path] = []
    outputs: dict[str, str] = {}

    def write(what: str, array: Any, about: str) -> None:
        path = out / paths[what]
        write_like(path, array, case.first, f"fastfilm: {about}")
        written.append(path)
        outputs[what] = paths[what]

    try:
        if found.probabilities is not None:
            for label, p in zip(labels, found.probabilities, strict=True):
                write(f"{label.name}_probability", p, f"probability of {label.name}")
        if found.entropy is not None and found.information is not None:
            write("entropy", found.entropy, "entropy of the mean prediction, bits")
            write("information", found.information, "mutual information, bits")
        if found.metadata_entropy is not None:
            about = "mutual information of prediction and missing metadata, bits"
            write("metadata_entropy", found.metadata_entropy, about)
        if model.info.separate:
            for label, mask in zip(labels, found.masks, strict=True):
                write(label.name, mask.astype(np.uint8), label.name)
        else:
            values = np.array([0, *(label.value for label in labels)])
            array = values.astype(label_dtype(int(values.max())))[found.strongest]
            about = ", ".join(f"{label.value} {label.name}" for label in labels)
            write("labels", array, about)
    except BaseException:
        # a case is there whole or not at all
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return outputs


def output_paths(
    model: LoadedModel, case: InputCase, options: Options, writing: Writing
) -> list[tuple[str, str]]:
    """What a file of a case is, and its path in the output folder."""
    labels = [label.name for label in model.info.labels]
    ends = [(f"{name}_probability", f"_{name}_probability") for name in labels]
    ends = ends if writing.probabilities else []
    if options.samples:
        ends += [("entropy", "_entropy"), ("information", "_information")]
    if averaged_keys(model, case.metadata, options):
        ends += [("metadata_entropy", "_metadata_entropy")]
    ends += [(name, f"_{name}") for name in labels] if model.info.separate else [("labels", "")]
    begin = case.file or file_name(case.id)
    return [(what, f"{begin}{file_name(end) if end else ''}{case.suffix}") for what, end in ends]


def _check_names(
    model: LoadedModel, cases: Sequence[InputCase], options: Options, writing: Writing
) -> None:
    """Refuses names of cases and labels that would make one file of two."""
    taken: dict[str, str] = {}
    for case in cases:
        for what, path in output_paths(model, case, options, writing):
            mine = f"{what!r} of case {case.id!r}"
            if path in taken:
                raise UserError(
                    f"{path} would hold both {taken[path]} and {mine}: rename the label or the case"
                )
            taken[path] = mine


def _settings(model: LoadedModel, head: Mapping[str, Any]) -> str:
    """Of everything but the case that decides a prediction."""
    # which cases are asked for decides none of them
    decides = {k: v for k, v in head.items() if k != "asked"}
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
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


def _same(model: LoadedModel, entry: Mapping[str, Any], case: InputCase) -> bool:
    images = [None if p is None else str(p.resolve()) for p in case.images]
    given = resolved(model, case.metadata)
    return bool(
        entry["images"] == images
        and entry["metadata"] == given
        and entry.get("stamps") == _stamps(case)
    )


def _stamps(case: InputCase) -> list[list[int] | None]:
    """Size and time of each image: another file under the same name is another case."""
    found: list[list[int] | None] = []
    for path in case.images:
        status = path.stat() if path is not None and path.exists() else None
        found.append(None if status is None else [status.st_size, status.st_mtime_ns])
    return found


def _there(out: Path, entry: Mapping[str, Any]) -> bool:
    return all((out / name).is_file() for name in entry["outputs"].values())
