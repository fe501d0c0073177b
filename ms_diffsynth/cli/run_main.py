"""How a program of this package ends: what is said of an error, and its exit code."""
from __future__ import annotations

import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ms_diffsynth import __version__
from ms_diffsynth.errors import INTERNAL, UserError
from ms_diffsynth.redact import RedactFilter, redact

_STDOUT = 1  # the number of its file


def run_main(function: Callable[[], int | None], debug: bool = False) -> int:
    """Run a script's ``main`` and return its exit code, one of those in docs/reference/errors.md.

    A user's mistake ends with its message alone, with ``debug`` with a traceback; what nobody expected with a traceback
    and what to report. From then on no secret is in what is logged, nor in a traceback.
    """
    _redact_output()
    try:
        code = function() or 0
        _flush_stdout()  # while what is wrong with it can still be told
        return code
    except UserError as error:
        if debug:
            _show_redacted(type(error), error, error.__traceback__)
        else:
            sys.stderr.write(redact(f"{type(error).__name__}: {error}\n"))
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        _show_redacted(type(error), error, error.__traceback__)
        sys.stderr.write("This was not foreseen. Unless it is from code of your own, please report these lines, the "
                         f"command and its configuration (ms_diffsynth {__version__}, "
                         f"docs/reference/errors.md#{INTERNAL}).\n")
        return INTERNAL


def _nobody_reads() -> bool:
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


def _redact_output() -> None:
    sys.excepthook = _show_redacted
    logging.setLogRecordFactory(_redacted_record)


def _redacted_record(*given: Any, **named: Any) -> logging.LogRecord:
    """Redacted before any handler has it: mindone, imported late, brings one and does not hand its records on."""
    record = logging.LogRecord(*given, **named)
    RedactFilter().filter(record)
    return record


def _show_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
