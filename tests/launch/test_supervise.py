"""One dead, stopped or hung worker ends the job, and the last line says which and why; rank 0's output is shown."""
from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from launched import state

from ms_diffsynth.launch import diagnosis, supervise

WAIT = "\nbeat(3)\ntime.sleep(3600)\n"
NEVER = {"FAILED_SECONDS": 1e9}  # the others have all the time they need to save


def last_line(err):
    return err.rstrip("\n").splitlines()[-1]


def test_a_job_that_ends_well(launch):
    job = launch("print('rank', rank)\nprint('no error', end='', file=sys.stderr)")
    code, out, err = job.end()
    assert code == 0 and out == "rank 0\n" and err.endswith("\nno error\n")
    assert "2 of 2 workers here, scheduler at 127.0.0.1:20000; logs: " in err.splitlines()[0]
    for rank in (0, 1):
        log = (job.logs / f"worker-{rank}.log").read_text()
        assert f"rank {rank}\n" in log and "no error" in log


PRINTS = "save_on_sigterm()\nbeat(1)\nprint('x' * 10**6, flush=True)\nPath(f'through-{rank}').touch()\n" + WAIT


def test_a_terminal_that_is_closed_does_not_hold_up_the_job(launch):
    reader, writer = os.pipe()
    os.close(reader)
    job = launch(PRINTS, stdout=writer)
    os.close(writer)
    job.until(Path("through-0").exists)
    job.process.terminate()
    assert job.end()[0] == 143 and (job.logs / "worker-0.log").stat().st_size > 10**6


def test_a_terminal_that_is_paused_does_not_hold_up_the_launcher(launch):
    """But the process that writes to it, as it would without a launcher."""
    reader, writer = os.pipe()
    job = launch(PRINTS, stdout=writer, limits={"TERMINAL_SECONDS": 0.5})
    job.begun()
    job.until(Path("through-1").exists)
    assert not Path("through-0").exists()
    job.process.terminate()
    assert job.end(is_passing=True)[0] in (75, 143)
    os.close(reader)
    os.close(writer)


def test_logs_of_an_earlier_job_are_kept_and_not_read(launch):
    launch("if rank: raise KeyError('first')" + WAIT).end()
    job = launch("sys.exit(rank)")
    assert last_line(job.end()[2]) == f"rank 1 failed with exit code 1 (log: {job.logs}/worker-1.log)"
    assert "KeyError: 'first'" in (job.logs / "worker-1.log").read_text()


@pytest.mark.fault
@pytest.mark.parametrize("what, code, line", [
    ("raise ValueError('boom')", 1, "rank 1 failed with exit code 1{at}: ValueError: boom{log}"),
    ("sys.exit('DataError: row 3: no prompt')", 1, "rank 1 failed with exit code 1{at}: DataError: row 3: no prompt"
                                                   "{log}"),
    ("sys.exit(78)", 78, "rank 1 failed with exit code 78{at}{log}"),
    ("os.kill(os.getpid(), 9)", 75, "rank 1 was killed by SIGKILL{at} (by a user, or by the system because memory ran "
                                   "out){log}"),
    ("os.abort()", 75, "rank 1 was killed by SIGABRT{at}: Fatal Python error: Aborted{log}"),
    ("import ctypes; ctypes.string_at(0)", 75, "rank 1 was killed by SIGSEGV{at}: Fatal Python error: Segmentation "
                                              "fault{log}"),
    ("raise ValueError('hf_0123456789abcdefghij')", 1, "rank 1 failed with exit code 1{at}: ValueError: [redacted]"
                                                       "{log}"),
], ids=["raises", "exits with a message", "exits", "killed", "aborts", "segfault", "token"])
def test_a_dead_worker_ends_the_job(launch, what, code, line):
    job = launch(f"beat(2)\nif rank:\n    {what}" + WAIT)
    found, _, err = job.end()
    expected = line.format(at=" in phase 'step' of step 2", log=f" (log: {job.logs}/worker-1.log)")
    assert found == code and last_line(err) == expected


@pytest.mark.fault
def test_the_limits_add_up_to_15_and_to_30_seconds():
    """From a signal, and from a failure, until nothing of the job is left: no test here waits for that long."""
    limits, look = supervise, supervise.LOOK_SECONDS
    assert limits.Job.grace_seconds + limits.KILL_SECONDS <= 15
    assert diagnosis.STOPPED_SECONDS + 2 * look + limits.FAILED_SECONDS + limits.KILL_SECONDS <= 30
    assert limits.Job.hang_seconds + 2 * look + limits.ABORT_SECONDS + limits.KILL_SECONDS <= 30


@pytest.mark.fault
def test_the_others_may_save_when_one_is_dead(launch):
    job = launch("save_on_sigterm()\nbeat(1)\nif rank:\n    until_there_is('ready')\n    os.kill(os.getpid(), 9)\n"
                 "Path('ready').touch()" + WAIT)
    assert job.end()[0] == 75 and job.saved() == ["saved-0"]


@pytest.mark.fault
def test_who_ignores_sigterm_is_killed(launch):
    job = launch("if rank:\n    until_there_is('deaf')\n    sys.exit(5)\n"
                 "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nPath('deaf').touch()" + WAIT)
    assert job.end(is_passing=True)[0] == 5


@pytest.mark.fault
@pytest.mark.parametrize("ending, code", [("sys.exit(0)", 0), ("sys.exit(rank)", 1), ("os.kill(os.getpid(), 9)", 75)])
def test_what_a_worker_leaves_behind_is_killed(launch, ending, code):
    assert launch(f"subprocess.Popen(['sleep', '3600'])\n{ending}").end()[0] == code


@pytest.mark.fault
def test_a_stopped_worker_ends_the_job(launch):
    job = launch("save_on_sigterm()\nbeat(2)\nPath(f'ready-{rank}').touch()\ntime.sleep(3600)", limits=NEVER)
    job.until(lambda: Path("ready-0").exists() and Path("ready-1").exists())
    stopped = job.pid("rank 1")
    os.kill(stopped, signal.SIGSTOP)
    job.until(lambda: state(stopped) == "T")
    code, _, err = job.end(is_passing=True)
    assert code == 75 and last_line(err) == ("rank 1 was stopped by a signal for 5 s in phase 'step' of step 2 "
                                             f"(log: {job.logs}/worker-1.log)")
    assert job.saved() == ["saved-0", "saved-1"], "it was woken to obey"


@pytest.mark.fault
def test_a_scheduler_that_fails_ends_the_job(launch):
    job = launch(WAIT, scheduler=["sh", "-c", "echo 'OSError: Address in use' >&2; exit 3"])
    code, _, err = job.end()
    assert code == 3 and last_line(err) == (f"the scheduler failed with exit code 3: OSError: Address in use "
                                            f"(log: {job.logs}/scheduler.log)")


@pytest.mark.fault
def test_a_scheduler_that_stays_is_ended(launch):
    assert launch("pass", scheduler=["sleep", "3600"]).end()[0] == 0


@pytest.mark.fault
def test_a_hung_collective_ends_the_job_with_every_stack(launch, tmp_path):
    (tmp_path / "mindspore").mkdir()
    (tmp_path / "mindspore/__init__.py").touch()
    (tmp_path / "mindspore/collective.py").write_text("import time\ndef wait():\n    time.sleep(3600)\n")
    job = launch("sys.path.insert(0, '')\nimport mindspore.collective\ndef read():\n    time.sleep(3600)\n"
                 "for step in range(5): beat(step)\nread() if rank else mindspore.collective.wait()\n",
                 limits={"ABORT_SECONDS": 1e9})
    job.begun('"step": 4')
    code, out, err = job.end(is_passing=True)
    assert code == 75
    assert re.fullmatch(
        r"rank 1 hung: nothing begun for \d+ s in phase 'step' of step 4, <string>:\d+ in read; rank 0 in phase 'step' "
        rf"of step 4, collective.py:3 in wait; every thread's stack is in the logs \(log: {job.logs}/worker-1.log\)",
        last_line(err))
    assert "Current thread" not in out + err, "stacks are for the logs"
    for rank in (0, 1):
        assert "(most recent call first)" in (job.logs / f"worker-{rank}.log").read_text()


@pytest.mark.fault
def test_other_phases_have_a_limit_of_their_own(launch):
    job = launch("beat(0, 'compile')\ntime.sleep(3600)", hang_seconds=1e9, compile_seconds=1)
    assert job.end(is_passing=True)[0] == 75


def test_a_machine_that_sleeps_is_not_one_that_hangs(monkeypatch):
    times = iter([100.0, 101.0, 4000.0, 4000.5])
    monkeypatch.setattr(supervise, "time", SimpleNamespace(monotonic=lambda: next(times)))
    supervisor = supervise.Supervisor(None)
    assert [supervisor._now() for _ in range(3)] == [1.0, 6.0, 6.5]
