"""The last words of a process: the line of its log that says what ended it."""
from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_TAIL = 256 * 1024  # bytes; MindSpore writes long stacks of its own after a Python exception
_WIDTH = 400
_TRACEBACK = "Traceback (most recent call last):"
_KINDS = "Error|Exception|Interrupt|Exit|Timeout"
_NAMED = re.compile(rf"(?:[A-Za-z_][\w.]*(?:{_KINDS})|Fatal Python error)(?::\s.*)?")
_WHERE = re.compile(r'\s+File "(.+)", line (\d+) in (\S+)')


def last_exception(log: Path, begin: int = 0) -> str:
    """The last exception written after ``begin`` bytes, without its traceback; empty when there is none.

    It is the line that ends a traceback, whatever its class is called, or a line that begins like ``DataError: ...``.
    """
    found, is_inside = "", False
    for line in _lines(log, begin):
        if line.endswith(_TRACEBACK):
            is_inside = True
        elif is_inside and line and not line.startswith((" ", "|", "+")):
            found, is_inside = line, False
        elif _NAMED.fullmatch(line):
            found = line
    return found if len(found) <= _WIDTH else found[:_WIDTH] + " ..."


class Place(NamedTuple):
    """A line of source."""

    file: str
    line: str
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line} in {self.function}"


def last_place(log: Path, begin: int = 0) -> Place | None:
    """Where the main thread, which comes last, was when SIGABRT ended a process; None when it did not say."""
    found, is_next = None, False
    for line in _lines(log, begin):
        if is_next and (match := _WHERE.fullmatch(line)):
            found = Place(*match.groups())
        is_next = line.endswith(" (most recent call first):")
    return found


def _lines(log: Path, begin: int) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(begin, file.seek(0, 2) - _TAIL))
        return file.read().decode(errors="replace").splitlines()
