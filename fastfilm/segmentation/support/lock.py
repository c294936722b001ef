"""Locks on folders: a model folder, a plan or a folder of predictions is written by one process at a time."""

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
"""Errors of file systems without locks."""

# (process, device, inode) of the locked folders: the operating system's locks do not keep their own process out.
# The process id keeps a forked child from taking its parent's locks for its own.
_mine: set[tuple[int, int, int]] = set()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keeps other processes from writing to ``folder`` inside the block; creates the folder if it is missing.

    The operating system locks the file ``.lock`` and releases it when the process ends, however it ends; the file
    of a killed process is taken over. On a file system without locks the file itself is the lock; it is taken over
    if it names a process of this machine that has ended. A folder created here that is empty afterwards is
    removed.

    Args:
        what: the command that writes, for the message to other processes.

    Raises:
        Busy (a UserError): another process, or another block of this process, holds the lock.
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
            # removed while still locked: a process that waits for this file sees that another one replaced it
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()
            os.close(handle)
    finally:
        _mine.discard(key)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(folder: Path, what: str) -> int:
    """Opens, locks and fills in the lock file; returns its file descriptor."""
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
                    # another process that found the same abandoned file would have replaced this one by now
                    time.sleep(0.1)
                else:
                    _fill(handle, what)
                # its holder may have removed the file between opening and locking it
                if _is(handle, folder / NAME):
                    undo.pop_all()
                    return handle
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _take_file(path: Path, what: str) -> int:
    """Takes the lock on a file system without locks, by creating the file."""
    holder = _read(path)
    # an empty file was created by the attempt to lock it
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
    """The lock's holder; waits up to a second for a process that has just taken the lock to write its record."""
    for _ in range(20):
        holder = _read(path)
        if holder is not None and not _gone(holder):
            return holder
        time.sleep(0.05)
    return None


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the process in a record is known to have ended."""
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
