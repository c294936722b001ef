"""What is to be predicted: a plan's cases, a BIDS folder, a folder of images, one image; and their metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import UserError
from .hints import contents, did_you_mean
from .metadata import KeyEncoder
from .model_folder import LoadedModel, ModelInfo
from .plan import read_plan
from .sidecars import Sidecars, data_set_of
from .sources import (
    SUFFIXES,
    Sidecar,
    contrast_of,
    find_entities,
    find_metadata,
    parts,
    stem,
)
from .tables import read_table


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
    """

    id: str
    subject: str
    images: tuple[Path | None, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    problem: str | None = None
    file: str | None = None

    @property
    def first(self) -> Path:
        """The first image that is there; its grid is the case's."""
        return next(p for p in self.images if p is not None)


def parse_meta(texts: Sequence[str], model: LoadedModel) -> dict[str, str]:
    """``key=value`` settings, each checked against the model.

    Raises:
        UserError: no ``=``, a key the model does not have, a value it cannot take.
    """
    values: dict[str, str] = {}
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
        if key in values and values[key] != value:
            raise UserError(f"--meta gives {key!r} twice: {values[key]!r} and {value!r}")
        model.encoder[key].encode(value)
        values[key] = value
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
            InputCase(c.id, c.subject, c.images, {**c.metadata, **meta}, dict(c.labels))
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
        cases.append(_case(name, channels, info, meta, rows, table, bids))
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


def _rows(table: Path) -> dict[str, dict[str, str]]:
    """Rows by each name that they could go by."""
    rows: dict[str, dict[str, str]] = {}
    origin: dict[str, tuple[str, int]] = {}
    names = ("participant_id", "case", "id", "subject", "image")
    found = read_table(table)
    if not set(names) & set(found.columns):
        raise UserError(
            f"{table}: none of the columns {', '.join(names)} that say which case a row is of; it has"
            f" {', '.join(found.columns)}"
        )
    for line, row in zip(found.lines, found.rows, strict=True):
        given = [n for n in names if row.get(n)]
        if not given:
            raise UserError(f"{table}: line {line} does not say which case it is of")
        for column in given:
            name = stem(Path(row[column]))
            # several rows of one subject: each case has its own by another column
            if name in rows and rows[name] is not row and rows[name] != row:
                if origin[name][0] == column and len(given) == 1:
                    raise UserError(
                        f"{table}: line {line}: a second row for {name!r} (the first is line {origin[name][1]})"
                    )
                if column == "subject":
                    continue
            rows[name], origin[name] = row, (column, line)
    return rows


def _case(
    name: str,
    channels: Mapping[str, Path],
    info: ModelInfo,
    meta: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, str]] | None,
    table: Path | None,
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
    if rows is not None:
        candidates = [name, subject, subject.removeprefix("sub-"), stem(first)]
        row = next((rows[n] for n in candidates if n in rows), None)
        columns = next(iter(rows.values()), {})
        wanted = [n for n, k in keys.items() if k.source in ("auto", "table") and n in columns]
        if row is None and wanted:
            case.problem = f"{table}: no row for {name} (metadata {', '.join(wanted)})"
            return case
    problems: list[str] = []
    sidecar = Sidecar()
    if keys:
        sidecar = Sidecars(problems.append).of(first, root or data_set_of(first))
    if problems:
        case.problem = problems[0]
        return case
    typed: dict[str, KeyEncoder] = keys
    case.metadata = {**find_metadata(typed, row or {}, entities, sidecar)[0], **meta}
    return case
