"""What a campaign leaves in its folder: a bundle of everything, the results, the report and its pictures.

A bundle holds the state (``campaign.json``), the output of each step, its rows and the table of measured choices.
Every file is written beside its place and then moved there: a kill leaves the ones from before.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

NAME = "bundle.tar.gz"
KEPT = ("campaign.json", "logs", "steps", "tuned")
PICTURES = SPEED, LAYERS = "speed.png", "layers.png"
MOST = 256 << 10
"""Bytes of a log that are kept: of a longer one the beginning and the end, which say what went wrong."""


def replace(path: Path, data: bytes | str) -> None:
    """Writes a whole file, or leaves the one that is there."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """The same for JSON."""
    replace(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def pack(work: Path) -> bytes:
    """The bundle of a campaign's own folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as bundle:
        for name in KEPT:
            for path in (
                sorted((work / name).rglob("*")) if (work / name).is_dir() else [work / name]
            ):
                if path.is_file() and not path.is_symlink():
                    _add(bundle, path, str(path.relative_to(work)))
    return buffer.getvalue()


def _add(bundle: tarfile.TarFile, path: Path, name: str) -> None:
    data = path.read_bytes()
    if path.suffix in (".log", ".txt") and len(data) > MOST:
        cut = f"\n… {len(data) - MOST} bytes left out …\n".encode()
        data = data[: MOST // 2] + cut + data[-MOST // 2 :]
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    bundle.addfile(entry, io.BytesIO(data))


def unpack(path: Path, work: Path) -> None:
    """A campaign's own folder as its bundle holds it.

    Raises:
        ValueError: a file that is no bundle; names it.
    """
    try:
        with tarfile.open(path, mode="r:gz") as bundle:
            for entry in bundle.getmembers():
                target = (work / entry.name).resolve()
                if not entry.isfile() or not target.is_relative_to(work.resolve()):
                    raise ValueError(f"it holds {entry.name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                found = bundle.extractfile(entry)
                assert found is not None
                with found, target.open("wb") as file:
                    shutil.copyfileobj(found, file)
        json.loads((work / "campaign.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, EOFError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no bundle of a campaign: {error}") from None
