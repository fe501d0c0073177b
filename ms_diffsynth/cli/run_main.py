"""How a program of this package ends: what is said of an error, and its exit code."""
from __future__ import annotations

import errno
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

from ms_diffsynth import __version__
from ms_diffsynth.errors import INTERNAL, DeviceError, OutputError, UserError, is_memory_short, shortened
from ms_diffsynth.redact import redact_logs, redacted_terminal

_STDOUT = 1  # the number of its file


def run_main(function: Callable[[], int | None], debug: bool = False) -> int:
    """Run a script's ``main`` and return its exit code, one of those in docs/reference/errors.md.

    A user's mistake ends with its message alone, with ``debug`` with a traceback; an internal error with a traceback
    and what to report. No secret is in what is written to the terminal meanwhile, nor in what is logged from then on.
    """
    redact_logs()
    _open_streams()
    with redacted_terminal():
        try:
            try:
                code = function() or 0
                sys.stdout.flush()  # while what is wrong with it can still be told
                return code
            except Exception as error:
                if (known := _of_the_system(error)) is None:
                    raise
                raise known from error
        except UserError as error:
            lines = traceback.format_exception(error) if debug else [f"{type(error).__name__}: {error}\n"]
            sys.stderr.write("".join(lines))
            return error.exit_code
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            return 128 + signal.SIGINT
        except Exception as error:
            if isinstance(error, BrokenPipeError) and _is_reader_gone():
                return 128 + signal.SIGPIPE
            sys.stderr.write("".join(traceback.format_exception(error)))
            sys.stderr.write("This is an internal error. Unless it is from code of your own, please report these "
                             f"lines, the command and its configuration (ms_diffsynth {__version__}, "
                             f"docs/reference/errors.md#{INTERNAL}).\n")
            return INTERNAL


def _of_the_system(error: Exception) -> UserError | None:
    """What the system refuses wherever it is asked: memory, or a path that an OSError names. Else None."""
    if isinstance(error, UserError):
        return None
    if is_memory_short(error):
        first = next(iter(str(error).strip().splitlines()), "")
        return DeviceError(f"the memory does not suffice: {type(error).__name__}: {shortened(first)}. Choose a smaller "
                           "batch_size, max_pixels, height and width (docs/reference/memory.md), or a smaller model.")
    if isinstance(error, OSError) and error.filename is not None and not isinstance(error, BrokenPipeError):
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else error.filename
        code = errno.errorcode.get(error.errno, "unknown error")
        return OutputError(f"{shortened(str(name))} cannot be used: {code} ({error.strerror}). Check the path, "
                           "and who may read and write there.")
    return None


def _open_streams() -> None:
    """Where stdin, stdout or stderr are closed, as some schedulers do, the next file would get their number, and what
    libraries write there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one


def _is_reader_gone() -> bool:
    """Whether the reader of stdout has closed it, as ``| head`` does; what is left for it is then dropped."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return is_closed
