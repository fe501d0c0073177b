"""Files of a data set: names that stay inside its folder, and opening that never blocks."""
from __future__ import annotations

import os
import re
import stat
from typing import BinaryIO

from ..errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def resolve(base: str, value: object, allow_outside: bool = False) -> str:
    """The path of the file that a row of metadata names, inside the folder ``base`` once all links are followed.

    An empty ``base`` means that there is no folder to stay inside: the name is taken as it stands.

    Raises: DataError for a URL, for something that is no file name, and for a path that leaves ``base`` by ``..``, by
    being absolute or through a symbolic link (unless ``allow_outside``).
    """
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in os.fspath(value):
        raise DataError(f"{value!r} is not a file name; expected the path of a file below the data folder. Correct it")
    value = os.fspath(value)
    if _URL.match(value):
        raise DataError(f"{value} is a URL; expected a file in the data folder. Download it and name the local file")
    path = os.path.join(base, value)
    if not base or allow_outside:
        return path
    real = os.path.realpath(path)
    if not real.startswith(os.path.join(os.path.realpath(base), "")):
        raise DataError(
            f"{value} leaves the data folder {base} (it leads to {real}). Move the file into the folder, "
            "or pass allow_outside_base=True if you trust this metadata"
        )
    return path


def open_regular(path: str) -> BinaryIO:
    """Open a regular, non-empty file for reading.

    O_NONBLOCK, because opening a named pipe for reading otherwise waits for a writer for ever.

    Raises: DataError when the file is missing, unreadable, empty, or is a folder, pipe, socket or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Put the file there, or correct its name") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}). Make it a readable regular file") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_size:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} has zero bytes. Copy or download it again, or remove it")
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
    raise DataError(f"{path} is {kind}; expected a regular file. Name a file, or remove it")


def read_text(path: str) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises: DataError when it is not UTF-8."""
    with open_regular(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte 0x{byte:02x} at offset {error.start}). Save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path} line {line} holds a NUL character. Save the file as plain UTF-8 text")
    return text
