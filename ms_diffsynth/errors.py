"""Errors a user can act on. One template: what is wrong, with the value; what was expected; what to do now.

A mistake of the user is a :class:`UserError`: the command line prints its message without a traceback and ends with
its ``exit_code``, a number of sysexits.h (``--debug`` shows the traceback). Each class has a section in
docs/reference/errors.md. ``assert`` is for our own invariants only.
"""
from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

INTERNAL = 70  # exit code of an internal error


class UserError(Exception):
    """Something the user gave is wrong, and the message says how to correct it."""

    exit_code = 64


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


def nearest(name: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the choice nearest to ``name``, or an empty string when none is similar."""
    found = get_close_matches(str(name), [str(c) for c in choices], n=1)
    return f" Did you mean '{found[0]}'?" if found else ""


def listing(items: Iterable[object], most: int = 10) -> str:
    """The first ``most`` items joined by commas, and how many more there are."""
    items = [str(i) for i in items]
    tail = f" and {len(items) - most} more ({len(items)} in all)" if len(items) > most else ""
    return ", ".join(items[:most]) + tail
