"""What may be on a disk after a loss of power, for what `ms_diffsynth.storage.files` did until then.

The model is as weak as POSIX allows. Of a file, only what was there at its last fsync is sure; later bytes may be
there, missing, half there, or zeros. Of a folder, only the entries at its last fsync are sure; of the later changes any
subset may have been kept. A rename or an exchange is one change.
"""
from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ms_diffsynth.storage.files import Calls

View = bytes | tuple  # of a file its bytes, of a folder its (name, view) pairs


class File:
    """A file of the model: ``data`` as a running system shows it, ``synced`` as the disk surely has it."""

    def __init__(self):
        self.data = self.synced = b""

    def views(self) -> Iterator[View]:
        """Every content it may have after a loss of power."""
        if self.data == self.synced:
            yield self.data
        else:
            yield from {self.synced, self.data, self.data[:len(self.data) // 2], bytes(len(self.data))}

    def sync(self) -> None:
        """All of it is on the disk."""
        self.synced = self.data


class Folder:
    """A folder of the model: entries that are surely on the disk, and changes that may be."""

    def __init__(self):
        self.synced: dict[str, File | Folder] = {}
        self.changes: list[dict[str, Any]] = []  # name -> what it became, or None

    def entries(self, changes: tuple[dict[str, Any], ...]) -> dict[str, Any]:
        """Name -> file or folder, after some of the changes."""
        found = dict(self.synced)
        for change in changes:
            found |= change
        return {name: node for name, node in found.items() if node is not None}

    def views(self) -> Iterator[View]:
        """Every content it may have after a loss of power."""
        for count in range(len(self.changes) + 1):
            for kept in itertools.combinations(self.changes, count):
                found = self.entries(kept)
                for views in itertools.product(*(node.views() for node in found.values())):
                    yield tuple(sorted(zip(found, views)))

    def sync(self) -> None:
        """All changes are on the disk."""
        self.synced, self.changes = self.entries(tuple(self.changes)), []


class ModelCalls(Calls):
    """The real calls, done in the model too. ``after`` is called after each that changed something.

    Args:
        disk: the real folder that stands for the disk.
        forgets: for a path relative to it, whether its fsync is left out.

    Attributes:
        has_exchange: False for a file system that cannot swap two paths in one step.
    """

    def __init__(self, disk: Path, after: Callable[[Folder], None], forgets: Callable[[Path], bool]):
        self.disk, self.top, self.after, self.forgets = disk, Folder(), after, forgets
        self.has_exchange = True
        self.opened: dict[int, Path] = {}

    def node(self, path: Path) -> Any:
        """The file or folder of the model at a real path."""
        found: Any = self.top
        for part in Path(path).relative_to(self.disk).parts:
            found = found.entries(tuple(found.changes))[part]
        return found

    def change(self, folder: Path, change: dict[str, Any]) -> None:
        """Note what was changed in a folder."""
        self.node(folder).changes.append(change)
        self.after(self.top)

    def open(self, path: Any, flags: int, *mode: int) -> int:
        file = os.open(path, flags, *mode)
        self.opened[file] = Path(path)
        if flags & os.O_CREAT:
            self.change(Path(path).parent, {Path(path).name: File()})
        return file

    def write(self, file: int, data: Any) -> int:
        count = os.write(file, data)
        self.node(self.opened[file]).data += bytes(data[:count])
        self.after(self.top)
        return count

    def fsync(self, file: int) -> None:
        path = self.opened[file]
        if not self.forgets(path.relative_to(self.disk)):
            self.node(path).sync()
            self.after(self.top)

    def mkdir(self, path: Any) -> None:
        os.mkdir(path)
        self.change(Path(path).parent, {Path(path).name: Folder()})

    def rename(self, old: Any, new: Any) -> None:
        node = self.node(old)
        os.rename(old, new)
        self.change(Path(old).parent, {Path(old).name: None, Path(new).name: node})

    def exchange(self, a: Path, b: Path) -> None:
        if not self.has_exchange:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        nodes = self.node(a), self.node(b)
        Calls.exchange(a, b)
        self.change(a.parent, {a.name: nodes[1], b.name: nodes[0]})

    def rmtree(self, path: Any) -> None:
        for parent, folders, files in os.walk(path, topdown=False):
            for name in files + folders:
                self.remove(Path(parent, name))
        self.remove(Path(path))

    def remove(self, path: Path) -> None:
        """One file, or one empty folder."""
        os.rmdir(path) if path.is_dir() else os.unlink(path)
        self.change(path.parent, {path.name: None})


def build(view: View, path: Path) -> None:
    """Make what a view shows at ``path``."""
    if isinstance(view, bytes):
        path.write_bytes(view)
    else:
        path.mkdir()
        for name, inner in view:
            build(inner, path / name)
