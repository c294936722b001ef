"""One writer a folder: a model folder, a plan or a folder of predictions is written by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

NAME = ".lock"


class Busy(UserError):
    """Another process, or another block of this one, holds the lock."""


NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How file systems without locks answer."""

# (process, device, inode) of folders that are locked: a lock of the system does not keep its own process out.
# With the process in it, a forked child does not take its parent's locks for its own.
_mine: set[tuple[int, int, int]] = set()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """No other process writes to ``folder`` inside the block; the folder is made if it is not there.

    The lock is one of the system's on the file ``.lock``, which ends with the process however it ends; a file left
    by a killed process is taken over. On a file system without locks the file itself is the lock, and it counts as
    left behind if its process on this machine is gone. A folder that is empty afterwards and was made here is
    removed.

    Args:
        what: the command that writes, for the message that others get.

    Raises:
        Busy (a UserError): another process (or another block of this one) writes to it.
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    made = not folder.exists()
    if not made and not folder.is_dir():
        raise UserError(f"{folder}: cannot be written: is not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error
    key = (os.getpid(), status.st_dev, status.st_ino)
    if key in _mine:
        raise Busy(_refusal(folder, _read(folder / NAME)))
    _mine.add(key)
    try:
        handle = _take(folder, what)
        try:
            yield
        finally:
            # removed while it is still held: who waits for the old file sees that it is not the folder's any more
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()
            os.close(handle)
    finally:
        _mine.discard(key)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(folder: Path, what: str) -> int:
    """The open lock file, locked and filled in."""
    try:
        while True:
            with contextlib.ExitStack() as undo:
                handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                undo.callback(os.close, handle)
                try:
                    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EACCES, errno.EAGAIN):
                        raise Busy(_refusal(folder, _record(folder / NAME))) from None
                    if error.errno not in NO_LOCKS:
                        raise
                    undo.close()
                    handle = _take_file(folder / NAME, what)
                    undo.callback(os.close, handle)
                    # another one who found the same file left behind would have replaced this one by now
                    time.sleep(0.1)
                else:
                    _fill(handle, what)
                # the one who held it may have removed the file between opening and locking it
                if _is(handle, folder / NAME):
                    undo.pop_all()
                    return handle
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _take_file(path: Path, what: str) -> int:
    """Without locks of the system: who makes the file has it."""
    holder = _read(path)
    # an empty one was made by the attempt to lock it
    if holder is not None and not _gone(holder):
        raise Busy(f"{_refusal(path.parent, holder)}; if it is gone, remove {path}")
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    _fill(handle, what)
    return handle


def _fill(handle: int, what: str) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": what,
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)


def _is(handle: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return None


def _record(path: Path) -> dict[str, Any] | None:
    """Who holds the lock; waits a moment for one who has just got it to say so."""
    for _ in range(20):
        holder = _read(path)
        if holder is not None and not _gone(holder):
            return holder
        time.sleep(0.05)
    return None


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the process of a record is known not to be there any more."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _refusal(folder: Path, holder: dict[str, Any] | None) -> str:
    who = "another process"
    if holder is not None:
        who = (
            f"{holder.get('command')} (process {holder.get('pid')} on {holder.get('host')},"
            f" since {holder.get('since')})"
        )
    return f"{folder}: {who} is writing to it; wait until it ends, or choose another folder"
