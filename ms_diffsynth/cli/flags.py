"""Settings as command-line flags, and the parser of the training scripts."""
from __future__ import annotations

import argparse
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING
from typing import Any, NoReturn

from ms_diffsynth import __version__
from ms_diffsynth.config import NO_TOKEN, SECTIONS, SETTINGS, TOKEN_FLAGS, load_config
from ms_diffsynth.errors import INTERNAL, ConfigError, UserError, nearest
from ms_diffsynth.redact import redact_logs, redacted_terminal

_STDOUT = 1  # the number of its file


class Parser(argparse.ArgumentParser):
    """An argument parser that raises ConfigError instead of ending the process, and abbreviates nothing.

    Attributes:
        inner: the parser of the subcommand that was asked for, when there is one.
    """

    inner: Parser | None = None

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            own = self.inner or self
            known = [flag for flag, action in own._option_string_actions.items() if not isinstance(action, NoToken)]
            raise ConfigError(f"{own.prog} does not know {' '.join(unknown)}."
                              f"{nearest(unknown[0].partition('=')[0], known)} See {own.prog} --help.")
        return found


class NoToken(argparse.Action):
    """A flag that is there to be refused before anybody repeats its value."""

    def __call__(self, *_: object) -> NoReturn:
        raise ConfigError(f"{self.option_strings[0]}: {NO_TOKEN}")


def refuse_tokens(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the flags that a token might be typed into, to refuse them."""
    for name in TOKEN_FLAGS:
        parser.add_argument(f"--{name}", action=NoToken, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


class TrainingParser(Parser):
    """The flags of a training script: every setting of `config`, checked, and those the script adds itself."""

    def __init__(self, fixed: dict[str, str], defaults: dict[str, str], **options: Any):
        super().__init__(usage="%(prog)s --setting value ...", formatter_class=argparse.RawDescriptionHelpFormatter,
                         **options)
        self.fixed, self.settings = fixed, defaults
        add_flags(self, defaults, without=tuple(fixed))
        self.add_argument("--find_unused_parameters", action="store_true",
                          help="no effect: weights without a gradient get zeros (DiffSynth-Studio's commands pass it)")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = super().parse_args(args, namespace)
        config = load_config(None, self.fixed | self.settings | overrides_of(given))
        own = {name: value for name, value in vars(given).items() if name not in SETTINGS}
        return argparse.Namespace(**config.flat(), **own)


_METAVARS = {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT", tuple: "LIST"}


def training_parser(family: str, description: str | None = None, **defaults: str) -> TrainingParser:
    """A parser whose ``parse_args`` returns every setting by name, typed and checked; ``add_argument`` adds your own.

    Args:
        family: the model family the script is for; it is no flag.
        defaults: settings, as text, that differ from `config`'s defaults, e.g. ``num_epochs="1"``.

    Raises: ConfigError from ``parse_args``, naming what is wrong and the nearest flag.
    """
    return TrainingParser({"family": family}, defaults, description=description)


def add_flags(parser: argparse.ArgumentParser, defaults: dict[str, str] | None = None,
              without: Sequence[str] = ()) -> None:
    """Give ``parser`` one flag for every setting, in one group a section, and refuse tokens."""
    refuse_tokens(parser)
    for section, cls in SECTIONS.items():
        group = parser.add_argument_group(section, (cls.__doc__ or "").splitlines()[0])
        for setting in (s for s in SETTINGS.values() if s.section == section and s.name not in without):
            default = (defaults or {}).get(setting.name) or default_of(setting.name)
            choices = f"one of {', '.join(setting.metadata['choices'])}; " if setting.metadata["choices"] else ""
            switch = {"nargs": "?", "const": "true"} if setting.kind is bool else {}
            shown = default if default == "required" else f"default: {default}"
            group.add_argument(f"--{setting.name}", default=argparse.SUPPRESS, metavar=_METAVARS[setting.kind],
                               help=f"{setting.metadata['help']} ({choices}{shown})".replace("%", "%%"), **switch)


def default_of(name: str) -> str:
    """A setting's default as it is shown: ``required``, ``null`` or its value."""
    value = SETTINGS[name].default
    return "required" if value is MISSING else "null" if value is None else json.dumps(value)


def overrides_of(args: argparse.Namespace) -> dict[str, str]:
    """The settings given as flags, for `load_config`."""
    return {name: value for name, value in vars(args).items() if name in SETTINGS and isinstance(value, str)}


def run_main(function: Callable[[], int | None], debug: bool = False) -> int:
    """Run a script's ``main`` and return its exit code, one of those in docs/errors.md.

    A user's mistake ends with its message alone, with ``debug`` with a traceback; an internal error with a traceback
    and what to report. No secret is in what is written to the terminal meanwhile, nor in what is logged from then on.
    """
    redact_logs()
    with redacted_terminal():
        return _run(function, debug)


def _run(function: Callable[[], int | None], debug: bool) -> int:
    try:
        code = function() or 0
        _flush_stdout()  # while what is wrong with it can still be told
        return code
    except UserError as error:
        if debug:
            sys.stderr.write("".join(traceback.format_exception(error)))
        else:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_reader_gone():
            return 128 + signal.SIGPIPE
        sys.stderr.write("".join(traceback.format_exception(error)))
        sys.stderr.write("This was not foreseen. Unless it is from code of your own, please report these lines, the "
                         f"command and its configuration (ms_diffsynth {__version__}, docs/errors.md#{INTERNAL}).\n")
        return INTERNAL


def _is_reader_gone() -> bool:
    """Whether the reader of stdout has closed it, as ``| head`` does; what is left for it is then dropped."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return is_closed


def _flush_stdout() -> None:
    if sys.stdout is not None:  # it is in a process without one
        sys.stdout.flush()
