"""``fastfilm predict``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fastfilm.segmentation.commands.options import Device, Threads
from fastfilm.segmentation.data.sources import SUFFIXES
from fastfilm.segmentation.images.preprocessing import AXES
from fastfilm.segmentation.metadata.encoder import MetadataError, is_missing
from fastfilm.segmentation.models.folder import LoadedModel, load_model
from fastfilm.segmentation.prediction.averaging import parse_prior
from fastfilm.segmentation.prediction.inputs import (
    InputCase,
    find_inputs,
    parse_meta,
)
from fastfilm.segmentation.prediction.many_cases import (
    Outcome,
    Writing,
    drop_results,
    predict_cases,
    resolved,
)
from fastfilm.segmentation.prediction.one_case import Options
from fastfilm.segmentation.prediction.swap import (
    case_under,
    shown,
    swap_values,
    write_swap,
)
from fastfilm.segmentation.support import devices
from fastfilm.segmentation.support import threads as cpu
from fastfilm.segmentation.support.console import bar, say
from fastfilm.segmentation.support.errors import UserError
from fastfilm.segmentation.support.hints import some
from fastfilm.segmentation.support.lock import locked
from fastfilm.segmentation.support.names import file_name


def command(
    model: Annotated[Path, typer.Argument(help="model folder")],
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="image, folder of images, BIDS folder, or plan")
    ],
    out: Annotated[Path, typer.Argument(help="folder to write to (or OUT.nii.gz for one image)")],
    meta: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for all cases, before table and sidecar")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="metadata (.tsv or .csv); none: IN/participants.tsv")
    ] = None,
    swap: Annotated[
        str | None,
        typer.Option(help="predict under every value of this metadata KEY (or KEY=VALUE,VALUE…)"),
    ] = None,
    fold: Annotated[int, typer.Option(help="IN is a plan: of this fold")] = 0,
    part: Annotated[str, typer.Option(help="IN is a plan: train, val or test cases")] = "val",
    weights: Annotated[str, typer.Option(help="best or final")] = "best",
    flip: Annotated[
        list[str] | None,
        typer.Option(help="also mirrored across this plane: sagittal, coronal, axial; repeat"),
    ] = None,
    overlap: Annotated[float, typer.Option(help="of windows, share of their size")] = 0.5,
    samples: Annotated[
        int, typer.Option(help="dropout samples; more than 0 writes uncertainty maps")
    ] = 0,
    seed: Annotated[int, typer.Option(help="of the dropout samples")] = 0,
    missing: Annotated[
        str, typer.Option(help="metadata without a value: unknown, or average over their values")
    ] = "unknown",
    prior: Annotated[
        list[str] | None,
        typer.Option(help="average: KEY=VALUE:WEIGHT,VALUE:WEIGHT; none: as often as in training"),
    ] = None,
    keep_largest: Annotated[
        bool, typer.Option("--keep-largest", help="the largest component of each label alone")
    ] = False,
    fill_holes: Annotated[
        bool, typer.Option("--fill-holes", help="of each label, holes are filled")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="write them as well")
    ] = False,
    batch: Annotated[int | None, typer.Option(help="windows at once")] = None,
    device: Device = None,
    threads: Threads = None,
    continue_: Annotated[
        bool, typer.Option("--continue", help="leave alone what is there already")
    ] = False,
) -> int:
    """Segments images with a trained model, on their own grid and with their own header.

    A case that fails does not stop the others; the failures are listed at the end and the exit status is 1.
    """
    for plane in flip or []:
        if plane not in AXES:
            raise UserError(f"--flip must be one of {', '.join(AXES)}, got {plane!r}")
    if not 0 <= overlap < 1:
        raise UserError(f"--overlap must be at least 0 and below 1, got {overlap}")
    if samples < 0 or (batch is not None and batch < 1):
        raise UserError(f"--samples and --batch must not be negative, got {samples} and {batch}")
    if missing not in ("unknown", "average"):
        raise UserError(f"--missing must be unknown or average, got {missing!r}")
    if swap is not None and missing == "average":
        raise UserError(
            "--swap feeds every value, unknown too: it goes with --missing unknown, not with average"
        )
    chosen = devices.choose(device)
    cpu.use(threads, chosen)
    loaded = load_model(model, chosen, weights)
    given = parse_meta(meta or [], loaded)
    options = Options(
        overlap,
        batch,
        tuple(flip or ()),  # type: ignore[arg-type]
        samples,
        seed,
        missing,  # type: ignore[arg-type]
        parse_prior(prior or [], loaded),
    )
    writing = Writing(keep_largest, fill_holes, probabilities)
    single = out.name.endswith(SUFFIXES)
    if single and (not source.is_file() or swap):
        raise UserError(
            f"{out}: with {'--swap' if swap else 'several images'} OUT must be a folder"
        )
    if single and continue_:
        raise UserError("--continue is for folders")
    notes: list[str] = []
    cases = find_inputs(
        source, loaded.info, meta=given, table=table, fold=fold, part=part, notes=notes
    )
    for note in notes:
        say(f"note: {note}")
    if swap is not None:
        key, values = swap_values(swap, loaded)
        named = [(v, shown(v, loaded.encoder.values(key))) for v in values]
        folders = [(out / file_name(f"{key}={name}"), v) for v, name in named]
        listed = [
            {"value": name, "folder": f.name}
            for (_, name), (f, _) in zip(named, folders, strict=True)
        ]
        jobs: list[tuple[Path, Any]] = [
            (f, [case_under(c, key, v) for c in cases]) for f, v in folders
        ]
        true = {c.id: resolved(loaded, c.metadata).get(key) for c in cases}
        extra = {"swap": {"key": key, "true": true}}
    else:
        jobs, extra, listed = [(out, cases)], {}, []
    _say_unknown(loaded, cases, "" if swap is None else swap.partition("=")[0], options)
    if single:
        if out.resolve() in [p.resolve() for p in cases[0].images if p is not None]:
            raise UserError(f"{out}: is the image itself: give another name")
        jobs = [(out.parent, cases)]
        cases[0].file, cases[0].suffix = _split(out)
    total = Outcome()
    with contextlib.nullcontext() if single else locked(out, "fastfilm predict"):
        for folder, these in jobs:
            with bar(f"predicting {folder.name}") as progress:
                outcome = predict_cases(
                    loaded,
                    these,
                    folder,
                    options,
                    writing,
                    go_on=continue_,
                    extra=extra,
                    listed=not single,
                    remarks=total.remarks,
                    progress=progress,
                )
            total.done += outcome.done
            total.kept += outcome.kept
            where = f"{folder.name}: " if swap else ""
            total.failed |= {f"{where}{k}": v for k, v in outcome.failed.items()}
            total.timing.network += outcome.timing.network
            total.timing.around += outcome.timing.around
        if swap is not None:
            drop_results(out)
            write_swap(out, extra["swap"], listed)
    return _report(total, out)


def _split(out: Path) -> tuple[str, str]:
    """A file's name without its ending, and the ending."""
    end = next(s for s in SUFFIXES if out.name.endswith(s))
    if out.name == end:
        raise UserError(f"{out}: needs a name before {end}")
    return out.name.removesuffix(end), end


def _say_unknown(
    model: LoadedModel, cases: Sequence[InputCase], but: str, options: Options
) -> None:
    """A line for each key that is not known: a forgotten table shall not pass for a known value."""
    average = options.missing == "average"
    for name in model.metadata_keys():
        key = model.encoder[name]
        if name == but:
            continue
        without, unseen, outside = [], [], []
        for case in cases:
            value = case.metadata.get(name)
            # a value that cannot be taken is said with its case
            with contextlib.suppress(MetadataError):
                if is_missing(value, key):
                    without.append(case.id)
                elif key.unseen_value(value):
                    unseen.append(f"{case.id} ({value})")
                elif key.outside(value):
                    outside.append(f"{case.id} ({value})")
        for found, text in (
            (
                without if key.unknown or average else [],
                "is missing, and averaged over," if average else "is unknown",
            ),
            (unseen, "has a value that was not in training, and counts as unknown,"),
            (outside, f"is outside the training's range ({key.range_text()})"),
        ):
            if found:
                say(f"{name} {text} in {len(found)} of {len(cases)} cases: {some(found)}")


def _report(total: Outcome, out: Path) -> int:
    t = total.timing
    kept = f", {len(total.kept)} were there" if total.kept else ""
    speed = (
        f"; {t.network:.1f} s in the network, {t.overhead:.1%} more around it" if t.network else ""
    )
    for line in total.remarks.lines():
        say(f"note: {line}")
    say(f"{out}: {len(total.done)} predicted{kept}{speed}")
    if total.failed:
        lines = "\n".join(f"  - {case}: {why}" for case, why in total.failed.items())
        print(f"fastfilm predict: {len(total.failed)} failed:\n{lines}", file=sys.stderr)
        return 1
    return 0
