"""The process that the user started: it hands signals on to the supervisor, waits for it, and returns its exit code.

Why two: when this one is killed by a signal that nobody can handle, the system tells the supervisor, which then ends
the job as after any other signal, also where a worker is stopped or does not obey. When the supervisor is killed, the
system kills the workers.
"""
from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from typing import NoReturn

from ms_diffsynth.errors import INTERNAL
from ms_diffsynth.launch.diagnosis import TRY_AGAIN
from ms_diffsynth.launch.job import Job
from ms_diffsynth.launch.process import end_with_parent
from ms_diffsynth.launch.supervise import SIGNALS, Supervisor
from ms_diffsynth.redact import redact


def launch(job: Job) -> int:
    """Run a job to its end.

    Returns: 0 when all workers ended with 0; the exit code of the first that did not; 75 when a worker was killed,
        stopped or hung; 70 when one ended too early, with 0; 143, 130, 129 after SIGTERM, SIGINT, SIGHUP.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until somebody can take them
    child = os.fork()
    if child == 0:
        _supervise(job, parent)

    def hand_on(number: int, _: object) -> None:  # the child has inherited which of them are ignored (nohup)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code < 0:
        sys.stderr.write(f"the launcher's supervisor was killed by {signal.Signals(-code).name}, and with it all "
                         f"workers (logs: {job.log_dir})\n")
    return code if code >= 0 else TRY_AGAIN


def _supervise(job: Job, parent: int) -> NoReturn:
    """The child: no Ctrl-C of the terminal reaches it but through its parent."""
    code = INTERNAL
    try:
        os.setsid()
        with Supervisor(job) as supervisor:  # which unblocks the signals
            end_with_parent(parent, signal.SIGTERM)
            code = supervisor.run()
    except BaseException:
        os.write(2, redact(traceback.format_exc()).encode())
    finally:
        os._exit(code)
