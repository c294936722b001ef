"""Bad inputs: small editors of a data set, a plan or a model folder, and what must come of them."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from fastfilm.__main__ import main

from .phantoms import settings, write_bids

Change = Callable[["World"], Any]
"""Changes the world; may return the arguments of the command as a list."""

Row = tuple[str, Change, str]
"""Name, change, and the expected message (a pattern)."""

Capsys = pytest.CaptureFixture[str]


class World:
    """A data set, its plan, a model, predictions and their evaluation, in a folder of their own.

    Attributes:
        root: of everything.
        out: what a command is asked to write; nothing may be there afterwards.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "OUT"

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def image(self, i: int, contrast: str = "FLAIR") -> Path:
        """A subject's image."""
        return self.bids / f"sub-{i:02d}" / "anat" / f"sub-{i:02d}_{contrast}.nii.gz"

    def label(self, i: int) -> Path:
        """A subject's label file."""
        name = f"sub-{i:02d}"
        folder = self.bids / "derivatives" / "labels" / name / "anat"
        return folder / f"{name}_FLAIR_dseg.nii.gz"

    @property
    def table(self) -> Path:
        """participants.tsv."""
        return self.bids / "participants.tsv"

    def settings(self, **sections: Any) -> str:
        """The path of a configuration whose sections are changed."""
        path = self.root / "config.yaml"
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        value["data"]["root"] = str(self.bids)
        for name, section in sections.items():
            old = value.get(name)
            both = isinstance(section, dict) and isinstance(old, dict)
            value[name] = {**old, **section} if both else section
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        return str(path)


def voxels(path: Path, edit: Callable[[Any], Any], affine: Any = None) -> None:
    """Writes an image anew with ``edit`` applied to its array, or with another affine."""
    old = nib.load(path)
    made = nib.Nifti1Image(
        edit(np.asarray(old.dataobj).copy()), old.affine if affine is None else affine
    )
    made.header.set_xyzt_units(xyz="mm")
    nib.save(made, path)


def poke(path: Path, value: Any, dtype: Any = None) -> None:
    """One voxel of an image gets another value."""

    def edit(array: Any) -> Any:
        array = array if dtype is None else array.astype(dtype)
        array[0, 0, 0] = value
        return array

    voxels(path, edit)


def flip(path: Path, at: float = 0.5) -> None:
    """One bit of a file, at this share of its length (negative: so many bytes before the end)."""
    data = bytearray(path.read_bytes())
    data[int(at) if at < 0 else int(at * len(data))] ^= 16
    path.write_bytes(data)


def header(path: Path, **fields: Any) -> None:
    """Fields of a compressed NIfTI header, unchecked."""
    data = gzip.decompress(path.read_bytes())
    block = nib.Nifti1Header(data[:348], check=False)
    for name, value in fields.items():
        block[name] = value
    path.write_bytes(gzip.compress(block.binaryblock + data[348:]))


def cut(path: Path, share: float = 0.5) -> None:
    """A file loses its end."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def replace(path: Path, old: str, new: str) -> None:
    """In a text file; what is replaced must be there."""
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{old!r} is not in {path}"
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """A JSON file's value is changed in place, or replaced by what ``change`` returns."""
    value = json.loads(path.read_text(encoding="utf-8"))
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def annexed(path: Path) -> None:
    """A link to nowhere in a file's place."""
    path.unlink(missing_ok=True)
    path.symlink_to("../.git/annex/objects/xx/yy/MD5E-s1--0.nii.gz")


def bomb(path: Path, shape: tuple[int, ...] = (30000, 30000, 3000)) -> None:
    """A small file whose header promises terabytes."""
    block = nib.Nifti1Header()
    block.set_data_shape(shape)
    block.set_data_dtype(np.float32)
    block["vox_offset"] = 352
    path.write_bytes(gzip.compress(block.binaryblock + bytes(5000)))


def write_world(root: Path) -> Path:
    """A data set and a configuration."""
    config = settings(write_bids(root / "bids"), training={"epochs": 1, "steps_per_epoch": 1})
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return root


def copied(source: Path, to: Path) -> World:
    shutil.copytree(source, to, symlinks=True)
    return World(to)


def refused(world: World, change: Change, message: str, capsys: Capsys, default: list[str]) -> None:
    """After a change, the command ends with status 1 and the message, and ``world.out`` is not there.

    Args:
        default: the command, unless ``change`` returns another one.
    """
    argv = change(world)
    capsys.readouterr()
    status = main(argv if isinstance(argv, list) else default)
    text = " ".join(capsys.readouterr().err.split())
    assert status == 1 and re.search(message, text), f"{status}: {text[:1500]}"
    assert "Traceback" not in text
    assert not world.out.exists(), sorted(world.out.rglob("*"))


def table(rows: list[Row]) -> Any:
    return pytest.mark.parametrize(
        ("change", "message"), [pytest.param(r[1], r[2], id=r[0].replace(" ", "_")) for r in rows]
    )
