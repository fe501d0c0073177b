"""System calls that fail where a test says, for `ms_diffsynth.storage.files`."""
from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from ms_diffsynth.storage.files import Calls

COUNTED = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmtree", "truncate", "free", "exchange")


class Killed(BaseException):
    """Stands for the end of the process: after it no call reaches the system, so nothing can be cleaned up."""


class FaultyCalls(Calls):
    """The real calls, but the ``at``-th one fails: ``fault`` is an errno; "kill", which ends every later call too; or
    "short", which is no failure: a write takes half of what it was given.

    Args:
        at: number of the call that fails, from 0; None for none.
        most: bytes one write takes at most, for short writes.
        has_exchange: False for a file system that cannot swap two paths in one step.
    """

    def __init__(self, at: int | None = None, fault: int | str = errno.EIO, most: int | None = None,
                 has_exchange: bool = True):
        self.at, self.fault, self.most, self.has_exchange = at, fault, most, has_exchange
        self.made: list[str] = []
        self.is_dead = False
        for name in COUNTED:
            setattr(self, name, lambda *args, _name=name: self._call(_name, *args))

    def _call(self, name: str, *args: Any) -> Any:
        if self.is_dead:
            raise Killed
        self.made.append(name)
        if len(self.made) - 1 == self.at and self.fault == "short":
            args = (args[0], args[1][:max(1, len(args[1]) // 2)]) if name == "write" else args
        elif len(self.made) - 1 == self.at:
            if self.fault == "kill":
                self._half(name, args)
                self.is_dead = True
                raise Killed
            self._half(name, args)
            raise OSError(self.fault, os.strerror(self.fault))
        if name == "write" and self.most is not None:
            args = (args[0], args[1][:self.most])
        if name == "exchange" and not self.has_exchange:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        return getattr(Calls, name)(*args)

    @staticmethod
    def _half(name: str, args: Any) -> None:
        if name == "write":  # a write that fails may have written a part
            os.write(args[0], args[1][:len(args[1]) // 2])
        if name == "close":  # Linux releases the descriptor even when close fails
            os.close(args[0])
        if name == "rmtree":  # a removal that fails has removed a part
            for path in [p for p in Path(args[0]).rglob("*") if p.is_file()][:1]:
                path.unlink()
