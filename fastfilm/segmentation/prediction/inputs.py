"""What is to be predicted: a plan's cases, a BIDS folder, a folder of images, one image; and their metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.plan import read_plan
from ..data.sidecars import Sidecars, data_set_of
from ..data.sources import (
    SUFFIXES,
    Sidecar,
    columns_of,
    contrast_of,
    find_entities,
    find_metadata,
    parts,
    stem,
)
from ..metadata.dicom import of_image
from ..metadata.encoder import (
    KeyEncoder,
    is_blank,
    is_missing,
)
from ..metadata.vectors import read_vector
from ..models.folder import LoadedModel, ModelInfo
from ..support.errors import UserError
from ..support.hints import contents, did_you_mean
from ..support.tables import Table, read_table


@dataclass
class InputCase:
    """One case to predict.

    Attributes:
        id: its name.
        subject: whose image it is.
        images: one a channel, None where it is missing.
        metadata: key -> value, None where it was not found.
        labels: label -> file of the truth, where a plan knows it.
        problem: why it cannot be predicted, if it cannot.
        file: what its outputs' names begin with; None: made from the id.
        suffix: what they end in.
    """

    id: str
    subject: str
    images: tuple[Path | None, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    problem: str | None = None
    file: str | None = None
    suffix: str = ".nii.gz"

    @property
    def first(self) -> Path:
        """The first image that is there; its grid is the case's."""
        return next(p for p in self.images if p is not None)


def parse_meta(texts: Sequence[str], model: LoadedModel) -> dict[str, Any]:
    """``key=value`` settings, each checked against the model; a vector is ``[1,2,3]`` or a .npy file.

    Raises:
        UserError: no ``=``, a key the model does not have, a value it cannot take.
    """
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise UserError(f"--meta takes KEY=VALUE, got {text!r}")
        if key == model.info.task_key:
            raise UserError(
                f"--meta {text}: every {key} is predicted anyway: {', '.join(model.tasks())}"
            )
        if key not in model.encoder.names():
            hint = did_you_mean(key, model.metadata_keys())
            raise UserError(
                f"--meta {text}: the model has no metadata key {key!r}; it has"
                f" {', '.join(model.metadata_keys()) or 'none'}{hint}"
            )
        if given.setdefault(key, value) != value:
            raise UserError(f"--meta gives {key!r} twice: {given[key]!r} and {value!r}")
        encoder = model.encoder[key]
        values[key] = value
        if encoder.kind == "vector" and not is_missing(value, encoder):
            try:
                values[key] = read_vector(value, Path())[0]
            except ValueError as error:
                raise UserError(f"--meta {text:.80}: {error}") from error
        encoder.encode(values[key])
    return values


def find_inputs(
    source: Path,
    info: ModelInfo,
    *,
    meta: Mapping[str, Any],
    table: Path | None = None,
    fold: int = 0,
    part: str = "val",
    notes: list[str] | None = None,
) -> list[InputCase]:
    """The cases in ``source``, in the order of their names.

    Args:
        source: a plan folder (its ``fold`` and ``part`` choose the cases), a folder (``sub-*`` folders are read as
            BIDS, else every image directly in it), or one image.
        info: of the model: contrasts and metadata keys.
        meta: key -> value that holds for all cases and goes before anything that is found.
        table: of metadata; none: participants.tsv in the folder, if there is one.
        notes: gets a line on what is left out.

    Raises:
        UserError: nothing there that could be predicted, a table that cannot be read.
    """
    said: list[str] = [] if notes is None else notes
    if (source / "plan.json").is_file():
        plan = read_plan(source)
        cases = [
            InputCase(
                c.id,
                c.subject,
                c.images,
                {**c.metadata, **meta},
                dict(c.labels),
                next(iter(c.changed_vectors()), None),
            )
            for c in plan.cases_of(fold, part)
        ]
        if not cases:
            raise UserError(f"{source}: no case in part {part!r} of fold {fold}")
        return cases
    if source.is_dir():
        groups = _folder(source, info, said)
    elif source.is_file():
        groups = {stem(source): {info.contrasts[0]: source}}
        if info.in_channels > 1:
            groups = {
                k: g for k, g in _folder(source.parent, info, said).items() if source in g.values()
            }
    else:
        raise UserError(f"{source}: no such file or folder")
    if not groups:
        raise UserError(
            f"{source}: no images; looked for NIfTI files of {' and '.join(info.contrasts)};"
            f" {contents(source if source.is_dir() else source.parent)}"
        )
    if table is None and (source / "participants.tsv").is_file():
        table = source / "participants.tsv"
    rows = None if table is None else _rows(table)
    bids = source if source.is_dir() and any(source.glob("sub-*/")) else None
    cases = []
    for name, channels in sorted(groups.items()):
        cases.append(_case(name, channels, info, meta, rows, bids))
    return cases


def _folder(folder: Path, info: ModelInfo, notes: list[str]) -> dict[str, dict[str, Path]]:
    """Case -> contrast -> file."""
    bids = any(p.is_dir() for p in folder.glob("sub-*"))
    if bids:
        files = [p for s in sorted(folder.glob("sub-*")) for p in sorted(s.rglob("*"))]
    else:
        files = sorted(folder.iterdir())
    files = [p for p in files if p.name.endswith(SUFFIXES) and not p.name.startswith(".")]
    one = info.in_channels == 1
    found = [(p, contrast_of(p, info.contrasts)) for p in files]
    groups: dict[str, dict[str, Path]] = {}

    def add(name: str, contrast: str, path: Path) -> None:
        channels = groups.setdefault(name, {})
        if contrast in channels:
            raise UserError(
                f"{path} and {channels[contrast]}: both are the image ({contrast}) of case {name}"
            )
        channels[contrast] = path

    named = [p for p, c in found if c is not None]
    if one and not bids and not named:
        # whatever lies there is the image
        for path in files:
            add(stem(path), info.contrasts[0], path)
        return groups
    if one and not bids and len(named) < len(files):
        notes.append(
            f"{len(files) - len(named)} of {len(files)} files in {folder} are left out: their names do not end in"
            f" {' or '.join(info.contrasts)}, as others do"
        )
    for path, contrast in found:
        if contrast is None:
            continue
        if info.combine == "samples" or (one and not bids):
            add(stem(path), contrast, path)
            continue
        entities, _ = parts(path)
        own = {k for k, _, _ in (e.partition("-") for e in contrast.split("_")[:-1])}
        name = "_".join(f"{k}-{v}" if v else k for k, v in entities.items() if k not in own)
        add(name or stem(path), contrast, path)
    return groups


STRICT, LOOSE, SUBJECTS = ("case", "image"), ("id",), ("participant_id", "subject")
"""Columns that say which case a row is of; that may say it; that say whose it is."""


def _rows(path: Path) -> Table:
    """A table of metadata; UserError if its rows do not say what they are of, or two say the same."""
    table = read_table(path)
    names = (*SUBJECTS, *STRICT, *LOOSE)
    if not set(names) & set(table.columns):
        raise UserError(
            f"{path}: none of the columns {', '.join(names)} that say which case a row is of; it has"
            f" {', '.join(table.columns)}"
        )
    taken: dict[tuple[str, ...], int] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        if not any(row.get(n) for n in names):
            raise UserError(f"{path}: line {line} does not say which case it is of")
        strict = [n for n in STRICT if row.get(n)]
        of = (
            tuple(row[n] for n in strict)
            if strict
            else tuple(row.get(n, "") for n in (*LOOSE, *SUBJECTS, *_entities(row)))
        )
        if of in taken and table.rows[table.lines.index(taken[of])] != row:
            raise UserError(
                f"{path}: line {line}: a second row for {' '.join(o for o in of if o)!r} (the first is line"
                f" {taken[of]})"
            )
        taken[of] = line
    return table


def _entities(row: Mapping[str, str]) -> list[str]:
    """Columns that are BIDS entities: rows of one subject that differ in them are of different images."""
    return [n for n in row if n.removesuffix("_id") in ("ses", "session", "run", "acq")]


def _row_of(
    table: Table, names: Sequence[str], entities: Mapping[str, str]
) -> Mapping[str, str] | None:
    """The row of a case; None if there is none.

    Args:
        names: that the case or its subject may go by.

    Raises:
        UserError: several rows could be it.
    """
    exact, subject = [], []
    for row in table.rows:
        strict = [stem(Path(row[n])) for n in STRICT if row.get(n)]
        if strict:
            exact += [row] if set(strict) & set(names) else []
        elif any(row.get(n) in names for n in LOOSE if row.get(n)):
            exact.append(row)
        elif any(stem(Path(row[n])) in names for n in SUBJECTS if row.get(n)):
            given = {n: row[n] for n in _entities(row) if row[n]}
            if all(_agree(n, v, entities) for n, v in given.items()):
                subject.append(row)
    found = exact or subject
    if len(found) > 1 and any(r != found[0] for r in found):
        raise UserError(f"{table.path}: {len(found)} rows could be that of {names[0]}")
    return found[0] if found else None


def _agree(column: str, value: str, entities: Mapping[str, str]) -> bool:
    """Whether a row's session, run … is the image's; an image without one takes any."""
    name = column.removesuffix("_id").replace("session", "ses")
    mine = entities.get(name)
    return mine is None or value.removeprefix(f"{name}-") == mine


def _case(
    name: str,
    channels: Mapping[str, Path],
    info: ModelInfo,
    meta: Mapping[str, Any],
    table: Table | None,
    root: Path | None,
) -> InputCase:
    if info.in_channels == 1:
        images: tuple[Path | None, ...] = tuple(channels.values())[:1]
    else:
        images = tuple(channels.get(c) for c in info.contrasts)
    first = next(p for p in images if p is not None)
    entities = find_entities(first, info.contrasts)
    subject = f"sub-{entities['sub']}" if "sub" in entities else name
    case = InputCase(name, subject, images)
    absent = [c for c, p in zip(info.contrasts, images, strict=False) if p is None]
    if absent and info.missing_contrast != "zeros":
        case.problem = f"{first}: no image of contrast {', '.join(absent)} beside it"
        return case
    keys = {k.name: k for k in info.metadata.keys if k.name not in meta and k.name != info.task_key}
    row: Mapping[str, str] | None = {}
    if table is not None:
        try:
            row = _row_of(
                table, [name, stem(first), subject, subject.removeprefix("sub-")], entities
            )
        except UserError as error:
            case.problem = str(error)
            return case
        wanted = [n for n, k in keys.items() if k.source in ("auto", "table")]
        wanted = [n for n in wanted if any(c in table.columns for c in columns_of(keys[n]) or [n])]
        if row is None and wanted:
            case.problem = f"{table.path}: no row for {name} (metadata {', '.join(wanted)})"
            return case
    problems: list[str] = []
    sidecar = Sidecar()
    # those of another contrast would be other values
    if keys and images[0] is not None:
        sidecar = Sidecars(problems.append).of(first, root or data_set_of(first))
    if problems:
        case.problem = problems[0]
        return case
    typed: dict[str, KeyEncoder] = keys
    folder = Path() if table is None else table.path.parent
    dicom = None
    if images[0] is not None:
        bids = root or data_set_of(first)
        cell = (row or {}).get(info.dicom_column, "")
        if bids is not None:
            dicom = of_image(first, stem(first), bids)
        elif not is_blank(cell):
            dicom = folder / cell
    found = find_metadata(typed, row or {}, entities, sidecar, folder, dicom)
    if found.problems:
        case.problem = f"{first}: {found.problems[0]}"
    case.metadata = {**found.values, **meta}
    return case
