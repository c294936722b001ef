"""Tables of measured choices: the one that ships for an architecture, the user's own, and a lookup.

A table is a JSON file:

    {"format": 1, "architecture": "sm_90", "measured_on": {"device": …, "triton": …, …},
     "entries": {"bfloat16-2d-k3s1-ci64-co64-v1048576":
         {"plan": "triton/fused", "tiles": {"fprop": [8, 16, 64, 64, 8, 2]}, "seconds": {"triton/fused": 1e-3}}}}

An entry says which backend and route were the fastest for a bucket of shapes, and the tiles that the Triton
kernels take there (the fields of their ``Config``: tile, warps, stages). ``fastfilm tune`` makes the user's table;
what it holds stands in front of the shipped one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..spec import constant_when_compiled
from . import environment

FORMAT = 1
FAMILIES = ("fprop", "dgrad", "wgrad")
SHIPPED = Path(__file__).with_name("tuned")


class Key(NamedTuple):
    """A bucket of convolutions: channels and output voxels (batch included) as powers of two, rounded up."""

    dtype: torch.dtype
    dims: int
    kernel: int
    stride: int
    cin: int
    cout: int
    voxels: int

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{name}-{self.dims}d-k{self.kernel}s{self.stride}"
            f"-ci{self.cin}-co{self.cout}-v{self.voxels}"
        )


_NUMBER = "(0|[1-9][0-9]*)"
_KEY = re.compile(
    f"([a-z0-9_]+)-{_NUMBER}d-k{_NUMBER}s{_NUMBER}-ci{_NUMBER}-co{_NUMBER}-v{_NUMBER}"
)
_DTYPES = {
    str(t).removeprefix("torch."): t for t in vars(torch).values() if isinstance(t, torch.dtype)
}


class Entry(NamedTuple):
    """The fastest ``plan`` ("backend/route"), tiles by kernel family, and ``seconds`` of each plan."""

    plan: str
    tiles: Mapping[str, tuple[int, ...]]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """Entries by key, and what they were measured on."""

    architecture: str
    measured_on: Mapping[str, str] = field(default_factory=dict)
    entries: Mapping[Key, Entry] = field(default_factory=dict)

    def merged(self, other: Table) -> Table:
        """This table with the entries of ``other`` in front."""
        about = {**self.measured_on, **other.measured_on}
        return Table(self.architecture, about, {**self.entries, **other.entries})


def key(
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    output: Sequence[int],
) -> Key:
    """The bucket of a convolution; ``channels`` are those of the input and of the output."""
    cin, cout = channels
    voxels = batch * math.prod(output)
    return Key(
        dtype,
        len(kernel),
        kernel[0],
        stride[0],
        1 << (cin - 1).bit_length(),
        1 << (cout - 1).bit_length(),
        1 << (voxels - 1).bit_length(),
    )


def parse_key(text: str) -> Key:
    """The key of a file's entry.

    Raises:
        ValueError: text that is none.
    """
    found = _KEY.fullmatch(text)
    dtype = None if found is None else _DTYPES.get(found[1])
    if found is None or dtype is None:
        raise ValueError(f"{text!r} is no key of a table of measured choices")
    return Key(dtype, *map(int, found.groups()[1:]))


def read(path: Path) -> Table:
    """A table from its file.

    Raises:
        OSError: it cannot be read.
        ValueError: what it holds is no table of this format; names the file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format must be {FORMAT}, got {data['format']!r}")
        entries = {parse_key(k): _entry(v) for k, v in data["entries"].items()}
        return Table(str(data["architecture"]), dict(data["measured_on"]), entries)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a table of measured choices: {error}") from None


def _entry(value: Mapping[str, Any]) -> Entry:
    plan = value["plan"]
    if not isinstance(plan, str) or plan.count("/") != 1:
        raise ValueError(f"plan must be BACKEND/ROUTE, got {plan!r}")
    tiles = {f: tuple(value["tiles"][f]) for f in FAMILIES if f in value["tiles"]}
    return Entry(plan, tiles, value["seconds"])


def write(table: Table, path: Path) -> None:
    """Writes a table, to a neighbour first: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head: dict[str, Any] = {"format": FORMAT, "architecture": table.architecture}
    head["measured_on"] = dict(table.measured_on)
    lines = ",\n".join(
        f"{json.dumps(str(k))}: {json.dumps({'plan': e.plan, 'tiles': e.tiles, 'seconds': e.seconds})}"
        for k, e in sorted(table.entries.items(), key=lambda item: str(item[0]))
    )
    text = f'{json.dumps(head)[:-1]}, "entries": {{\n{lines}\n}}}}\n'
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def merge_into(path: Path, table: Table) -> Table:
    """Adds a table's entries to a file's, which may not exist yet, and writes it."""
    before = read(path) if path.exists() else Table(table.architecture)
    if before.architecture != table.architecture:
        raise ValueError(
            f"{path} holds choices for {before.architecture}, got {table.architecture}"
        )
    whole = before.merged(table)
    write(whole, path)
    return whole


def user_path(architecture: str) -> Path:
    """Where the user's table lies: in FASTFILM_TUNED, else the user's cache folder."""
    folder = environment.read("FASTFILM_TUNED")
    if folder is not None:
        return Path(folder) / f"{architecture}.json"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastfilm" / "tuned" / f"{architecture}.json"


def architecture() -> str | None:
    """Of the current GPU: "sm_90" and the like; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def about() -> dict[str, str]:
    """The facts that a measurement on this machine depends on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    triton = environment.installed("triton")
    return {"device": name, "torch": torch.__version__, "triton": triton}


def stale(table: Table) -> str | None:
    """Why a user's table does not hold here: another GPU or another Triton compiled its tiles."""
    here = about()
    for name in ("device", "triton"):
        then = table.measured_on.get(name)
        if then != here[name]:
            return f"it was measured with {name} {then}, here is {here[name]}"
    return None


def _own(arch: str) -> tuple[Path, Table | None, str | None]:
    """The user's table: where it lies, itself if it can be read, and why it is not used if it is not."""
    path = user_path(arch)
    if not path.exists():
        return path, None, None
    try:
        table = read(path)
    except (OSError, ValueError) as error:
        return path, None, str(error)
    return path, table, stale(table)


def load(arch: str | None) -> Mapping[Key, Entry]:
    """The entries in force for an architecture; a user's table that cannot be used is left out with a warning."""
    if arch is None:
        return {}
    path = SHIPPED / f"{arch}.json"
    found = dict(read(path).entries) if path.exists() else {}
    own, table, reason = _own(arch)
    if reason is not None:
        warnings.warn(f"fastfilm: {own} is not used: {reason}", RuntimeWarning, stacklevel=2)
    elif table is not None:
        found |= table.entries
    return found


@functools.cache
def in_force() -> Mapping[Key, Entry]:
    """The entries for the GPU that is current when they are first asked for."""
    return load(architecture())


_tried: dict[Key, Entry] = {}


@contextlib.contextmanager
def trying(entries: Mapping[Key, Entry]) -> Iterator[None]:
    """Other entries in front of those in force, for a measurement of them."""
    before = dict(_tried)
    _tried.update(entries)
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def find(wanted: Key) -> Entry | None:
    """The entry of a bucket; None where nothing was measured."""
    if torch.compiler.is_compiling():
        return _constant(*wanted)
    return (_tried and _tried.get(wanted)) or in_force().get(wanted)


@constant_when_compiled
def _constant(*bucket: Any) -> Entry | None:
    """``find`` as a compiler takes it, which cannot follow a table into its file."""
    wanted = Key(*bucket)
    return (_tried and _tried.get(wanted)) or in_force().get(wanted)


def measured(
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    output: Sequence[int],
) -> Entry | None:
    """The entry that was the fastest on this kind of GPU; None where nothing was measured."""
    if not output:
        return None
    return find(key(dtype, batch, channels, kernel, stride, output))


def describe() -> list[tuple[str, str]]:
    """For ``fastfilm info``: how many choices are known for this machine's GPU, and from where."""
    arch = architecture()
    if arch is None:
        return [("measured choices", "not used without a CUDA device")]
    shipped = SHIPPED / f"{arch}.json"
    count = len(read(shipped).entries) if shipped.exists() else 0
    rows = [("measured choices", f"{count} ship for {arch}")]
    own, table, reason = _own(arch)
    if table is None:
        said = f"no table of the user's at {own}" if reason is None else f"not used: {reason}"
    else:
        said = f"{len(table.entries)} in {own}" + (f", not used: {reason}" if reason else "")
    return [*rows, ("", said)]
