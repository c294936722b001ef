"""Files that are there whole or not at all: JSON, safetensors and arrays, written beside and moved into place."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .errors import UserError


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
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: no such file, or not JSON, with the file's name.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from error


def write_array(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """``array`` as .npy, atomically."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """``tensors`` as safetensors, atomically; ``metadata`` goes into the file's header."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        # safetensors refuses two names for one memory (weights that generators share)
        plain[name] = t.clone() if t.numel() and t.data_ptr() in seen else t
        seen.add(t.data_ptr())
    with atomic(path) as temporary:
        try:
            save_file(plain, temporary, dict(metadata) if metadata is not None else None)
        except SafetensorError as error:
            # it wraps the system's errors
            raise UserError(f"{path}: cannot be written: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (on the CPU) and header metadata of a safetensors file; executes nothing.

    Raises:
        UserError: no such file, or a damaged one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from error
