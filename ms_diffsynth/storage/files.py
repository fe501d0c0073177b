"""The one commit protocol: a path holds the old content or the new content, whole, at every moment.

    stage beside the target -> write all -> fsync the data -> rename -> fsync the parent folder

All three are needed: without the fsync of the data a rename can outlive the data it names, and without the fsync of the
folder an acknowledged file can be gone after a power loss. Nothing old is deleted before the new is in place.
"""
from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ms_diffsynth.errors import OutputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stream:
    """Data of which one piece is in memory when it is written.

    Attributes:
        nbytes: of all pieces.
        pieces: makes them, from the first one, whenever it is called.
    """

    nbytes: int
    pieces: Callable[[], Iterator[memoryview]]


Data = bytes | bytearray | memoryview | list[memoryview] | Stream

LEAST_FREE = 16 << 20  # bytes, for the records and the weights of the smallest run

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h
_REMEDIES = {
    errno.ENOSPC: "Free some space or choose another output folder",
    errno.EDQUOT: "Free some of your quota or choose another output folder",
    errno.EACCES: "Choose a folder this user may write to",
    errno.EPERM: "Choose a folder this user may write to",
    errno.EROFS: "Choose a folder on a disk that is mounted for writing",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOTDIR: "A part of the path is a file: choose another output folder",
    errno.EISDIR: "The path is a folder: give the path of a file",
    errno.ENOTEMPTY: "Another run wrote to this folder: choose another output folder",
}


class Calls:
    """The system calls of the protocol, one attribute each, so that a test can make the n-th one fail."""

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    fsync = staticmethod(os.fsync)
    close = staticmethod(os.close)
    mkdir = staticmethod(os.mkdir)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    rmtree = staticmethod(shutil.rmtree)
    truncate = staticmethod(os.ftruncate)

    @staticmethod
    def free(folder: Path) -> int | None:
        """Bytes this user may still write on the disk of ``folder``; None when the file system does not tell."""
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    @staticmethod
    def exchange(a: Path, b: Path) -> None:
        """Swap two paths in one step (Linux renameat2). Raises: OSError, ENOSYS or EINVAL where this cannot be."""
        function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if function is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if function(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(a))


CALLS = Calls()


def write_file(path: str | os.PathLike[str], data: Data, *, calls: Calls = CALLS) -> None:
    """Write a file so that ``path`` never holds less than the old or the new content. Missing folders are made.

    Args:
        data: bytes, or a list of memoryviews or a `Stream` of them, written one after the other.

    Raises: OutputError with the name of the error, bytes needed and free, and the remedy; nothing is left behind.
    """
    path = Path(path)
    needed, buffers = _buffers(data)
    with _explained(path, needed, calls):
        _make_folder(path.parent, calls)
        _check_space(path.parent, needed, calls)
        stage = _beside(path, "tmp")
        try:
            _write_new(stage, buffers, calls)
            calls.rename(stage, path)
        except BaseException:
            _discard(stage, calls.unlink)
            raise
        _sync(path.parent, calls)


def link_or_copy(source: str | os.PathLike[str], path: str | os.PathLike[str], *, calls: Calls = CALLS) -> None:
    """Give a file a second name, which takes no space; where the file system cannot (another disk), copy it.

    Raises: OutputError.
    """
    source, path = Path(source).resolve(), Path(path)
    needed = source.stat().st_size
    with _explained(path, needed, calls):
        try:
            calls.link(source, path)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
                raise
            _check_space(path.parent, needed, calls)
            shutil.copyfile(source, path)


def check_writable(folder: str | os.PathLike[str], *, calls: Calls = CALLS) -> None:
    """Look whether files can be written into a folder, which need not be there yet; nothing is written.

    Raises: OutputError, as `write_file`.
    """
    place = Path(folder).absolute()
    with _explained(place, LEAST_FREE, calls):
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        _check_space(place, LEAST_FREE, calls)


def write_beside(path: str | os.PathLike[str], data: Data, *, calls: Calls = CALLS) -> Path:
    """Write a hidden file into the folder of ``path``, for `Stage.take`; one that is never taken is a leftover.

    Returns: where it is, durable. Raises: OutputError; nothing is left behind.
    """
    stage, (needed, buffers) = _beside(Path(path), "tmp"), _buffers(data)
    with _explained(stage, needed, calls):
        _make_folder(stage.parent, calls)
        _check_space(stage.parent, needed, calls)
        try:
            _write_new(stage, buffers, calls)
        except BaseException:
            _discard(stage, calls.unlink)
            raise
    return stage


class Stage(os.PathLike):
    """A folder being written. ``Path(stage)`` is where it is; everything below it is made durable at the commit."""

    def __init__(self, path: Path, target: Path, calls: Calls):
        self.path = path
        self._target = target
        self._calls = calls

    def __fspath__(self) -> str:
        return str(self.path)

    def write(self, name: str, data: Data) -> None:
        """Write a new file called ``name``, a relative path with forward slashes.

        Raises: OutputError, also when the name leaves the folder or is taken.
        """
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise OutputError(f"{self._target}: the file name '{name}' leads out of the folder. "
                              "Expected a relative name.")
        needed, buffers = _buffers(data)
        file = self.path.joinpath(*parts)
        with _explained(self._target / name, needed, self._calls):
            _check_space(self.path, needed, self._calls)
            _make_folder(file.parent, self._calls)
            _write_new(file, buffers, self._calls)

    def take(self, name: str, file: str | os.PathLike[str]) -> None:
        """Move a file of `write_beside` in as ``name``. Raises: OutputError."""
        with _explained(self._target / name, 0, self._calls):
            self._calls.rename(file, self.path / name)


@contextlib.contextmanager
def stage_folder(path: str | os.PathLike[str], *, replace: bool = False, needed: int = 0,
                 calls: Calls = CALLS) -> Iterator[Stage]:
    """Write a folder as one: it appears at ``path``, complete and durable, when the block ends without an error.

    Args:
        replace: swap an existing folder for the new one; without it, one that is not empty is refused. Where the file
            system cannot swap in one step, the old folder is moved aside first and moved back on an error.
        needed: bytes that will be written, where that is known: refused before the first when they do not fit.

    Raises: OutputError; nothing is left behind, unless the last fsync failed: then it is unknown which of the two
        folders the disk has under which name, and both stay.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path} exists and is not a folder. Choose another output folder.")
    if not replace and path.is_dir() and any(path.iterdir()):
        raise OutputError(f"{path} exists and is not empty. Choose another output folder or move this one away.")
    stage, is_placed = _beside(path, "tmp"), False
    try:
        with _explained(path, needed, calls):
            _make_folder(path.parent, calls)
            _check_space(path.parent, needed, calls)
            calls.mkdir(stage)
        yield Stage(stage, path, calls)
        with _explained(path, 0, calls):
            for parent, _, names in os.walk(stage, topdown=False):
                for name in names:
                    _sync(Path(parent, name), calls)
                _sync(Path(parent), calls)
            _put_in_place(stage, path, calls)
            is_placed = True
            _sync(path.parent, calls)
    except BaseException:
        if not is_placed:
            _discard(stage, calls.rmtree)
        raise
    _discard(stage, calls.rmtree)  # after an exchange, the old folder


def remove_folder(path: str | os.PathLike[str], *, calls: Calls = CALLS) -> bool:
    """Remove a folder so that ``path`` is whole or gone at every moment. What cannot be removed is a warning.

    Returns: whether ``path`` is gone.
    """
    path = Path(path)
    trash = _beside(path, "trash")
    try:
        calls.rename(path, trash)
        _sync(path.parent, calls)  # else a file of it could be gone for good, and the rename be lost
        calls.rmtree(trash)
    except OSError as error:
        logger.warning("%s could not be removed (%s): remove it by hand.", trash if trash.exists() else path, error)
    return not path.exists()


def append_line(path: str | os.PathLike[str], line: str, *, calls: Calls = CALLS) -> None:
    """Append one line to a log, handed to the system before returning. A line torn by a kill is ended first.

    Raises: OutputError; a line that could not be written whole is taken back.
    """
    if "\n" in line:
        raise ValueError(f"one line expected, got {line!r}")
    path = Path(path)
    data = line.encode() + b"\n"
    with _explained(path, len(data), calls):
        file = calls.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            try:
                _write_all(file, memoryview(data), calls)
            except OSError:
                calls.truncate(file, size)
                raise
        finally:
            calls.close(file)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hexadecimal. Raises: OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -- the steps of the protocol -------------------------------------------------------------------------------------


def _buffers(data: Data) -> tuple[int, Iterable[memoryview]]:
    """How many bytes there are, and the bytes."""
    if isinstance(data, Stream):
        return data.nbytes, data.pieces()
    buffers = [memoryview(part).cast("B") for part in (data if isinstance(data, list) else [data])]
    return sum(map(len, buffers)), buffers


def _beside(path: Path, kind: str) -> Path:
    """A new hidden name in the folder of ``path`` that tells its owner; `storage.lock` removes those of dead ones."""
    return path.parent / f".{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _make_folder(folder: Path, calls: Calls) -> None:
    """Make ``folder`` and those above it, each entry durable."""
    if folder.is_dir():
        return
    _make_folder(folder.parent, calls)
    with contextlib.suppress(FileExistsError):  # another rank was faster; a file there fails in the next step
        calls.mkdir(folder)
    _sync(folder.parent, calls)


def _check_space(folder: Path, needed: int, calls: Calls) -> None:
    free = calls.free(folder)
    if free is not None and free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_new(path: Path, buffers: Iterable[memoryview], calls: Calls) -> None:
    file = calls.open(path, _CREATE, 0o666)
    try:
        for buffer in buffers:
            _write_all(file, buffer, calls)
        calls.fsync(file)
    finally:
        calls.close(file)


def _write_all(file: int, buffer: memoryview, calls: Calls) -> None:
    while buffer:
        buffer = buffer[calls.write(file, buffer):]  # one call writes 2 GiB at most


def _sync(path: Path, calls: Calls) -> None:
    file = calls.open(path, os.O_RDONLY)
    try:
        calls.fsync(file)
    finally:
        calls.close(file)


def _put_in_place(stage: Path, path: Path, calls: Calls) -> None:
    if not path.is_dir() or not any(path.iterdir()):
        calls.rename(stage, path)
    else:
        try:
            calls.exchange(stage, path)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
                raise
            _swap_in_two_steps(stage, path, calls)


def _swap_in_two_steps(stage: Path, path: Path, calls: Calls) -> None:
    aside = path.with_name(f".old-{path.name}-{secrets.token_hex(4)}")
    calls.rename(path, aside)
    try:
        calls.rename(stage, path)
    except OSError:
        calls.rename(aside, path)
        raise
    _sync(path.parent, calls)  # else the next rename could be kept and that of the new one be lost: both would be gone
    calls.rename(aside, stage)  # where the caller removes it


def _discard(path: Path, remove: object) -> None:
    if not os.path.lexists(path):
        return
    try:
        remove(path)
    except OSError as error:
        logger.warning("%s could not be removed (%s): remove it by hand.", path, error)


@contextlib.contextmanager
def _explained(path: Path, needed: int, calls: Calls) -> Iterator[None]:
    """Turn an OSError into an OutputError that says what was needed, what there is, and what to do."""
    try:
        yield
    except OSError as error:
        free = None
        with contextlib.suppress(OSError):
            free = calls.free(next((p for p in path.parents if p.is_dir()), Path("/")))
        name = errno.errorcode.get(error.errno, "unknown error")
        remedy = _REMEDIES.get(error.errno, "Check the disk and the path, then run again")
        raise OutputError(f"{path} cannot be written: {name} ({os.strerror(error.errno or 0)}); {needed} bytes needed, "
                          f"{'an unknown number of' if free is None else free} bytes free. {remedy}.") from error
