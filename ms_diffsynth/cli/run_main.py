"""How a program of this package ends: what is said of an error, and its exit code."""
from __future__ import annotations

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

from ms_diffsynth import __version__
from ms_diffsynth.errors import INTERNAL, UserError
from ms_diffsynth.redact import redact_logs, redacted_terminal

_STDOUT = 1  # the number of its file


def run_main(function: Callable[[], int | None], debug: bool = False) -> int:
    """Run a script's ``main`` and return its exit code, one of those in docs/reference/errors.md.

    A user's mistake ends with its message alone, with ``debug`` with a traceback; an internal error with a traceback
    and what to report. No secret is in what is written to the terminal meanwhile, nor in what is logged from then on.
    """
    redact_logs()
    with redacted_terminal():
        try:
            code = function() or 0
            if sys.stdout is not None:  # it is in a process without one
                sys.stdout.flush()  # while what is wrong with it can still be told
            return code
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


def _is_reader_gone() -> bool:
    """Whether the reader of stdout has closed it, as ``| head`` does; what is left for it is then dropped."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return is_closed
