"""Text files of users: UTF-8, or a message that says what they are."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (with or without a byte order mark).

    Raises:
        UserError: no such file, a directory, another encoding, an Excel file.
    """
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: {dangling(path)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4096]:
        kind = (
            "UTF-16"
            if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]
            else "binary data"
        )
        raise UserError(f"{path}: is {kind}, not UTF-8 text: save the file as UTF-8")
    if data.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: is an Excel or ZIP file, not text: save the table as CSV (UTF-8)")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}: line {line} is not UTF-8 (byte 0x{data[error.start]:02x}; Latin-1 or Windows-1252?):"
            " save the file as UTF-8"
        ) from error


def dangling(link: Path) -> str:
    """What is said of a link whose target is not there."""
    return (
        f"is a link to {link.readlink()}, which is not there (a file managed by git-annex or DataLad is fetched"
        " with: datalad get FILE)"
    )
