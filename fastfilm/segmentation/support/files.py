"""Files that are there whole or not at all: JSON, safetensors and arrays, written beside and moved into place."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastfilm

from .errors import UserError

CHECKSUM, WRITER = "sha256", "fastfilm"
"""Names in a safetensors header: checksum of everything in the file, and the version that wrote it."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types of tensors that can be written, and their names in the format."""


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path in ``path``'s folder (same suffix), moved to ``path`` if the block ends without an error.

    The data are on disk before the move, so that a reader, also after a crash or a full disk, finds the old
    file or the new one. Nothing is left behind when the block raises.

    Raises:
        UserError: the file cannot be written (full disk, read-only folder), with its name and the reason.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=".writing-", suffix="".join(path.suffixes[-2:])
        )
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``text`` as UTF-8, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """``value`` as indented JSON, atomically; NaN and infinity are refused (they are not JSON)."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """``value`` as indented JSON; NaN and infinity are refused (they are not JSON)."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: no such file, or not JSON (NaN and infinity are not), with the file's name.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: not JSON of ours: nested too deeply") from error


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def write_array(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """``array`` as .npy, atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """``tensors`` as safetensors, atomically; ``metadata`` goes into the file's header.

    A checksum over names, types, shapes, bytes and metadata goes there too, for ``read_tensors``. The same tensors
    make the same file, byte for byte (the format's own library lays metadata out in an order of chance).
    """
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    about = {**(metadata or {}), WRITER: fastfilm.__version__}
    header: dict[str, Any] = {"__metadata__": about | {CHECKSUM: _checksum(plain, about)}}
    end = 0
    for name in _layout(plain):
        begin, end = end, end + plain[name].nbytes
        header[name] = {
            "dtype": _DTYPES[plain[name].dtype],
            "shape": list(plain[name].shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    # tensors begin at a multiple of 8
    head += b" " * (-len(head) % 8)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in _layout(plain):
            file.write(_bytes(plain[name]))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and header metadata of a safetensors file; executes nothing.

    A file without a checksum (of fastfilm before format 2, or of another library) is taken as it is.

    Raises:
        UserError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            about = dict(file.metadata() or {})
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error
    # both or neither: damage to one of the names shows by the other
    if CHECKSUM in about or WRITER in about:
        checksum = about.pop(CHECKSUM, None)
        if WRITER not in about or checksum != _checksum(tensors, about):
            raise UserError(f"{path}: damaged: the content does not match the file's checksum")
        del about[WRITER]
    return tensors, about


def _layout(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names in the order of the file: large elements first, so that each is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    names = _layout(tensors)
    outline = [[n, _DTYPES.get(tensors[n].dtype), list(tensors[n].shape)] for n in names]
    digest = hashlib.sha256(json.dumps([outline, metadata], sort_keys=True).encode())
    for name in names:
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()
