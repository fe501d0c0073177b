"""Errors a user can act on. One template: what is wrong, with the value; what was expected; what to do now.

A mistake of the user is a :class:`UserError`: the command line prints its message without a traceback and ends with
its ``exit_code``, a number of sysexits.h (``--debug`` shows the traceback). Each class has a section in
docs/reference/errors.md. ``assert`` is for our own invariants only.
"""
from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

INTERNAL = 70  # exit code of an internal error
LONGEST_LINE = 2000  # characters of a line of a message: ten names fit, a whole file does not


class UserError(Exception):
    """Something the user gave is wrong, and the message says how to correct it; of a long value it has the ends."""

    exit_code = 64

    def __str__(self) -> str:
        return "\n".join(shortened(line, LONGEST_LINE) for line in super().__str__().split("\n"))


class ConfigError(UserError):
    """An unknown, missing or impossible setting."""


class ProgramError(UserError):
    """Units that cannot be wired; raised when a program is built, never while it runs."""


class DataError(UserError):
    """A data set, a row of it, or a file it names cannot be used."""

    exit_code = 65


class TrainingError(UserError):
    """Training cannot continue: non-finite steps in a row, nothing trainable, more compilations than planned."""

    exit_code = 65


class WeightError(UserError):
    """Weights that are missing, superfluous, of the wrong shape, or not readable."""

    exit_code = 66


class TemplateError(UserError):
    """A template cannot be used: no model.py, not of the documented form, or its code failed."""

    exit_code = 65


class UntrustedCodeError(TemplateError):
    """Code of a template that is not trusted, or that is not the code that was trusted."""

    exit_code = 77


class HubError(UserError):
    """A file cannot be downloaded from, or sent to, a model hub."""

    exit_code = 69


class DeviceError(UserError):
    """The device, the mode or the installed software cannot do what was asked."""

    exit_code = 69


class CacheError(UserError):
    """A cache of split training is incomplete, damaged, or was made by another configuration."""

    exit_code = 78


class CheckpointError(UserError):
    """A checkpoint is incomplete, damaged, of a newer format, or was made by another configuration or data set."""

    exit_code = 78


class OutputError(UserError):
    """Results cannot be written: no space, no permission, the path is taken."""

    exit_code = 74


def shortened(text: str, most: int = 200) -> str:
    """``text``, or of a longer one its beginning and its end, and how many characters are left out."""
    if len(text) <= most:
        return text
    first, last = most * 2 // 3, most // 6
    return f"{text[:first]} [... {len(text) - first - last} characters ...] {text[len(text) - last:]}"


_NO_MEMORY = re.compile(r"(?i)out of memory|(?:memory is not|not) enough memory|memory isn't enough|bad_alloc|"
                        r"(?:allocate|malloc)\w*\b.{0,40}\bmemory\b.{0,40}\bfail|fail\w* to (?:allocate|malloc)|"
                        r"allocat\w+ .{0,40}failed|\bmemory .{0,30}(?:alloc|malloc)\w* fail")


def is_memory_short(error: BaseException) -> bool:
    """Whether an error, or what caused it, is for want of memory: one of Python or NumPy, or of MindSpore."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, RuntimeError) and _NO_MEMORY.search(str(seen))):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


class Interrupted(BaseException):
    """A signal came in a block that can be given up. No ``except Exception`` inside takes it for a failure."""


def is_mistake(error: BaseException) -> bool:
    """Whether an error is one of code that was called, whatever its class, and not the wish to end (Ctrl-C)."""
    return not isinstance(error, (KeyboardInterrupt, Interrupted))


def said(error: BaseException) -> str:
    """Class and text of an error of other code, in one line."""
    try:
        text = str(error)
    except Exception as own:  # a class of other code may fail to say what it is
        text = f"its text cannot be had, {type(own).__name__}"
    return shortened(" ".join(f"{type(error).__name__}: {text}".split()), 400)


@contextlib.contextmanager
def naming(what: str, kinds: type[UserError] | tuple[type[UserError], ...] = UserError) -> Iterator[None]:
    """Inside the block, messages of these kinds begin with ``what``, a setting and its value, unless they name it."""
    try:
        yield
    except kinds as error:
        if what.partition("=")[0] in str(error):
            raise
        raise type(error)(f"{shortened(what)}: {error}") from error


def nearest(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the choice nearest to ``name``, or an empty string when none is similar."""
    found = get_close_matches(str(name), [str(c) for c in choices], n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def listing(items: Iterable[object], most: int = 10) -> str:
    """The first ``most`` items joined by commas, and how many more there are."""
    items = [str(i) for i in items]
    tail = f" and {len(items) - most} more ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(items[:most]) + tail
