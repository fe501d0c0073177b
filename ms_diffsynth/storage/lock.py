"""Who owns an output folder: one run at a time, and what a dead one left behind is removed.

The lock is filelock's, on ``FOLDER/.lock``: the system gives it back when its process ends, however it ends. The file
also says who holds it, for the message, and for file systems without locks.
"""
from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import lock_descriptor  # not FileLock: before 4.2 it empties the file that says who holds it

from ms_diffsynth.errors import OutputError
from ms_diffsynth.formats.json_text import parse_json

logger = logging.getLogger(__name__)

LOCK = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_STAGE = re.compile(r"\.(?:tmp|trash)-(\d{1,9})-[0-9a-f]{8}")  # names of storage.files
_ASIDE = re.compile(r"\.old-(.+)-[0-9a-f]{8}")


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold ``folder`` for this process; it is made when it is not there. What dead runs left half done is removed.

    Raises: OutputError when another run holds it, with its pid and host, or when it cannot be written to.
    """
    path = Path(folder) / LOCK
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{path} cannot be opened for writing: {_name_of(error)}. Choose another output "
                          "folder.") from error
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OutputError(f"{path} is not a regular file. Remove it, or choose another output folder.")
        before = _take(file, path)
        try:
            with contextlib.suppress(OutputError):  # a full disk: what is removed next may make room
                _sign(file, path)
            _remove_leftovers(path.parent, {os.getpid(), before.get("pid")})
            _sign(file, path)
            yield
        finally:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def _take(file: int, path: Path) -> dict[str, Any]:
    """Take the lock. Returns: who held it and never gave it back, or nothing. Raises: OutputError."""
    remedy = "wait until that run has ended."
    try:
        is_free = lock_descriptor(file, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"{path} cannot be locked: {_name_of(error)}. Choose another output folder.") from error
        is_free = not _may_be_running(_read(file))
        remedy = f"delete {path} when that process has ended: this file system has no locks that would show it."
    owner = _read(file)
    pid, host = owner.get("pid", "unknown"), owner.get("host", "unknown")
    if not is_free:
        raise OutputError(f"{path.parent} is in use by another run: process {pid} on host {host}. Choose another "
                          f"output folder, or {remedy}")
    if owner:
        logger.warning("%s: the lock of process %s on host %s was left behind and is taken over.", path.parent, pid,
                       host)
    return owner


def _sign(file: int, path: Path) -> None:
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(_me()).encode(), 0)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {_name_of(error)}. Free some space or choose another output "
                          "folder.") from error


def _me() -> dict[str, Any]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot_id": boot}


def _read(file: int) -> dict[str, Any]:
    """Who wrote the lock file; nothing when it is empty, or half written this moment."""
    try:
        owner = parse_json(os.pread(file, 4096, 0))
    except ValueError:
        return {}
    is_sound = isinstance(owner.get("pid"), int) and 0 < owner["pid"] < 2**31
    return owner if is_sound else {}


def _may_be_running(owner: dict[str, Any]) -> bool:
    me = _me()
    if owner and owner.get("host") != me["host"]:
        return True  # it cannot be seen from here
    return bool(owner) and owner.get("boot_id") == me["boot_id"] and owner["pid"] != me["pid"] and _is_running(
        owner["pid"])


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # of another user
    return True


def _remove_leftovers(folder: Path, dead: set[int | None]) -> None:
    """Remove what writes that never ended left in ``folder``, and put back what was only moved aside.

    Args:
        dead: process ids that cannot be writing, even if a process has that number now: our own, for nothing was
            written yet, and that of the run before.
    """
    _sync(folder)  # a swap that a kill cut short is on the disk before its old half goes
    for path in sorted(folder.iterdir()):
        stage, aside = _STAGE.fullmatch(path.name), _ASIDE.fullmatch(path.name)
        try:
            if aside and not (folder / aside[1]).exists():
                path.rename(folder / aside[1])  # killed in the middle of a swap in two steps
            elif aside or (stage and (int(stage[1]) in dead or not _is_running(int(stage[1])))):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            logger.warning("%s could not be removed (%s): remove it by hand.", path, error)


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        raise OutputError(f"{folder} cannot be synced: {_name_of(error)}. Check the disk, or choose another output "
                          "folder.") from error
    finally:
        os.close(file)


def _name_of(error: OSError) -> str:
    return f"{errno.errorcode.get(error.errno, 'unknown error')} ({error.strerror})"
