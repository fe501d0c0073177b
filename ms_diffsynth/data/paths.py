"""Files of a data set: names that stay inside its folder, and opening that never blocks."""
from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from functools import lru_cache
from typing import BinaryIO

from ..errors import DataError, listing

LONGEST_TEXT = 1 << 30  # bytes: a hundred times the metadata of a million rows
LONGEST_NAME = 4096  # bytes: PATH_MAX of Linux

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def resolve(base: str, value: object, allow_outside: bool = False) -> str:
    """The path of the file that a row of metadata names, inside the folder ``base`` once all links are followed.

    An empty ``base`` means that no folder restricts the name: it is used unchanged.

    Raises: DataError for a URL, for something that is not a file name, and for a path that leaves ``base`` by ``..``,
    by being absolute or through a symbolic link (unless ``allow_outside``).
    """
    if not _is_name(value):
        raise DataError(
            f"{shorten(value)} is not a file name; expected the path of a file below the data folder, in UTF-8 and "
            "without control characters. Correct it"
        )
    value, shown = os.fspath(value), plain(os.fspath(value), 200)
    if _URL.match(value):
        raise DataError(f"{shown} is a URL; expected a file in the data folder. Download it and name the local file")
    path = os.path.join(base, value)
    if "\\" in value and os.sep == "/" and not os.path.lexists(path):
        raise DataError(f"{shown} does not exist, and a \\ is a part of a name here. Write / between folders")
    if not base or allow_outside:
        return path
    real = os.path.realpath(path)
    if not real.startswith(os.path.join(os.path.realpath(base), "")):
        raise DataError(
            f"{shown} leaves the data folder {base} (it leads to {plain(real, 200)}). Move the file into the folder, "
            "or set allow_outside_base=true if you trust what names it"
        )
    return path


def path_problem(path: str) -> str:
    """What was expected of a path that the system cannot even look for, or an empty string."""
    try:
        os.lstat(path)
    except (ValueError, OSError) as error:  # a NUL, or half a pair: the system was not asked
        number = getattr(error, "errno", None)
        if number in (None, errno.ENAMETOOLONG, errno.ELOOP):
            what = error.strerror if isinstance(error, OSError) else "it holds what no path can"
            return f"expected a path of this system ({what.lower()})"
    return ""


def _is_name(value: object) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    try:
        return 0 < len(os.fspath(value).encode()) <= LONGEST_NAME and not _CONTROL.search(os.fspath(value))
    except UnicodeEncodeError:  # half a surrogate pair: no text, or how Python shows a byte that is not UTF-8
        return False


def shorten(value: object, most: int = 60) -> str:
    """A value as Python writes it, control characters escaped, at most ``most`` characters of it."""
    text = repr(value)
    return text if len(text) <= most else text[:most - 3] + "..."


def plain(name: str, most: int = 60) -> str:
    """A name unchanged, or shortened and escaped when it is long or holds what does not print."""
    return name if len(name) <= most and name.isprintable() else shorten(name, most)


def fold(name: str) -> str:
    """What two names have in common that differ only in case or in Unicode form."""
    return unicodedata.normalize("NFC", name).casefold()


def lookalike(base: str, name: str) -> str:
    """`` There is 'IMG.PNG', which differs in case`` for a file below ``base`` that is not there; or nothing."""
    found = "/" if os.path.isabs(name) else ""
    for part in name.split("/"):
        path = os.path.join(base, found, part)
        if not os.path.lexists(path):
            folder = os.path.dirname(path) or "."
            try:
                same = _entries(folder, os.stat(folder).st_mtime_ns).get(fold(part))
            except (OSError, ValueError):
                same = None
            if not same:
                return ""
            part = same
        found = os.path.join(found, part)
    if unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", name):
        return f" There is {found!a}, which differs in Unicode form from {name!a}: rename one"
    return f" There is {shorten(found, 200)}, which differs in case: rename one"


@lru_cache(maxsize=16)
def _entries(folder: str, mtime: int) -> dict[str, str]:
    """The names in a folder by what `fold` leaves of them. ``mtime`` tells a folder that changed."""
    return {fold(name): name for name in sorted(os.listdir(folder))}


def open_regular(path: str, may_be_empty: bool = False) -> BinaryIO:
    """Open a regular file for reading; one of zero bytes only when it ``may_be_empty``.

    O_NONBLOCK, because opening a named pipe for reading otherwise waits for a writer forever.

    Raises: DataError when the file is missing, unreadable, empty, or is a folder, pipe, socket or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. Put the file there, or correct its name") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened ({error.strerror}). Make it a readable regular file") from error
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (status.st_size or may_be_empty):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISREG(status.st_mode):
        raise DataError(f"{path} has zero bytes. Copy or download it again, or remove it")
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
    raise DataError(f"{path} is {kind}; expected a regular file. Name a file, or remove it")


def read_text(path: str, may_be_empty: bool = False) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises: DataError when it is not UTF-8."""
    with open_regular(path, may_be_empty) as file:
        if (size := os.fstat(file.fileno()).st_size) > LONGEST_TEXT:
            raise DataError(f"{path} has {size} bytes; expected at most {LONGEST_TEXT}. Name a text file")
        content = file.read()
    try:
        text = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        lines = [number for number, line in enumerate(content.split(b"\n"), 1)
                 if line.decode(errors="ignore").encode() != line]
        raise DataError(
            f"{path} line {lines[0]} is not UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start})"
            f"{_more_lines(lines)}. Save the file as UTF-8"
        ) from None
    if "\0" in text:
        lines = [number for number, line in enumerate(text.split("\n"), 1) if "\0" in line]
        raise DataError(f"{path} line {lines[0]} holds a NUL character{_more_lines(lines)}. Save the file as plain "
                        "UTF-8 text")
    return text


def _more_lines(lines: list[int]) -> str:
    return f"; the same in line {listing(lines[1:])}" if len(lines) > 1 else ""
