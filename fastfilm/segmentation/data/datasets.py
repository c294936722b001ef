"""Data sets -> cases: a BIDS folder, or a table with a row a case."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..config.schema import Config
from ..config.sections import Data
from ..metadata.dicom import of_image, tag_of
from ..metadata.encoder import is_blank
from ..metadata.vectors import expanded
from ..support.encoding import dangling
from ..support.errors import UserError
from ..support.hints import (
    contents,
    did_you_mean,
    some,
)
from ..support.tables import Table, read_table
from .sidecars import Sidecars
from .sources import (
    SUFFIXES,
    Case,
    Found,
    Sidecar,
    contrast_of,
    find_entities,
    find_metadata,
    finish,
    parts,
    split_of,
    stem,
)


def find_cases(config: Config) -> Found:
    """The cases of ``config.data``, in the order of their names.

    Patterns in ``config``'s ``metadata.KEY.columns`` are replaced by the names of the table's columns that fit.

    Raises:
        UserError: no such folder or file, or nothing in it that matches; a DICOM tag that there is not.
    """
    data = config.data
    for name, key in config.metadata.items():
        if key.source == "dicom":
            try:
                # once, before it would be said of each case
                tag_of(key.tag or name)
            except UserError as error:
                raise UserError(f"metadata.{name}: {error}") from error
    found = _bids(config) if data.source == "bids" else _rows(config)
    names = [*dict.fromkeys(n for c in found.cases for n in (c.subject, c.id))]
    for name in data.exclude:
        if name not in found.excluded:
            found.notes.append(
                f"data.exclude: there is no subject or case {name!r}{did_you_mean(name, names)}"
            )
    found.cases.sort(key=lambda c: c.id)
    if found.unlabelled:
        found.notes.append(
            f"{len(found.unlabelled)} cases left out for want of a label file"
            f" (data.missing_labels: {data.missing_labels}): {some(found.unlabelled)}"
        )
    if not found.cases and not found.problems:
        if found.unlabelled:
            raise UserError(f"{data.root}: {found.notes[-1]}; none is left")
        raise UserError(f"{data.root}: no images of the contrasts {_nothing(data)}")
    return found


def _nothing(data: Data) -> str:
    """Why there may be none."""
    names = ", ".join(data.contrasts)
    if data.source == "csv":
        return names
    ends = contrasts_in(data.root)
    if ends:
        hint = "".join(did_you_mean(c, ends) for c in data.contrasts[:1])
        return f"{names}; the images are of {', '.join(ends)}{hint}"
    text = f"{names}: {contents(data.root)}"
    if "NIfTI" in text:
        text += (
            "; BIDS has them in sub-*/[ses-*/]anat/ with names that begin with sub-; files in any other order go"
            " into a table (data.source: csv)"
        )
    return text


def _bids(config: Config) -> Found:
    data = config.data
    if not data.root.is_dir():
        raise UserError(f"{data.root}: no such folder")
    found = Found()
    rows = _participants(config, found)
    sidecars = Sidecars(found.problems.append)
    groups: dict[tuple[str, str], dict[str, Path]] = {}
    for path in _images(data.root):
        contrast = contrast_of(path, data.contrasts)
        if contrast is None:
            continue
        entities, _ = parts(path)
        own = {k for k, _, _ in (p.partition("-") for p in contrast.split("_")[:-1])}
        rest = [f"{k}-{v}" for k, v in entities.items() if k not in own]
        case = "_".join(rest) + (f"_{contrast}" if data.combine == "samples" else "")
        channels = groups.setdefault((f"sub-{entities['sub']}", case), {})
        if contrast in channels:
            found.problems.append(
                f"{path} and {channels[contrast]}: both are {contrast} of case {case}"
            )
        channels[contrast] = path
    _contrasts_nowhere(data, {c for channels in groups.values() for c in channels}, found)
    left_out: list[str] = []
    zeros: list[str] = []
    for (subject, case), channels in sorted(groups.items()):
        if _excluded(data, found, subject, case):
            continue
        names = list(channels) if data.combine == "samples" else data.contrasts
        absent = [n for n in names if n not in channels]
        if absent and data.missing_contrast == "skip":
            left_out.append(case)
            continue
        if absent and data.missing_contrast == "error":
            found.problems.append(f"{case}: no image of contrast {', '.join(absent)}")
        if absent:
            zeros.append(case)
        labels, expected = _labels(data, channels, found)
        row = rows.get(subject)
        if row is None and rows and _uses_table(config, found.places.columns):
            found.problems.append(f"{data.root / data.table}: no row for {subject}")
        row = row or {}
        first = channels.get(names[0])
        entities = find_entities(first or next(iter(channels.values())), data.contrasts)
        # those of another contrast would be other values
        sidecar = Sidecar() if first is None else sidecars.of(first, data.root)
        found.places.entities |= entities.keys()
        found.places.sidecar |= sidecar.values.keys()
        metadata = find_metadata(
            config.metadata,
            row,
            entities,
            sidecar,
            (data.root / data.table).parent,
            None if first is None else of_image(first, stem(first), data.root),
        )
        found.problems += [f"{case}: {p}" for p in metadata.problems]
        made = Case(
            id=case,
            subject=subject,
            images=tuple(channels.get(n) for n in names),
            labels=labels,
            metadata=metadata.values,
            split=split_of(config, row, case, found),
            origins=metadata.origins,
            vectors=metadata.vectors,
        )
        finish(found, made, config, row, expected)
    _say_left_out(found, left_out)
    _say_zeros(found, zeros, data)
    _without_case(data, rows, {s for s, _ in groups}, found)
    if found.several:
        found.notes.append(
            f"{len(found.several)} cases have label files of several contrasts, of which that of the first in"
            f" data.contrasts is taken (data.label_contrast): {some(found.several)}"
        )
    return found


def _contrasts_nowhere(data: Data, there: set[str], found: Found) -> None:
    """Names contrasts that no case has, where some have others."""
    for contrast in data.contrasts:
        if there and contrast not in there:
            known = contrasts_in(data.root) if data.source == "bids" else []
            what = f"; the images are of {', '.join(known)}" if known else ""
            found.problems.append(
                f"{data.root}: no case has an image of contrast {contrast}{what}{did_you_mean(contrast, known)}"
            )


def _without_case(data: Data, rows: Mapping[str, object], used: set[str], found: Found) -> None:
    """Notes on folders of subjects, and rows of the table, that make no case."""
    folders = {p.name for p in data.root.glob("sub-*")}
    idle = sorted(folders - used - set(data.exclude))
    if idle:
        found.notes.append(
            f"{len(idle)} sub-* folders have no image of {', '.join(data.contrasts)}: {some(idle)}"
        )
    rest = sorted(set(rows) - folders)
    if rest:
        found.notes.append(f"{len(rest)} rows of {data.table} have no folder: {some(rest)}")


def _say_zeros(found: Found, cases: list[str], data: Data) -> None:
    if cases and data.missing_contrast == "zeros":
        found.notes.append(
            f"{len(cases)} cases lack a contrast, whose channel is zeros (data.missing_contrast): {some(cases)}"
        )


def _excluded(data: Data, found: Found, *names: str) -> bool:
    hit = {n for n in names if n in data.exclude}
    found.excluded |= hit
    return bool(hit)


def _say_left_out(found: Found, cases: list[str]) -> None:
    if cases:
        found.notes.append(
            f"{len(cases)} cases left out for want of a contrast (data.missing_contrast: skip): {some(cases)}"
        )


def contrasts_in(root: Path) -> list[str]:
    """Suffixes of the images in a BIDS folder: T1w, FLAIR, …"""
    return sorted({parts(p)[1] for p in _images(root)})


def _images(root: Path) -> Iterator[Path]:
    for subject in sorted(root.glob("sub-*")):
        seen: set[Path] = set()
        found: list[Path] = []
        for where, folders, names in os.walk(subject, followlinks=True):
            real = Path(where).resolve()
            if real in seen:
                # a link to a folder above
                folders.clear()
                continue
            seen.add(real)
            found += [
                Path(where, n)
                for n in [*names, *folders]
                if n.endswith(SUFFIXES) and n[:4] == "sub-"
            ]
        yield from sorted(found)


def _labels(
    data: Data, channels: Mapping[str, Path], found: Found
) -> tuple[dict[str, Path], dict[str, str]]:
    """Label -> its file, of those that are there; label -> where it was looked for, with what is there instead."""
    files: dict[str, Path] = {}
    expected: dict[str, str] = {}
    images = [
        channels[n]
        for n in ([data.label_contrast] if data.label_contrast else list(channels))
        if n in channels
    ]
    for name, label in data.labels.items():
        suffix = label.suffix or data.label_suffix
        for image in images:
            wanted = _label_path(data, image, suffix)
            if name not in expected:
                expected[name] = str(wanted) + _instead(wanted.parent, stem(image))
            there = [p for p in (wanted, wanted.with_suffix("")) if os.path.lexists(p)]
            if len(there) > 1:
                found.problems.append(f"{there[0]} and {there[1].name}: both are there")
            if there:
                # missing_labels is for what is not annotated, not for a file that was not fetched
                if not there[0].exists():
                    found.problems.append(f"{there[0]}: {dangling(there[0])}")
                files[name] = there[0]
                rest = images[images.index(image) + 1 :]
                if any(os.path.lexists(_label_path(data, other, suffix)) for other in rest):
                    found.several.append(stem(image))
                break
        else:
            expected.setdefault(name, f"the label of an image {data.label_contrast}")
    return files, expected


def _label_path(data: Data, image: Path, suffix: str) -> Path:
    folder = data.root / data.derivatives / image.parent.relative_to(data.root)
    return folder / f"{stem(image)}_{suffix}.nii.gz"


def _instead(folder: Path, image: str) -> str:
    if not folder.is_dir():
        above = next(p for p in folder.parents if p.is_dir())
        return f" (there is no folder {folder.relative_to(above).parts[0]} in {above})"
    others = sorted(p.name for p in folder.glob(f"{image}*") if p.name.endswith(SUFFIXES))
    return f" (the folder has {', '.join(others[:3])})" if others else ""


def _participants(config: Config, found: Found) -> dict[str, dict[str, str]]:
    """Subject -> row."""
    path = config.data.root / config.data.table
    needed = any(k.source == "table" or k.columns for k in config.metadata.values())
    needed = needed or bool(config.splits.column or config.data.annotated_column)
    if not os.path.lexists(path):
        if needed:
            found.problems.append(f"{path}: no such table")
        return {}
    try:
        table = read_table(path)
    except UserError as error:
        found.problems.append(str(error))
        return {}
    found.places.table, found.places.columns = path, table.columns
    if "participant_id" not in table.columns:
        found.problems.append(
            f"{path}: no column 'participant_id'; it has {', '.join(table.columns)}"
        )
        return {}
    _named_columns(config, table, found)
    rows: dict[str, dict[str, str]] = {}
    for line, row in zip(table.lines, table.rows, strict=True):
        subject = row["participant_id"]
        if not subject:
            found.problems.append(f"{path}: line {line} has no participant_id")
            continue
        subject = subject if subject.startswith("sub-") else f"sub-{subject}"
        if subject in rows:
            found.problems.append(f"{path}: line {line}: a second row for {subject}")
        rows[subject] = row
    return rows


def _uses_table(config: Config, columns: list[str]) -> bool:
    """Whether a metadata key or the split comes from the table."""
    keys = [
        name
        for k, c in config.metadata.items()
        if c.source in ("auto", "table")
        for name in c.columns or [k]
    ]
    return any(k in columns for k in [*keys, config.splits.column])


def _rows(config: Config) -> Found:
    """The cases of a table."""
    data = config.data
    found = Found()
    table = read_table(data.root)
    if not table.rows:
        raise UserError(f"{data.root}: the table has no rows")
    found.places.table, found.places.columns = data.root, table.columns
    _columns(config, table, found)
    if found.problems:
        return found
    used = {c for c in data.contrasts if any(not is_blank(r[c]) for r in table.rows)}
    _contrasts_nowhere(data, used, found)
    sidecars = Sidecars(found.problems.append)
    taken: dict[str, int] = {}
    left_out: list[str] = []
    for line, row in zip(table.lines, table.rows, strict=True):
        paths = {c: None if is_blank(row[c]) else data.root.parent / row[c] for c in data.contrasts}
        there = [p for p in paths.values() if p is not None]
        where = f"{data.root}: line {line}"
        if not there:
            found.problems.append(f"{where}: no image")
            continue
        name = row.get("case") or row.get("id") or row.get("subject") or stem(there[0])
        subject = row.get("subject") or name
        missing = [c for c, p in paths.items() if p is None]
        if missing and data.combine == "channels":
            if data.missing_contrast == "skip":
                left_out.append(name)
                continue
            if data.missing_contrast == "error":
                found.problems.append(f"{where}: no image in column {', '.join(missing)}")
        labels: dict[str, Path] = {}
        expected: dict[str, str] = {}
        for label, c in data.labels.items():
            column = c.column or data.label_column
            expected[label] = f"a path in column {column!r} of line {line}"
            if not is_blank(row[column]):
                labels[label] = data.root.parent / row[column]
        if _excluded(data, found, subject, name):
            continue
        channels: list[tuple[str, tuple[Path | None, ...]]] = [(name, tuple(paths.values()))]
        if data.combine == "samples" and len(data.contrasts) > 1:
            channels = [(f"{name}_{c}", (p,)) for c, p in paths.items() if p is not None]
        for case, images in channels:
            if _excluded(data, found, subject, case):
                continue
            if case in taken:
                found.problems.append(f"{where}: case {case!r} is in line {taken[case]} already")
                continue
            taken[case] = line
            first = next(p for p in images if p is not None)
            column = next(c for c, p in paths.items() if p == first)
            entities = {"contrast": column}
            # those of another contrast would be other values
            sidecar = Sidecar() if images[0] is None else sidecars.of(first)
            found.places.entities |= entities.keys()
            found.places.sidecar |= sidecar.values.keys()
            cell = "" if images[0] is None else row.get(data.dicom_column, "")
            dicom = None if is_blank(cell) else data.root.parent / cell
            metadata = find_metadata(
                config.metadata, row, entities, sidecar, data.root.parent, dicom
            )
            found.problems += [f"{where}: {p}" for p in metadata.problems]
            made = Case(
                case,
                subject,
                images,
                labels,
                metadata.values,
                split_of(config, row, where, found),
                metadata.origins,
                vectors=metadata.vectors,
            )
            finish(found, made, config, row, expected)
    _say_left_out(found, left_out)
    return found


def _columns(config: Config, table: Table, found: Found) -> None:
    """Names the columns that the configuration asks for and the table has not."""
    data = config.data
    wanted = {
        *data.contrasts,
        *(label.column or data.label_column for label in data.labels.values()),
    }
    wanted |= {k for k, c in config.metadata.items() if c.source == "table" and not c.columns}
    if any(c.source == "dicom" for c in config.metadata.values()):
        wanted.add(data.dicom_column)
    _need(table, wanted, found)
    _named_columns(config, table, found)


def _named_columns(config: Config, table: Table, found: Found) -> None:
    """Those of splits, annotations and vectors; patterns of vectors become the names that fit, for good."""
    _need(table, {c for c in (config.splits.column, config.data.annotated_column) if c}, found)
    for name, key in config.metadata.items():
        if key.columns is None:
            continue
        try:
            key.columns = expanded(key.columns, table.columns)
        except ValueError as error:
            found.problems.append(
                f"{table.path}: metadata.{name}.columns: {error}; it has {', '.join(table.columns)}"
            )
            continue
        _need(table, set(key.columns), found)


def _need(table: Table, columns: set[str], found: Found) -> None:
    for column in sorted(columns - set(table.columns)):
        found.problems.append(
            f"{table.path}: no column {column!r}; it has {', '.join(table.columns)}"
            + did_you_mean(column, table.columns)
        )
