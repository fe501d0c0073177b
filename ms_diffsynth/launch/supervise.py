"""The supervisor: starts a job, and ends all of it when one of its processes is dead, stopped or hung."""
from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable

from ms_diffsynth.launch.diagnosis import TRY_AGAIN, Diagnosis, Outcome, code_of
from ms_diffsynth.launch.job import Job
from ms_diffsynth.launch.process import Process
from ms_diffsynth.launch.pulse import Pulse
from ms_diffsynth.launch.screen import Screen, show
from ms_diffsynth.redact import redact

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_LOOK_SECONDS = 0.5  # between two looks at the workers; a death is seen at once
_SUSPENDED_SECONDS = 5.0  # what is longer between two looks is time in which this process could not run
_AGAIN_SECONDS = 1.0  # a second signal sooner than this is the first one, on another way
_FAILED_SECONDS = 10.0  # the others have so long to end when one has failed: they may just be saving
_ABORT_SECONDS = 3.0  # to print every thread's stack
_KILL_SECONDS = 5.0  # a killed process ends at once, unless a disk does not answer
_SCREEN_SECONDS = 5.0  # for the last of rank 0's output, on a terminal that may be paused
_TELL_SECONDS = 2.0  # for a line of our own
_SCHEDULER_SECONDS = 60.0  # other machines have so long to end after this one
_SCHEDULER_WORDS_SECONDS = 5.0  # it may know which machine failed before a worker here did
_ASKED = (-signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGINT)  # how a worker ends that was asked to


class Supervisor:
    """``with Supervisor(job) as supervisor: code = supervisor.run()``, in the main thread of a process of its own."""

    def __init__(self, job: Job):
        self.job = job
        self.workers: list[Process] = []
        self.scheduler: Process | None = None
        self.screen: Screen | None = None
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
        """Run the job. Returns: the exit code, as `front.launch` has it."""
        job = self.job
        where = f"{job.master_address}:{job.master_port}"
        self._tell(f"{job.workers} of {job.world_size} workers here, scheduler at {where}; "
                   f"logs: {job.log_dir}/worker-K.log")
        self._start()
        outcome = self._watch()
        left = self._kill()
        if self.screen:
            self.screen.finish(_SCREEN_SECONDS)
        if left:
            self._tell(f"{', '.join(left)} cannot be killed: the system waits for a disk or a device")
        if line := outcome.line():
            self._tell(line)
        return outcome.code

    def _start(self) -> None:
        job = self.job
        pulses = [Pulse(job.heartbeat(rank)) for rank in job.ranks]
        if job.node_rank == 0:
            log = job.log_dir / "scheduler.log"
            self.scheduler = Process("the scheduler", job.scheduler, job.environment(None), log)
            self.screen = Screen(job.log(0))
        for rank in job.ranks:
            outputs = self.screen.outputs if rank == 0 else None
            self.workers.append(Process(f"rank {rank}", job.command, job.environment(rank), job.log(rank), outputs))
        if self.screen:
            self.screen.started()
        self.diagnosis = Diagnosis(job, self.workers, pulses, self.scheduler)

    # -- while it runs -------------------------------------------------------------------------------------------

    def _watch(self) -> Outcome:
        """Wait until the job has ended, or end it."""
        while True:
            self._wait(_LOOK_SECONDS)
            if any(worker.code in _ASKED for worker in self.workers):  # who asked it may ask us too: systemd does
                self._wait_until(lambda: self.signals, _AGAIN_SECONDS)
            if self.signals:
                return self._obey()
            if outcome := self.diagnosis.find_failed(self._now()):
                self._end_workers(_FAILED_SECONDS)
                if self.job.nodes > 1:
                    self._wait_until(self._is_scheduler_done, _SCHEDULER_WORDS_SECONDS)
                return outcome
            if outcome := self.diagnosis.find_hung(self._now()):
                self._abort_workers()
                return outcome
            if all(worker.code == 0 for worker in self.workers):
                return self._end_well()

    def _wait(self, seconds: float) -> None:
        """Pass on what rank 0 writes until a signal comes or a process ends, for at most so long."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.screen:
                self.screen.wait(left, self._reader)
            else:
                select.select([self._reader], [], [], left)
            with contextlib.suppress(BlockingIOError):
                numbers = os.read(self._reader, 64)
                self.signals += [signal.Signals(n) for n in numbers if n in SIGNALS]
                return

    def _wait_until(self, is_done: Callable[[], object], seconds: float) -> None:
        """The same until something is so, for at most so long."""
        until = time.monotonic() + seconds
        while not is_done() and (left := until - time.monotonic()) > 0:
            self._wait(min(left, _LOOK_SECONDS))

    def _now(self) -> float:
        """A clock that stands while this process is stopped, as after Ctrl-Z or in a machine that sleeps."""
        now = time.monotonic()
        self._clock += min(now - self._looked, _SUSPENDED_SECONDS)
        self._looked = now
        return self._clock

    # -- the end -------------------------------------------------------------------------------------------------

    def _end_well(self) -> Outcome:
        """All workers of this machine are done. Those of others may still need the scheduler."""
        if self.job.nodes == 1:
            return Outcome(0)
        self._wait_until(lambda: self._is_scheduler_done() or self.signals, _SCHEDULER_SECONDS)
        return self.diagnosis.find_failed(self._now()) or Outcome(0)

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
        """Ask all workers to end. Returns: the names of those that have not after so long, or at another signal."""
        for worker in self._running():
            worker.ask_to_end()
        self._wait_until(lambda: not self._running(), min(seconds, _AGAIN_SECONDS))
        del self.signals[1:]
        heard = len(self.signals)
        self._wait_until(lambda: not self._running() or len(self.signals) > heard, seconds - _AGAIN_SECONDS)
        return ", ".join(worker.name for worker in self._running())

    def _abort_workers(self) -> None:
        """A worker hangs, so none can save: each writes where it is into its log."""
        if self.screen:
            self.screen.hide()
        for worker in self._running():
            worker.abort()
        self._wait_until(lambda: not self._running(), _ABORT_SECONDS)

    def _running(self) -> list[Process]:
        return [worker for worker in self.workers if worker.code is None]

    def _is_scheduler_done(self) -> bool:
        return self.scheduler is None or self.scheduler.code is not None

    def _kill(self) -> list[str]:
        """Kill all that is left, children of the dead included. Returns: the names of those the system cannot kill."""
        processes = [p for p in (*self.workers, self.scheduler) if p is not None]
        for process in processes:
            process.kill()
        until = time.monotonic() + _KILL_SECONDS
        return [p.name for p in processes if not p.reap(max(until - time.monotonic(), 0.1))]

    def _tell(self, text: str) -> None:
        show(2, redact(text + "\n").encode(), _TELL_SECONDS)
