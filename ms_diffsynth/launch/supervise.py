"""Runs a job: all of it is started together, and ended when one of its processes is dead, stopped or hung.

The process that the user started only hands signals on to a child, the supervisor, and returns its exit code. Why two:
when the first is killed by a signal that cannot be handled, the system tells the supervisor, which then ends the job as
after any other signal, also where a worker is stopped or does not obey. When the supervisor is killed, the system kills
the workers.
"""
from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from ms_diffsynth.errors import INTERNAL
from ms_diffsynth.launch.diagnosis import TRY_AGAIN, Diagnosis, Outcome, Pulse, code_of
from ms_diffsynth.launch.job import Job
from ms_diffsynth.launch.process import Process, Tee, end_with_parent, write_all
from ms_diffsynth.redact import redact

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

LOOK_SECONDS = 0.5  # between two looks at the workers; a death is seen at once
SUSPENDED_SECONDS = 5.0  # what is longer between two looks is time in which this process could not run
AGAIN_SECONDS = 1.0  # a second signal sooner than this is the first one, on another way
FAILED_SECONDS = 10.0  # the others have this long to end when one has failed: they may just be saving
ABORT_SECONDS = 3.0  # to print every thread's stack
KILL_SECONDS = 5.0  # a killed process ends at once, unless a disk does not answer
TERMINAL_SECONDS = 5.0  # for the last of rank 0's output, or a line of our own, on a terminal that may be paused
SCHEDULER_SECONDS = 60.0  # other machines have this long to end after this one
SCHEDULER_WORDS_SECONDS = 5.0  # it may know which machine failed before a worker here did
_ASKED = (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # how a worker ends that was asked to


def launch(job: Job) -> int:
    """Run a job to its end.

    Returns: 0 when all workers ended with 0; the exit code of the first that did not; 75 when a worker was killed,
        stopped or hung; 70 when one ended too early, with 0; 143, 130, 129 after SIGTERM, SIGINT, SIGHUP.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until they can be handled
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


class Supervisor:
    """``with Supervisor(job) as supervisor: code = supervisor.run()``, in the main thread of a process of its own."""

    def __init__(self, job: Job):
        self.job = job
        self.workers: list[Process] = []
        self.scheduler: Process | None = None
        self.tee: Tee | None = None  # of rank 0
        self.signals: list[signal.Signals] = []
        self._looked, self._clock = time.monotonic(), 0.0

    def __enter__(self) -> Supervisor:
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # its number is in the pipe
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened: nothing that was started is left."""
        self._kill()

    def run(self) -> int:
        """Run the job. Returns: the exit code, as `launch` has it."""
        job = self.job
        where = f"{job.master_address}:{job.master_port}"
        self._tell(f"{job.workers} of {job.world_size} workers here, scheduler at {where}; "
                   f"logs: {job.log_dir}/worker-K.log")
        pulses = [Pulse(job.heartbeat(rank)) for rank in job.ranks]
        if job.node_rank == 0:
            log = job.log_dir / "scheduler.log"
            self.scheduler = Process("the scheduler", job.scheduler, job.environment(None), log)
            self.tee = Tee(job.log(0))
        for rank in job.ranks:
            outputs = self.tee.outputs if rank == 0 else None
            self.workers.append(Process(f"rank {rank}", job.command, job.environment(rank), job.log(rank), outputs))
        if self.tee:  # its threads begin when no process is forked any more
            self.tee.start()
        self.diagnosis = Diagnosis(job, self.workers, pulses, self.scheduler)
        outcome = self._watch()
        left = self._kill()
        if self.tee:
            self.tee.finish(TERMINAL_SECONDS)
        if left:
            self._tell(f"{', '.join(left)} cannot be killed: the system waits for a disk or a device")
        if line := outcome.line():
            self._tell(line)
        return outcome.code

    # -- while it runs -------------------------------------------------------------------------------------------

    def _watch(self) -> Outcome:
        """Wait until the job has ended, or end it."""
        while True:
            self._wait(LOOK_SECONDS)
            if any(worker.code in _ASKED for worker in self.workers):  # who asked it may ask us too: systemd does
                self._wait_until(lambda: self.signals, AGAIN_SECONDS)
            if self.signals:
                return self._obey()
            if outcome := self.diagnosis.find_failed(self._now()):
                self._end_workers(FAILED_SECONDS)
                if self.job.nodes > 1:
                    self._wait_until(self._is_scheduler_done, SCHEDULER_WORDS_SECONDS)
                return outcome
            if outcome := self.diagnosis.find_hung(self._now()):  # none can save: each writes where it is into its log
                if self.tee:
                    self.tee.is_shown = False
                for worker in self._running():
                    worker.abort()
                self._wait_until(lambda: not self._running(), ABORT_SECONDS)
                return outcome
            if all(worker.code == 0 for worker in self.workers):
                if self.job.nodes == 1:
                    return Outcome(0)
                # workers of other machines may still need the scheduler
                self._wait_until(lambda: self._is_scheduler_done() or self.signals, SCHEDULER_SECONDS)
                return self.diagnosis.find_failed(self._now()) or Outcome(0)

    def _wait(self, seconds: float) -> None:
        """Wait for a signal, or for the end of a process, for at most this long."""
        select.select([self._reader], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            self.signals += [signal.Signals(n) for n in os.read(self._reader, 64) if n in SIGNALS]

    def _wait_until(self, is_done: Callable[[], object], seconds: float) -> None:
        """Wait until a condition holds, for at most this long."""
        until = time.monotonic() + seconds
        while not is_done() and (left := until - time.monotonic()) > 0:
            self._wait(min(left, LOOK_SECONDS))

    def _now(self) -> float:
        """A clock that stands while this process is stopped, as after Ctrl-Z or in a machine that sleeps."""
        now = time.monotonic()
        self._clock += min(now - self._looked, SUSPENDED_SECONDS)
        self._looked = now
        return self._clock

    # -- the end -------------------------------------------------------------------------------------------------

    def _obey(self) -> Outcome:
        """A signal: let all workers save and end."""
        first, seconds = self.signals[0], self.job.grace_seconds
        self._tell(f"{first.name}: all workers are asked to save and to end, for at most {seconds:g} s; once more "
                   "kills them")
        late = self._end_workers(seconds)
        if late and len(self.signals) > 1:
            return Outcome(128 + self.signals[1], lambda: f"{self.signals[1].name} again: {late} killed")
        if late:
            return Outcome(TRY_AGAIN, lambda: f"{late} had not ended {seconds:g} s after {first.name} and had to be "
                                              f"killed; see --grace_seconds (logs: {self.job.log_dir})")
        failed = next((w for w in self.workers if w.code not in (0, *_ASKED)), None)
        if failed is not None:
            self.diagnosis.look(self._now())
            return Outcome(code_of(failed), lambda: self.diagnosis.tell_dead(failed))
        return Outcome(128 + first, lambda: f"stopped by {first.name}: all workers have ended")

    def _end_workers(self, seconds: float) -> str:
        """Ask all workers to end. Returns: the names of those that have not after this long, or at another signal."""
        for worker in self._running():
            worker.ask_to_end()
        self._wait_until(lambda: not self._running(), min(seconds, AGAIN_SECONDS))
        del self.signals[1:]
        heard = len(self.signals)
        self._wait_until(lambda: not self._running() or len(self.signals) > heard, seconds - AGAIN_SECONDS)
        return ", ".join(worker.name for worker in self._running())

    def _running(self) -> list[Process]:
        return [worker for worker in self.workers if worker.code is None]

    def _is_scheduler_done(self) -> bool:
        return self.scheduler is None or self.scheduler.code is not None

    def _kill(self) -> list[str]:
        """Kill all that is left, children of the dead included. Returns: the names of those the system cannot kill."""
        processes = [p for p in (*self.workers, self.scheduler) if p is not None]
        for process in processes:
            process.kill()
        until = time.monotonic() + KILL_SECONDS
        return [p.name for p in processes if not p.reap(max(until - time.monotonic(), 0.1))]

    def _tell(self, text: str) -> None:
        """A line on the terminal. It is written by a thread, for a terminal that is paused must not hold us up."""
        def write() -> None:
            with contextlib.suppress(OSError):  # the terminal is closed
                write_all(2, redact(text + "\n").encode())

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(TERMINAL_SECONDS)
